"""An order: one patch that somebody wants, as a command line or a file of concepts says it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overpaint.concepts import Concept
from overpaint.errors import OverpaintError

if TYPE_CHECKING:
    from overpaint.solvers.problem import Solver

DEFAULT_SOLVER = "separable"


class BadKeep(OverpaintError):
    """An amount to keep that is neither a rank nor a share of energy."""


@dataclass(frozen=True)
class Keep:
    """How much of a change a compression keeps of each tensor: at most `rank` directions, or as many as hold `energy`.

    The energy of a change is the sum of its squared singular values; a share is above 0 and at most 1. One of the two is
    None.
    """

    rank: int | None = None
    energy: float | None = None

    @classmethod
    def parse(cls, text: str) -> Keep:
        """`4` is a rank, `0.99` (and `1.0`) a share of energy. Raises BadKeep for anything else."""
        try:
            if text.strip().isdecimal():
                return cls.from_json({"rank": int(text)})
            return cls.from_json({"energy": float(text)})
        except ValueError:
            raise BadKeep(
                f"a compression keeps a rank, such as 4, or a share of energy, such as 0.99; got {text!r}"
            ) from None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Keep:
        """What `as_json` gave; other keys are passed over. Raises BadKeep."""
        rank, energy = data.get("rank"), data.get("energy")
        if (type(rank) is int and rank >= 1 and energy is None) or (
            rank is None and isinstance(energy, float) and math.isfinite(energy) and 0 < energy <= 1
        ):
            return cls(rank, energy)
        raise BadKeep(
            f"a compression keeps a rank of at least 1, or a share of energy above 0 and at most 1.0; got {rank or energy}"
        )

    def as_json(self) -> dict[str, Any]:
        """The one that is set, under its name."""
        return {"energy": self.energy} if self.rank is None else {"rank": self.rank}

    def __str__(self) -> str:
        return f"{self.energy:g} of the energy" if self.rank is None else f"rank {self.rank}"


@dataclass(frozen=True)
class Order:
    """A concept, the solver that is to erase it with its settings (texts, as `--set` takes them), and the seed.

    `keeps` are the compressions that follow, one after the other. What is not `described` is a name and nothing else: where
    a registry knows the concept, its description counts.
    """

    concept: Concept
    solver: str = DEFAULT_SOLVER
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    seed: int = 0
    keeps: tuple[Keep, ...] = ()
    described: bool = True

    def method(self) -> Solver:
        """The configured solver. Raises NotFound for an unknown one, BadSetting for settings that it cannot take."""
        from overpaint.solvers import solver_class
        from overpaint.solvers.settings import configure

        found: Solver = configure(solver_class(self.solver), self.settings)
        return found


@dataclass(frozen=True)
class Surroundings:
    """What a solve knows beside its order: all concepts, prompts to leave undisturbed, a folder for what is worth keeping.

    Concepts and prompts decide what comes out, the folder only how fast.
    """

    universe: tuple[Concept, ...] = ()
    keep: tuple[str, ...] = ()
    cache: Path | None = None


@dataclass(frozen=True)
class Defaults:
    """What counts for every concept that does not say otherwise. Settings are those of `solver`, and of no other."""

    kind: str = "object"
    anchor: str = ""
    solver: str = DEFAULT_SOLVER
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    seed: int = 0

    def order(
        self,
        concept: Concept,
        solver: str | None = None,
        settings: Mapping[str, str] | None = None,
        seed: int | None = None,
    ) -> Order:
        """The order for a concept with what it says for itself."""
        method = solver or self.solver
        inherited = self.settings if method == self.solver else {}
        return Order(concept, method, {**inherited, **(settings or {})}, self.seed if seed is None else seed)

    def overridden(self, solver: str | None, settings: Mapping[str, str], seed: int | None) -> Defaults:
        """These defaults with what a command line says instead."""
        found = self.order(Concept("any"), solver, settings, seed)
        return Defaults(self.kind, self.anchor, found.solver, found.settings, found.seed)


def completed(orders: Iterable[Order], known: Iterable[Concept], keeps: tuple[Keep, ...]) -> list[Order]:
    """Orders with the descriptions that are known of concepts they only name, and with compressions."""
    by_name = {concept.name: concept for concept in known}
    return [
        replace(
            order,
            concept=order.concept if order.described else by_name.get(order.concept.name, order.concept),
            keeps=keeps,
            described=True,
        )
        for order in orders
    ]
