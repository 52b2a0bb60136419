"""What the demo finds, and how the terminal shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from overpaint.evaluation.judging import Score
from overpaint.workshop import Solved


@dataclass(frozen=True)
class Check:
    """One line of the result: what was asked, what was found, whether it holds."""

    what: str
    found: str
    bar: str
    holds: bool


@dataclass
class Findings:
    """Everything the table and the report say."""

    solved: dict[str, Solved] = field(default_factory=dict)
    base_scores: dict[str, Score] = field(default_factory=dict)
    erased_scores: dict[str, Score] = field(default_factory=dict)
    restored_scores: dict[str, Score] = field(default_factory=dict)
    kept_base: Score | None = None
    kept: Score | None = None
    checks: list[Check] = field(default_factory=list)
    pictures: dict[str, list[NDArray[np.uint8]]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    prepare_seconds: float = 0.0


def concept_table(found: Findings) -> Table:
    """A row per concept: the judge's accuracy on the base, erased, put back; seconds and bytes."""
    table = Table(title="Judge's accuracy on the concept, held-out prompts", title_justify="left")
    for column in ("concept", "solver", "base", "erased", "put back", "seconds", "bytes"):
        table.add_column(column, justify="left" if column in ("concept", "solver") else "right")
    for name, solved in found.solved.items():
        back = found.restored_scores.get(name)
        table.add_row(
            name,
            solved.record.solver,
            f"{found.base_scores[name].rate:.0%}",
            f"{found.erased_scores[name].rate:.0%}",
            f"{back.rate:.0%}" if back else "",
            f"{solved.seconds:.2f}",
            f"{solved.nbytes:,}",
        )
    assert found.kept is not None
    assert found.kept_base is not None
    table.add_row("all others", "", f"{found.kept_base.rate:.1%}", f"{found.kept.rate:.1%} (kept)", "", "", "")
    return table


def check_table(found: Findings) -> Table:
    """A row per check."""
    table = Table(title="Checks", title_justify="left")
    for column in ("what", "found", "bar", "holds"):
        table.add_column(column)
    for check in found.checks:
        table.add_row(check.what, check.found, check.bar, "yes" if check.holds else "[bold red]no[/]")
    return table
