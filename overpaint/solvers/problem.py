"""The contract of every solver: a problem in, a solution out, the base as it was.

A solver is a frozen dataclass of hyper-parameters that inherits `Solver` and has `solve(problem) -> Solution`. Its fields are
its settings (`overpaint.solvers.settings`). `overpaint.testing.SolverContract` holds every solver to what is promised here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch

from overpaint.bases.base import Base
from overpaint.concepts import Concept
from overpaint.errors import OverpaintError
from overpaint.patches.delta import Delta
from overpaint.solvers.settings import BadSetting, check, configure, preset_of, setting, settings_of

__all__ = [
    "BadSetting",
    "Diverged",
    "EditProblem",
    "OutOfMemory",
    "Solution",
    "Solver",
    "Unsolvable",
    "configure",
    "finite",
    "setting",
    "settings_of",
    "within_memory",
]

S = TypeVar("S", bound="Solver")


class Unsolvable(OverpaintError):
    """A problem that has no solution under the given settings."""


class Diverged(Unsolvable):
    """A loss that is no longer a number."""


class OutOfMemory(OverpaintError):
    """A device without the memory that a solver needs."""


@dataclass(frozen=True)
class EditProblem:
    """One concept to erase from one base.

    `universe` holds every other concept that is known for this text encoder: they are preserved, so that patches for
    them compose with this one. `report(step, of, text)` is told how far the solver is; what it raises (KeyboardInterrupt
    when somebody gave up) passes through `solve`. `keep` are prompts to leave undisturbed; `cache`,
    a folder in which a solver may keep what it computed of the base alone.
    """

    base: Base
    concept: Concept
    universe: tuple[Concept, ...] = ()
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[int, int, str], None] = lambda step, of, text: None
    keep: tuple[str, ...] = ()
    cache: Path | None = None

    @property
    def others(self) -> tuple[Concept, ...]:
        """The universe without the concept itself, by name: the order of a list changes no result."""
        return tuple(sorted((c for c in self.universe if c.name != self.concept.name), key=lambda c: c.name))


@dataclass(frozen=True)
class Solution:
    """The change, and what a careful person wants to know about it (residuals, ranks, condition numbers, steps)."""

    delta: Delta
    diagnostics: Mapping[str, Any]


class Solver(ABC):
    """What every method inherits: settings that are checked when it is made, presets, and what it may touch.

    `PRESETS` has named sets of values tuned for a base whose scale is not the paper's; fields keep the paper's values.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def preset(cls: type[S], name: str, **settings: Any) -> S:
        """The solver with a preset's values, changed by `settings`. Raises BadSetting."""
        return cls(**{**preset_of(cls, name), **settings})

    def touches(self, base: Base) -> Sequence[str]:
        """Canonical names, or glob patterns of them, of all tensors that a delta of this solver may change.

        Unless a solver says otherwise: the projections that read the prompt.
        """
        return base.readers()

    @abstractmethod
    def solve(self, problem: EditProblem) -> Solution:
        """The change that makes the problem's base forget its concept.

        Writes nothing and leaves the base as it was, also when it is interrupted. The same problem with the same seed gives
        the same bits on one device. Reports progress at least once. Raises Unsolvable (Diverged when a loss is no number)
        and OutOfMemory.
        """


def finite(loss: float, step: int, lower: str) -> float:
    """The loss of a step as it is; raises Diverged, which names the step and what to `lower`, when it is not a number."""
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step}, so nothing can be learnt from here on; lower {lower}")
    return loss


@contextmanager
def within_memory(lower: str) -> Iterator[None]:
    """Within the block, a device that runs out of memory raises OutOfMemory, which says what to `lower`."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(
            f"out of memory while solving ({_first_line(error)}); lower {lower}, or use --device cpu"
        ) from error
    except RuntimeError as error:
        # PyTorch has no class of its own for a CPU that cannot allocate.
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise OutOfMemory(f"out of memory while solving ({_first_line(error)}); lower {lower}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no details"])[0].rstrip(".")
