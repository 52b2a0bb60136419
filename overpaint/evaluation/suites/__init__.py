"""One suite per file: an `EvalContext` in, measurements out. A suite is a frozen dataclass; its fields are its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from overpaint.core.errors import NotFound, OverpaintError

if TYPE_CHECKING:
    from overpaint.evaluation.context import EvalContext
    from overpaint.evaluation.metrics import Measurement


SUITES = {
    "quick": ("overpaint.evaluation.suites.quick:Quick", "erased, kept and restored, in a minute"),
    "grid": ("overpaint.evaluation.suites.grid:Grid", "styles x objects for each patch alone, as UnlearnCanvas"),
    "generality": (
        "overpaint.evaluation.suites.generality:Generality",
        "synonyms, and concepts nobody listed, as MACE",
    ),
    "scenes": ("overpaint.evaluation.suites.scenes:Scenes", "erase, restore and erase more, as SRS-ME's four scenes"),
    "scale": ("overpaint.evaluation.suites.scale:Scale", "more and more concepts under several ways to compose them"),
    "crosstalk": (
        "overpaint.evaluation.suites.crosstalk:CrosstalkSuite",
        "what each patch does to every other concept",
    ),
    "probes": (
        "overpaint.evaluation.suites.probes:Probes",
        "seven ways to bring erased objects back, and how far each gets",
    ),
    "cost": ("overpaint.evaluation.suites.cost:Cost", "seconds, memory and bytes of every patch"),
}
"""Every suite by name, with what it asks; listed without importing any of them."""


class Suite(Protocol):
    """What every suite offers."""

    def run(self, context: EvalContext) -> list[Measurement]:
        """What was measured. Raises OverpaintError when the context has too little for this suite."""
        ...


def suite_class(name: str) -> type[Any]:
    """The suite of a name. Raises NotFound with the known names."""
    if name not in SUITES:
        near = get_close_matches(name, SUITES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise NotFound(f"no suite is called {name!r}; {hint}known are: {', '.join(SUITES)}")
    module, _, attribute = SUITES[name][0].partition(":")
    suite: type[Any] = getattr(import_module(module), attribute)
    return suite


def configured(name: str, settings: Mapping[str, str]) -> Suite:
    """A suite from `--set name=value` texts; whole numbers and texts are what suites take.

    Raises OverpaintError for a setting that the suite lacks or cannot take.
    """
    kind = suite_class(name)
    known = {each.name: each for each in fields(kind)}
    values: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in known:
            raise OverpaintError(f"the suite {name} has no setting {key!r}; it has: {', '.join(known) or 'none'}")
        default = known[key].default
        if isinstance(default, int):
            if not text.strip().isdecimal() or int(text) < 1:
                raise OverpaintError(f"{key} of the suite {name} is a whole number from 1 on; got {text!r}")
            values[key] = int(text)
        else:
            values[key] = text
    suite: Suite = kind(**values)
    return suite
