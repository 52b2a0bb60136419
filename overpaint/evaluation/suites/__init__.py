"""One suite per file: an `EvalContext` in, measurements out.

A suite is a frozen dataclass that inherits `Suite`; its fields are its settings. What it declares about itself (whether it
attacks, what its section of a report is) decides where its numbers appear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from overpaint.core.errors import NotFound, OverpaintError

if TYPE_CHECKING:
    from overpaint.evaluation.context import EvalContext
    from overpaint.evaluation.metrics import Measurement
    from overpaint.evaluation.report_page import Numbers, Section


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

ERASED_BAR, KEPT_BAR = 0.05, 0.97
"""At most this accuracy on an erased concept is left, and at least this share of the base's on everything else."""


class Suite:
    """What every suite offers."""

    is_attack: ClassVar[bool] = False
    """Whether it tries to bring concepts back: a certificate then states its numbers as counter-evidence."""
    heading: ClassVar[str] = ""
    """The heading of its section of a report; empty where the report's own sections show its numbers."""

    def run(self, context: EvalContext) -> list[Measurement]:
        """What was measured. Raises OverpaintError when the context has too little for this suite."""
        raise NotImplementedError

    @classmethod
    def section(cls, numbers: Numbers) -> Section:
        """Its section of a report: by default, a table of every number."""
        from overpaint.evaluation.report_page import Section

        return Section(cls.heading, table=numbers.table(numbers.subjects(), numbers.metrics(), "Measured"))


def is_attack(name: str) -> bool:
    """Whether the suite of a name tries to bring concepts back; one that is not known here does not."""
    return name in SUITES and suite_class(name).is_attack


def suite_class(name: str) -> type[Suite]:
    """The suite of a name. Raises NotFound with the known names."""
    if name not in SUITES:
        near = get_close_matches(name, SUITES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise NotFound(f"no suite is called {name!r}; {hint}known are: {', '.join(SUITES)}")
    module, _, attribute = SUITES[name][0].partition(":")
    suite: type[Suite] = getattr(import_module(module), attribute)
    return suite


def configured(name: str, settings: Mapping[str, str]) -> Suite:
    """A suite from `--set name=value` texts; whole numbers and texts are what suites take.

    Raises OverpaintError for a setting that the suite lacks or cannot take.
    """
    kind = suite_class(name)
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
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
    return kind(**values)
