"""Hyper-parameters: every value is checked, wherever it comes from, and all of them are JSON.

A solver's settings are the fields of its frozen dataclass, declared with `setting`. A field's default says its type; its
metadata, what it means and what it may be. From these are derived `--set` options, provenance, tables and test ids.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, field
from difflib import get_close_matches
from typing import Any, TypeVar

from overpaint.errors import OverpaintError

S = TypeVar("S")

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class BadSetting(OverpaintError):
    """A hyper-parameter that a solver does not have or cannot take."""


def setting(
    default: Any,
    about: str,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A hyper-parameter: its default (true or false, a number or a text), what it means (units, source), its bounds.

    `low` and `high` are inclusive; `choices` are all the texts that it may be.
    """
    return field(default=default, metadata={"about": about, "low": low, "high": high, "choices": tuple(choices)})


def configure(solver: type[S], settings: Mapping[str, str], preset: str = "") -> S:
    """A solver from `--set name=value` texts, on top of a preset's values; `preset=NAME` among the texts names it too.

    Raises BadSetting for a preset or a name the solver lacks (with the nearest it has), a value of another type or out of
    bounds.
    """
    texts = dict(settings)
    fields = settable(solver)
    if "preset" not in fields:
        preset = texts.pop("preset", preset)
    values: dict[str, Any] = preset_of(solver, preset) if preset else {}
    for name, text in texts.items():
        values[name] = _parse(_field(fields, name), text)
    return solver(**values)


def settings_of(solver: Any) -> dict[str, Any]:
    """All hyper-parameters of a solver, as JSON."""
    return dataclasses.asdict(solver)


def settable(solver: Any) -> dict[str, Field[Any]]:
    """The settings of a solver (or of its class) by name, in the order they are declared."""
    return {f.name: f for f in dataclasses.fields(solver)}


def preset_of(solver: type[Any], name: str) -> dict[str, Any]:
    """The values of a preset by setting. Raises BadSetting for a preset the solver lacks."""
    presets: Mapping[str, Mapping[str, Any]] = getattr(solver, "PRESETS", {})
    if name not in presets:
        known = f"It has: {', '.join(presets)}" if presets else "It has none"
        raise BadSetting(f"this solver has no preset {name!r}{_nearest(name, presets)} {known}")
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
        hint = _nearest(value, choices) if choices else ""
        raise BadSetting(f"{spec.name} must be {wanted}; got {value}{hint}")
    return value


def _parse(spec: Field[Any], text: str) -> Any:
    kind: Any = type(spec.default)
    try:
        value: Any = _WORDS[text.strip().lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise _bad_type(spec, text) from error
    return _checked(spec, value)


def _bad_type(spec: Field[Any], value: Any) -> BadSetting:
    kind: Any = type(spec.default)
    also = f" {range_of(spec)}," if range_of(spec) else ""
    return BadSetting(
        f"{spec.name}={value!r} is not a {kind.__name__}; it takes{also} for example its default, {spec.default!r}"
    )


def _field(fields: Mapping[str, Field[Any]], name: str) -> Field[Any]:
    if name not in fields:
        raise BadSetting(f"this solver has no setting {name!r}{_nearest(name, fields)} It has: {', '.join(fields)}")
    return fields[name]


def _nearest(name: object, known: Any) -> str:
    near = get_close_matches(str(name), list(known), 1)
    return f"; did you mean {near[0]}?" if near else "."
