"""Suites by name: an `EvalContext` in, measurements out.

A suite is a frozen dataclass that inherits `Suite`; its fields are its settings. What it declares about itself (whether it
attacks, what its section of a report is) decides where its numbers appear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pkgutil import resolve_name
from typing import TYPE_CHECKING, ClassVar

from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import nearest

if TYPE_CHECKING:
    from overpaint.evaluation.context import EvalContext
    from overpaint.evaluation.metrics import Measurement
    from overpaint.evaluation.report_page import Numbers, Section


SUITES = {
    "quick": ("overpaint.evaluation.suites.erasing:Quick", "erased, kept and restored, in a minute"),
    "grid": ("overpaint.evaluation.suites.erasing:Grid", "styles x objects for each patch alone, as UnlearnCanvas"),
    "generality": ("overpaint.evaluation.suites.erasing:Generality", "synonyms, and concepts nobody listed, as MACE"),
    "scenes": ("overpaint.evaluation.suites.erasing:Scenes", "erase, restore and erase more, as SRS-ME's four scenes"),
    "scenes_by_name": (
        "overpaint.evaluation.suites.erasing:ScenesByName",
        "the same four scenes, with bare names as prompts, as in SRS-ME's tables",
    ),
    "scale": ("overpaint.evaluation.suites.scale:Scale", "more and more concepts under several ways to compose them"),
    "crosstalk": ("overpaint.evaluation.crosstalk:CrosstalkSuite", "what each patch does to every other concept"),
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

    def __post_init__(self) -> None:
        """Raise OverpaintError for a number below 1: every number of a suite counts something."""
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise OverpaintError(f"{each.name} of the suite {type(self).__name__} is at least 1; got {value}")

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
        raise NotFound(f"no suite is called {name!r}{nearest(name, SUITES)}; known: {', '.join(SUITES)}")
    suite: type[Suite] = resolve_name(SUITES[name][0])
    return suite


def configured(name: str, settings: Mapping[str, str]) -> Suite:
    """A suite from `--set name=value` texts. Raises BadSetting for a setting that the suite lacks or cannot take."""
    from overpaint.solvers.problem import configure

    return configure(suite_class(name), settings)
