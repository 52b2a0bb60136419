"""What a benchmark of solvers keeps in its work folder: a file for every solver and concept, and every patch it solved.

A file is there whole or not at all, so that a run may be killed, continued and shared between processes. What is kept
does not know when a solver's code has changed; remove the folder then.

What is missing are jobs, which `carried_out` does here or on a Ray cluster (`--on`). There, the process that was started
writes the files alone: a worker gets the kept patches that its job needs, and sends back its numbers and the patches it solved.
Workers import this package from a checkout at the same place, and keep pictures on their own machine in a work folder of the
same path.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.encoding import json_digest
from overpaint.core.errors import OverpaintError
from overpaint.core.executors import Executor, InProcess, Piece, Resources, open_executor
from overpaint.core.reporting import Progress
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.prompts import EvalPrompt
from overpaint.patches.patch import Patch, make_patch, read_patch
from overpaint.solvers.problem import Solution

BASE = "(base)"
"""The solver of cells that show the base alone."""
Item = TypeVar("Item")
Origin = tuple[Concept, Mapping[str, Any]]
"""What a kept patch follows from: its concept, and the solver with its settings, its seed and its universe."""


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
        self.used = list[Origin]()
        """Origins of the patches that were asked for."""

    def has(self, concept: Concept, origin: Mapping[str, Any]) -> bool:
        """Whether the patch of a concept and an origin (solver, settings, seed, universe) is kept."""
        return self._place(concept, origin).with_suffix(".json").is_file()

    def solved(
        self, concept: Concept, origin: Mapping[str, Any], solve: Callable[[], tuple[Solution, float, float]]
    ) -> tuple[Patch, Costs]:
        """A kept patch with its costs; or what `solve` finds, with its seconds and megabytes, kept from now on."""
        self.used.append((concept, origin))
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

    def files(self, origins: Iterable[Origin]) -> dict[str, bytes]:
        """The files of those patches that are kept, by name; the patch comes before its costs."""
        places = [self._place(*origin) for origin in origins if self.has(*origin)]
        return {file.name: file.read_bytes() for place in places for file in (place, place.with_suffix(".json"))}

    def take(self, files: Mapping[str, bytes]) -> None:
        """Keep the patches of another work folder."""
        for name, content in files.items():
            if not (self.folder / name).is_file():
                write(self.folder / name, content)

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
    """Seconds of the clock after which nothing new is begun; 0 is no end. Counts from when it is made.

    By the time of day, which other machines know, too.
    """

    seconds: float = 0.0
    began: float = field(default_factory=time.time)

    @property
    def left(self) -> float:
        """Seconds that are left, where there is an end."""
        return self.seconds - (time.time() - self.began)

    @property
    def is_spent(self) -> bool:
        """Whether the time is over."""
        return bool(self.seconds) and self.left <= 0

    def check(self) -> None:
        """Raise BudgetSpent when the time is over."""
        if self.is_spent:
            raise BudgetSpent(self)


NO_END = Budget()


class BudgetSpent(OverpaintError):
    """A benchmark's time is over; what it has done is kept."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(f"{budget.seconds:g} seconds are over; the same command goes on where this one stopped")


@dataclass(frozen=True)
class KeptRows:
    """A file of measurements that a job found, and what it was asked: `about`, as JSON."""

    place: Path
    about: Mapping[str, Any]

    @property
    def is_kept(self) -> bool:
        """Whether the file answers what is asked now."""
        return self.place.is_file() and json.loads(self.place.read_text("utf-8"))["about"] == self.about

    def keep(self, rows: Iterable[Measurement]) -> None:
        """Write it."""
        write(self.place, json.dumps({"about": self.about, "rows": [asdict(row) for row in rows]}, indent=1).encode())

    @staticmethod
    def read(place: Path) -> list[Measurement]:
        """What a file has."""
        return [Measurement(**row) for row in json.loads(place.read_text("utf-8"))["rows"]]


class BenchReference(Protocol):
    """A bench (a base with its judge, kept patches and pictures), which each process opens once."""

    def open(self) -> Any:
        """The bench of this process; it has `patches` and a `device`."""
        ...


@dataclass(frozen=True)
class Job:
    """What is missing: `call(bench, *arguments)`, an importable function; `needs` says which kept patches it may read.

    `name` says what it is, to people.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    needs: tuple[Origin, ...] = ()


class NeededPatches:
    """The kept patches that a job needs. Their files are read when the job is sent to a worker, and travel with it."""

    def __init__(self, bench: BenchReference, origins: Sequence[Origin]) -> None:
        self._bench, self._origins = bench, origins
        self.files: dict[str, bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self._bench.open().patches.files(self._origins)}


@dataclass(frozen=True)
class Done:
    """What a job found, the seconds it took, and the files of patches that its worker solved."""

    value: Any
    seconds: float
    files: Mapping[str, bytes] = field(default_factory=dict)


def do_job(
    bench: BenchReference,
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    needed: NeededPatches,
    budget: Budget,
    progress: Progress,
) -> Done | None:
    """Do a job in whichever process; None where the time was over before its end."""
    try:
        budget.check()
        opened = bench.open()
        if needed.files is not None:
            opened.patches.take(needed.files)
            opened.patches.used.clear()
        started = time.monotonic()
        value = call(opened, *arguments)
    except BudgetSpent:
        return None
    seconds = time.monotonic() - started
    if needed.files is None:
        return Done(value, seconds)
    files = opened.patches.files(opened.patches.used)
    return Done(value, seconds, {name: content for name, content in files.items() if name not in needed.files})


def carried_out(
    bench: BenchReference, jobs: Sequence[Job], executor: Executor | None = None, budget: Budget = NO_END
) -> Iterator[tuple[int, Any, str]]:
    """Do jobs; of each, as it is done, its index, what it found and why it failed. Each is said on standard error.

    Patches that a worker solved are kept here before what it found is given. Raises BudgetSpent when there is more to do than
    time, and OverpaintError where the executor can do nothing.
    """
    if not jobs:
        return
    opened, is_left, count = bench.open(), False, 0
    pieces = [
        Piece(job.name, do_job, (job.call, job.arguments, NeededPatches(bench, job.needs), budget)) for job in jobs
    ]
    needs = Resources(gpus=float(opened.device.type == "cuda"))
    with closing((executor or InProcess()).results(pieces, bench, needs, _say)) as results:
        for result in results:
            done: Done | None = result.value
            if done is None and not result.error:
                is_left = True
                continue
            count += 1
            _say(count, len(jobs), f"{jobs[result.index].name}: {f'{done.seconds:.0f} s' if done else result.error}")
            if done and done.files:
                opened.patches.take(done.files)
            yield result.index, done and done.value, result.error
    if is_left:  # by the clock of whoever left it, which may be ahead of this one's
        raise BudgetSpent(budget)


def _say(step: int, of: int, text: str) -> None:
    print(f"{step}/{of} {text}" if step else text, file=sys.stderr, flush=True)


def add_on_option(parser: ArgumentParser) -> None:
    """Add `--on`, which says where jobs are done."""
    parser.add_argument("--on", default="", metavar="ray|ray://HOST:PORT", help="a Ray cluster; empty: this process")


@contextmanager
def working_on(on: str) -> Iterator[Executor]:
    """The executor of `--on`, for a block. A spent budget ends the block, any other refusal the program, each in a sentence."""
    try:
        with closing(open_executor(on)) as executor:
            yield executor
    except BudgetSpent as error:
        print(error, file=sys.stderr)
    except OverpaintError as error:
        raise SystemExit(str(error)) from None


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
