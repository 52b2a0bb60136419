"""The contract of every solver: a problem in, a solution out, the base as it was.

A solver is a frozen dataclass that inherits `Solver`: its fields are its settings, declared with `setting`, and it has
`solve(problem) -> Solution`. From the settings' metadata follow their checks, `--set` options, provenance and tables. What it
declares about itself (what it reads, which bases it supports) decides what is recorded beside a patch;
`overpaint.testing.SolverContract` holds every solver to its declarations.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch

from overpaint.bases.base import Base
from overpaint.bases.layout import Layout
from overpaint.bases.loading import own_torch_settings
from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.core.names import nearest
from overpaint.core.reporting import Progress, silent
from overpaint.patches.delta import Delta

S = TypeVar("S")
SolverT = TypeVar("SolverT", bound="Solver")

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class BadSetting(OverpaintError):
    """A hyper-parameter that a solver does not have or cannot take."""


def setting(
    default: Any,
    about: str,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    *,
    added_later: bool = False,
) -> Any:
    """A hyper-parameter: its default (true or false, a number or a text), what it means (units, source), its bounds.

    `low` and `high` are inclusive; `choices` are all the texts that it may be. One that was `added_later` to a solver of which
    there are patches is recorded only where it is not its default, so that the same patch keeps its id.
    """
    known = {"about": about, "low": low, "high": high, "choices": tuple(choices), "added_later": added_later}
    return field(default=default, metadata=known)


def configure(solver: type[S], settings: Mapping[str, str], preset: str = "") -> S:
    """A solver (or a suite) from `--set name=value` texts, on top of a preset's values, which `preset=NAME` names too.

    Raises BadSetting for a preset or a name the solver lacks (with the nearest it has), a value of another type or out of
    bounds.
    """
    texts = dict(settings)
    fields = settable(solver)
    if "preset" not in fields:
        preset = texts.pop("preset", preset)
    values: dict[str, Any] = preset_of(solver, preset) if preset else {}
    for name, text in texts.items():
        if name not in fields:
            had = ", ".join(fields) or "none"
            raise BadSetting(f"{solver.__name__} has no setting {name!r}{nearest(name, fields)}; it has: {had}")
        values[name] = _parse(fields[name], text)
    return solver(**values)


def settings_of(solver: Any) -> dict[str, Any]:
    """All hyper-parameters of a solver, as JSON; without those that were added later and have their default."""
    silent = {name for name, spec in settable(solver).items() if spec.metadata.get("added_later")}
    every = dataclasses.asdict(solver)
    return {
        name: value for name, value in every.items() if name not in silent or value != settable(solver)[name].default
    }


def chosen_settings(solver: type[Solver], recorded: Mapping[str, Any], revision: int) -> dict[str, Any]:
    """Of the settings that a patch of some revision records, those that were chosen: not the defaults of that time."""
    former: dict[str, Any] = {}
    for until in sorted(solver.FORMER_DEFAULTS, reverse=True):
        if revision <= until:
            former |= solver.FORMER_DEFAULTS[until]
    return {name: value for name, value in recorded.items() if name not in former or value != former[name]}


def settable(solver: Any) -> dict[str, Field[Any]]:
    """The settings of a solver (or of its class) by name, in the order they are declared."""
    return {f.name: f for f in dataclasses.fields(solver)}


def preset_of(solver: type[Any], name: str) -> dict[str, Any]:
    """The values of a preset by setting. Raises BadSetting for a preset the solver lacks."""
    presets: Mapping[str, Mapping[str, Any]] = getattr(solver, "PRESETS", {})
    if name not in presets:
        raise BadSetting(
            f"{solver.__name__} has no preset {name!r}{nearest(name, presets)}; it has: {', '.join(presets) or 'none'}"
        )
    return dict(presets[name])


def check(solver: Any) -> None:
    """Bring the values of a new solver to their declared types, or raise BadSetting: the one place that decides.

    A whole number is taken where a number is asked for, and nothing else is converted; NaN and infinity are refused.
    """
    for name, spec in settable(solver).items():
        object.__setattr__(solver, name, _checked(spec, getattr(solver, name)))


def range_of(spec: Field[Any]) -> str:
    """What a setting may be, in words; empty where anything of its type goes."""
    low, high, choices = (spec.metadata.get(key) for key in ("low", "high", "choices"))
    if choices:
        return f"one of {', '.join(choices)}"
    if low is not None and high is not None:
        return f"between {low:g} and {high:g}"
    if low is not None:
        return f"at least {low:g}"
    return f"at most {high:g}" if high is not None else ""


def _checked(spec: Field[Any], value: Any) -> Any:
    kind: Any = type(spec.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise _bad_type(spec, value)
    low, high, choices = (spec.metadata.get(key) for key in ("low", "high", "choices"))
    outside = kind is float and not math.isfinite(value)
    outside = outside or (low is not None and value < low) or (high is not None and value > high)
    if outside or (choices and value not in choices):
        wanted = range_of(spec) or "finite"
        hint = nearest(value, choices) if choices else ""
        raise BadSetting(f"{spec.name} must be {wanted}; got {value}{hint}")
    return value


def _parse(spec: Field[Any], text: str) -> Any:
    kind: Any = type(spec.default)
    try:
        value: Any = _BOOLEANS[text.strip().lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise _bad_type(spec, text) from error
    return _checked(spec, value)


def _bad_type(spec: Field[Any], value: Any) -> BadSetting:
    kind: Any = type(spec.default)
    also = f" {range_of(spec)}," if range_of(spec) else ""
    return BadSetting(
        f"{spec.name}={value!r} is not a {kind.__name__}; it takes{also} for example its default, {spec.default!r}"
    )


class Unsolvable(OverpaintError):
    """A problem that has no solution under the given settings."""


class TrainingDiverged(Unsolvable):
    """A loss that is no longer a number."""


class OutOfMemory(OverpaintError, MemoryError):
    """A device without the memory that a solver needs. On a cluster, the concept is tried again with more of it."""


@dataclass(frozen=True)
class EditProblem:
    """One concept to erase from one base.

    `universe` holds every other concept that is known for this text encoder: they are preserved, so that patches for
    them compose with this one. `preserve_prompts` are further prompts to preserve. `report(step, of, text)` is called with the
    progress; what it raises (KeyboardInterrupt when somebody gave up) passes through `solve`. `cache` is a folder in which a
    solver may keep what it computed of the base alone.
    """

    base: Base
    concept: Concept
    universe: tuple[Concept, ...] = ()
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Progress = silent
    preserve_prompts: tuple[str, ...] = ()
    cache: Path | None = None

    @property
    def others(self) -> tuple[Concept, ...]:
        """The universe without the concept itself, by name: the order of a list changes no result."""
        return tuple(sorted((c for c in self.universe if c.name != self.concept.name), key=lambda c: c.name))

    def preserved_prompts(self, setting: str = "") -> tuple[str, ...]:
        """`preserve_prompts` and those of a solver's own setting, which separates them by `;`: each once, sorted."""
        return distinct_prompts((*self.preserve_prompts, *setting.split(";")))

    def within(self, step: int, of: int) -> EditProblem:
        """The same problem, whose progress is reported as part of one step of `of`."""
        return dataclasses.replace(self, report=lambda _step, _of, text: self.report(step, of, text))


def distinct_prompts(prompts: Iterable[str]) -> tuple[str, ...]:
    """Prompts without surrounding spaces, each once, sorted; empty ones are left out."""
    return tuple(sorted({prompt.strip() for prompt in prompts} - {""}))


@dataclass(frozen=True)
class Solution:
    """The change, and what a careful person wants to know about it (residuals, ranks, condition numbers, steps).

    `record` joins the solver's entry in the patch's manifest: facts about the inputs that are known only after solving, such as
    the size of the sample that stood for a vocabulary.
    """

    delta: Delta
    diagnostics: Mapping[str, Any]
    record: Mapping[str, Any] = field(default_factory=dict)


class Solver(ABC):
    """What every method inherits: checked settings, presets, and declarations.

    `PRESETS` has named sets of values tuned for a base whose scale is not the paper's; fields keep the paper's values.

    The declarations say what decides a result. A patch's manifest records an input only where it is declared, so that a change
    of any other input changes no id. By default every input is declared, which is safe: at worst something is solved again.
    A subclass overrides them by a class attribute, or by a property where its settings decide.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})

    FORMER_DEFAULTS: ClassVar[Mapping[int, Mapping[str, Any]]] = MappingProxyType({})
    """By the last revision that had them, defaults that changed since. A patch of that revision or an earlier one that records
    such a value is taken not to have chosen it, and is solved again by today's. What was `added_later` needs no entry: its
    default is not recorded."""

    is_closed_form = False
    """Whether the answer is a formula over text embeddings: no training, no pictures. Write it as a literal: it is also read
    from the source, without importing it."""

    revision = 1
    """Raised whenever a change of the code changes what the same inputs give; recorded from 2 on."""

    @property
    def uses_universe(self) -> bool:
        """Whether the other known concepts (`problem.others`) decide the result."""
        return True

    @property
    def uses_preserved_prompts(self) -> bool:
        """Whether `problem.preserve_prompts` decide the result."""
        return True

    @property
    def uses_pictures(self) -> bool:
        """Whether the pictures in the folder of the setting `images` decide the result."""
        return bool(getattr(self, "images", ""))

    def __init_subclass__(cls, **keywords: Any) -> None:
        # Here rather than in each: what a solver finds must not depend on its caller's PyTorch settings.
        super().__init_subclass__(**keywords)
        if "solve" in cls.__dict__:
            cls.solve = own_torch_settings()(cls.__dict__["solve"])  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def preset(cls: type[SolverT], name: str, **settings: Any) -> SolverT:
        """The solver with a preset's values, changed by `settings`. Raises BadSetting."""
        return cls(**{**preset_of(cls, name), **settings})

    def supports(self, layout: Layout) -> str | None:
        """Why this solver cannot solve bases of a layout, as a sentence that says what to do; None where it can."""
        return None

    def touches(self, base: Base) -> Sequence[str]:
        """Canonical names, or glob patterns of them, of all tensors that a delta of this solver may change.

        Unless a solver says otherwise: the projections that read the prompt.
        """
        return base.projections()

    def peak_bytes(self, base: Base) -> int:
        """About how many bytes of a GPU's memory solving one concept takes, rather too many than too few. 0: nobody knows.

        On a cluster, as many concepts are solved at once on a GPU as its memory has room for; where nobody knows, one.
        """
        return 0

    @abstractmethod
    def solve(self, problem: EditProblem) -> Solution:
        """The change that makes the problem's base forget its concept.

        Writes nothing and leaves the base as it was, also when it is interrupted. The same problem with the same seed gives
        the same bits on one device. Reports progress at least once. Raises Unsolvable (TrainingDiverged when a loss is not a
        number) and OutOfMemory.
        """


def finite(loss: float, step: int, lower: str) -> float:
    """The loss of a step as it is; raises TrainingDiverged, which names the step and what to `lower`, when it is not a number."""
    if not math.isfinite(loss):
        raise TrainingDiverged(
            f"the loss is {loss} at step {step}, so nothing can be learnt from here on; lower {lower}"
        )
    return loss


@contextmanager
def within_memory(lower: str) -> Iterator[None]:
    """Within the block, a device that runs out of memory raises OutOfMemory, which says what to `lower`."""
    try:
        yield
    except OutOfMemory:
        raise
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
