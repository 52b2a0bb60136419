"""The short table in `docs/choosing-a-solver.md`: one row a solver, everything that was asked pooled, in place of the old one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median

from benchmarks.cells import BASE, Cell, Verdict
from benchmarks.protocol import ERASED, KEPT
from benchmarks.rates import Base, by_solver, pooled, rate, unmeasured
from benchmarks.results_page import markdown
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.metrics import Score
from overpaint.evaluation.report_page import Table, percent, plain

BEGIN, END = "<!-- measured: python -m benchmarks.solvers --page -->", "<!-- end -->"


def filled(page: str, table: str) -> str:
    """A page with the table between its two marks. Raises OverpaintError for a page without them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise OverpaintError(f"the page needs one line {BEGIN} and after it one line {END}")
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", page, flags=re.S)


def short_table(cells: Sequence[Cell]) -> str:
    """Markdown: per kind how much of the erased is still seen and how much of all others is left, then the costs."""
    base = Base.of(cells)
    rows = []
    for name, some in by_solver([cell for cell in cells if cell.verdicts and cell.kind != "pair"]).items():
        kinds = [[cell for cell in some if cell.kind == kind] for kind in ("object", "style")]
        costs = [cell.costs for cell in some if cell.costs is not None]
        if name != BASE and costs and all(kinds):
            shares = [spelt for one in kinds for spelt in (_seen(one), _left(one, base))]
            spent = (median(c.seconds for c in costs), max(c.megabytes for c in costs))
            size = median(c.nbytes for c in costs) / 1000
            rows.append((f"`{name}`", *shares, *map(plain, spent), plain(size)))
    heads = ("objects: still seen", "others left", "styles: still seen", "others left")
    output = (
        "In brackets, the 95% interval. Still seen: in sentences of training and others, and under synonyms. Others left: all "
        "other objects and styles, as a share of the base's own accuracy. Seconds (one thread, beside other work: compare them "
        "with each other) and KB are medians, MB the most."
    )
    return markdown(Table(("solver", *heads, "s", "MB", "KB"), tuple(rows), output))


def left_out(cells: Sequence[Cell]) -> str:
    """The sentence that names solvers without a row; nothing where there are none."""
    names = ", ".join(f"`{name}`" for name in unmeasured(cells))
    return (
        f"Not measured on this base yet: {names}; [results.md](results.md) has them on an earlier one." if names else ""
    )


def _seen(cells: Sequence[Cell]) -> str:
    verdicts = [v for group in ERASED for v in pooled(cells, group)]
    score = _score(verdicts)
    return _short(score.rate, score.interval)


def _left(cells: Sequence[Cell], base: Base) -> str:
    verdicts = [(group, v) for group in KEPT for v in pooled(cells, group)]
    before = [same for group, v in verdicts for same in base.same(group, [v])]
    drawn = rate(before)
    assert drawn is not None
    score = _score([v for _, v in verdicts])
    low, high = score.interval
    return _short(score.rate / drawn.value, (low / drawn.value, high / drawn.value))


def _score(verdicts: Sequence[Verdict]) -> Score:
    return Score(sum(v.right for v in verdicts), len(verdicts))


def _short(value: float, interval: tuple[float, float]) -> str:
    low, high = (f"{100 * end:.0f}" for end in interval)
    return f"{percent(value)} ({low} to {high})"
