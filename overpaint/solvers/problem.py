"""The contract of every solver: a problem in, a solution out, the base as it was.

A solver is a frozen dataclass of hyper-parameters with `solve(problem) -> Solution`. Its fields are its settings: `--set`
options, provenance and test ids are derived from them. A field's metadata may hold `low` and `high` bounds (inclusive).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Protocol

import torch

from overpaint.bases.base import Base
from overpaint.concepts import Concept
from overpaint.errors import OverpaintError
from overpaint.patches.delta import Delta


class BadSetting(OverpaintError):
    """A hyper-parameter that a solver does not have or cannot take."""


class Unsolvable(OverpaintError):
    """A problem that has no solution under the given settings."""


@dataclass(frozen=True)
class EditProblem:
    """One concept to erase from one base.

    `universe` holds every other concept that is known for this text encoder: they are preserved, so that patches for
    them compose with this one. `report(step, of, text)` is told how far the solver is.
    """

    base: Base
    concept: Concept
    universe: tuple[Concept, ...] = ()
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[int, int, str], None] = lambda step, of, text: None

    @property
    def others(self) -> tuple[Concept, ...]:
        """The universe without the concept itself, by name: the order of a list changes no result."""
        return tuple(sorted((c for c in self.universe if c.name != self.concept.name), key=lambda c: c.name))


@dataclass(frozen=True)
class Solution:
    """The change, and what a careful person wants to know about it (residuals, ranks, condition numbers, steps)."""

    delta: Delta
    diagnostics: Mapping[str, Any]


class Solver(Protocol):
    """What every method offers."""

    def solve(self, problem: EditProblem) -> Solution:
        """The change that makes the problem's base forget its concept."""
        ...


def setting(default: Any, about: str, low: float | None = None, high: float | None = None) -> Any:
    """A hyper-parameter: its default, what it means (units, source), and its bounds."""
    return field(default=default, metadata={"about": about, "low": low, "high": high})


def configure(solver: type[Any], settings: Mapping[str, str]) -> Solver:
    """A solver from `--set name=value` texts.

    Raises BadSetting for a name the solver lacks (with the nearest it has), a value of another type or out of bounds.
    """
    fields = {f.name: f for f in dataclasses.fields(solver)}
    values: dict[str, Any] = {}
    for name, text in settings.items():
        if name not in fields:
            near = get_close_matches(name, fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadSetting(f"this solver has no setting {name!r}{hint} It has: {', '.join(fields)}")
        values[name] = _parse(fields[name], text)
    found: Solver = solver(**values)
    return found


def settings_of(solver: Solver) -> dict[str, Any]:
    """All hyper-parameters of a solver, as JSON."""
    return dataclasses.asdict(solver)  # type: ignore[call-overload, no-any-return]


def _parse(spec: dataclasses.Field[Any], text: str) -> Any:
    kind: Any = type(spec.default)
    try:
        if kind is bool:
            value: Any = {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        else:
            value = kind(text)
    except (ValueError, KeyError) as error:
        raise BadSetting(f"{spec.name}={text!r} is not a {kind.__name__}; its default is {spec.default}") from error
    low, high = spec.metadata.get("low"), spec.metadata.get("high")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"between {low} and {high}" if high is not None and low is not None else f"at least {low}"
        raise BadSetting(f"{spec.name} must be {bounds}; got {text}")
    return value
