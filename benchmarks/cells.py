"""What a benchmark of solvers keeps in its work folder: a file for every solver and concept, and every patch it solved.

A file is there whole or not at all, so that a run may be killed, continued and shared between processes. What is kept
does not know when a solver's code has changed; remove the folder then.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.encoding import json_digest
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.prompts import EvalPrompt
from overpaint.patches.patch import Patch, make_patch, read_patch
from overpaint.solvers.problem import Solution

BASE = "(base)"
"""The solver of cells that show the base alone."""
Item = TypeVar("Item")


class Verdict(NamedTuple):
    """Whether the picture of a sentence and a seed showed what it should."""

    prompt: str
    seed: int
    right: bool


@dataclass(frozen=True)
class Costs:
    """What a solve took: seconds, megabytes (10^6) more than before at most, bytes of the patch; and what the solver says."""

    seconds: float
    megabytes: float
    nbytes: int
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One solver, one concept: verdicts by group of questions, costs, how it was made, or why it was refused."""

    solver: str
    concept: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    verdicts: Mapping[str, tuple[Verdict, ...]] = field(default_factory=dict)
    costs: Costs | None = None
    refused: str = ""

    def answers(self, asked: Mapping[str, Sequence[EvalPrompt]], settings: Mapping[str, Any], drawn: str) -> bool:
        """Whether this cell has a verdict on everything that is asked, by a solver and a sampler of these settings."""
        had = {group: {(each.prompt, each.seed) for each in verdicts} for group, verdicts in self.verdicts.items()}
        return (
            not self.refused
            and dict(self.settings) == dict(settings)
            and self.made.get("drawn") == drawn
            and all((q.prompt, q.seed) in had.get(group, ()) for group, some in asked.items() for q in some)
        )


class Cells:
    """The cells of a work folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, cell: Cell) -> None:
        """Keep a cell in place of the one that was there."""
        write(
            self._place(cell.solver, cell.concept), json.dumps(asdict(cell), ensure_ascii=False, default=str).encode()
        )

    def find(self, solver: str, concept: str) -> Cell | None:
        """The cell of a solver and a concept, None where there is none."""
        place = self._place(solver, concept)
        return _read(place) if place.is_file() else None

    def all(self) -> list[Cell]:
        """Every cell, by the names of the files. Raises OverpaintError for a file that is no cell."""
        return [_read(place) for place in sorted(self.folder.glob("*.json"))]

    def _place(self, solver: str, concept: str) -> Path:
        plain = re.sub(r"[^a-z0-9_]+", "-", f"{solver}-{concept}".casefold()).strip("-")
        return self.folder / f"{plain[:60]}-{json_digest([solver, concept])[:8]}.json"


class Patches:
    """Patches of a work folder by everything that they follow from: what was solved once is not solved again."""

    def __init__(self, folder: Path, base: Base) -> None:
        self.folder, self.base = folder, base

    def has(self, concept: Concept, origin: Mapping[str, Any]) -> bool:
        """Whether the patch of a concept and an origin (solver, settings, seed, universe) is kept."""
        return self._place(concept, origin).with_suffix(".json").is_file()

    def solved(
        self, concept: Concept, origin: Mapping[str, Any], solve: Callable[[], tuple[Solution, float, float]]
    ) -> tuple[Patch, Costs]:
        """A kept patch with its costs; or what `solve` finds, with its seconds and megabytes, kept from now on."""
        place = self._place(concept, origin)
        about = place.with_suffix(".json")
        if self.has(concept, origin):
            return read_patch(place.read_bytes()), Costs(**json.loads(about.read_text("utf-8")))
        solution, seconds, megabytes = solve()
        patch = make_patch(self.base, concept, solution.delta, dict(origin))
        found = {name: value for name, value in solution.diagnostics.items() if name != "seconds"}
        costs = Costs(seconds, megabytes, patch.nbytes, json.loads(json.dumps(found, default=str)))
        # The patch comes first: only costs say that it is there.
        write(place, patch.blob)
        write(about, json.dumps(asdict(costs), ensure_ascii=False).encode())
        return patch, costs

    def _place(self, concept: Concept, origin: Mapping[str, Any]) -> Path:
        key = json_digest([self.base.fingerprint, concept.as_json(), dict(origin)])
        return self.folder / f"{key}.safetensors"


@dataclass(frozen=True)
class Shard:
    """The part of some work that one of several processes does."""

    number: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`0/2` is the first of two. Raises OverpaintError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or int(match[1]) >= int(match[2]):
            raise OverpaintError(f"a shard is written 0/2 or 1/2, counted from 0; got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def part(self, work: Iterable[Item]) -> list[Item]:
        """Every `of`-th item: neighbours, which cost about the same, go to different processes."""
        return list(work)[self.number :: self.of]


WHOLE = Shard()


@dataclass(frozen=True)
class Budget:
    """Seconds of the clock after which nothing new is begun; 0 is no end. Counts from when it is made."""

    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def is_spent(self) -> bool:
        """Whether the time is over."""
        return bool(self.seconds) and time.monotonic() - self.began >= self.seconds

    def check(self) -> None:
        """Raise BudgetSpent when the time is over."""
        if self.is_spent:
            raise BudgetSpent(f"{self.seconds:g} seconds are over; the same command goes on where this one stopped")


NO_END = Budget()


class BudgetSpent(OverpaintError):
    """A benchmark's time is over; what it has done is kept."""


def write(place: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, also when several processes write the same one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = place.with_name(f"{place.name}.{os.getpid()}")
    scratch.write_bytes(content)
    scratch.replace(place)


def _read(place: Path) -> Cell:
    try:
        raw: dict[str, Any] = json.loads(place.read_text("utf-8"))
        verdicts = {group: tuple(Verdict(*each) for each in some) for group, some in raw["verdicts"].items()}
        costs = Costs(**raw["costs"]) if raw["costs"] else None
        return Cell(**{**raw, "verdicts": verdicts, "costs": costs})
    except (ValueError, KeyError, TypeError) as error:
        raise OverpaintError(
            f"{place} is not a measured cell ({error}); delete it, and it is measured again"
        ) from error
