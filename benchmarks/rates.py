"""Rates over cells and their doubt: pooled over concepts, over those of the base on the same pictures, and their difference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot

import numpy as np
from numpy.typing import NDArray

from benchmarks.cells import BASE, Cell, Verdict
from benchmarks.protocol import NEVER, OTHERS
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import SHARE
from overpaint.evaluation.metrics import Mean, Measurement, Score, h_composed, mean, measured
from overpaint.solvers import SOLVERS

Cells = Sequence[Cell]


@dataclass(frozen=True)
class Base:
    """The base's own verdicts, by the sentence and seed of a picture and the group that it was asked in."""

    right: Mapping[tuple[str, str, int], bool]

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Base:
        own = (cell for cell in cells if cell.solver == BASE)
        return cls(
            {(group, v.prompt, v.seed): v.right for c in own for group, some in c.verdicts.items() for v in some}
        )

    def same(self, group: str, verdicts: Iterable[Verdict]) -> list[Verdict]:
        """What the base showed for the same pictures. Raises OverpaintError where it was not drawn."""
        try:
            return [Verdict(v.prompt, v.seed, self.right[group, v.prompt, v.seed]) for v in verdicts]
        except KeyError as error:
            raise OverpaintError(
                f"the base was not drawn for {error.args[0][1]!r}; run python -m benchmarks.solvers with as many pictures"
            ) from error


def by_solver(cells: Cells) -> dict[str, list[Cell]]:
    """The cells of each solver: the base first, then the package's order, then the alphabet."""
    order = (BASE, *SOLVERS)
    known = sorted({cell.solver for cell in cells}, key=lambda name: (order.index(name) if name in order else 99, name))
    return {solver: [cell for cell in cells if cell.solver == solver] for solver in known}


def unmeasured(cells: Cells) -> list[str]:
    """The package's solvers without a cell, with whatever settings."""
    known = {cell.solver.partition(":")[0] for cell in cells}
    return [name for name in SOLVERS if name not in known]


def pooled(cells: Cells, group: str) -> list[Verdict]:
    """The verdicts of a group over concepts; all concepts were asked about alike."""
    return [verdict for cell in cells for verdict in cell.verdicts.get(group, ())]


def rate(verdicts: Sequence[Verdict]) -> Mean | None:
    """The share that is right, None of nothing. A picture that two concepts were asked with counts for each."""
    return mean([float(v.right) for v in verdicts], [v.prompt for v in verdicts]) if verdicts else None


def share(cells: Cells, group: str, base: Base) -> Measurement | None:
    """Accuracy over that of the base on the same pictures; None where the base has nothing right either."""
    verdicts = pooled(cells, group)
    now, before = rate(verdicts), rate(base.same(group, verdicts))
    if now is None or before is None or not before.value:
        return None
    ratio = measured(group, SHARE, _ratio(now, before), now.n)
    if ratio.low != ratio.high:
        return ratio
    # Pictures that are all judged alike have only equal replicates; Wilson's interval still knows how many there were.
    low, high = (end / before.value for end in Score(sum(v.right for v in verdicts), now.n).interval)
    return replace(ratio, low=low, high=high)


def gap(cells: Cells, base: Base) -> Measurement | None:
    """By how much never listed objects are kept worse than listed ones, each over the base's accuracy; 0 to 1.

    The interval is put together from those of the two shares (Newcombe, 1998): both may be at their ends, where nothing
    can be drawn again.
    """
    told, untold = (share(cells, group, base) for group in (OTHERS, NEVER))
    if told is None or untold is None:
        return None
    (told_low, told_high), (untold_low, untold_high) = ends(told), ends(untold)
    less = hypot(told.value - told_low, untold_high - untold.value)
    more = hypot(told_high - told.value, untold.value - untold_low)
    value = told.value - untold.value
    return Measurement("gap", "difference", value, told.n + untold.n, value - less, value + more)


def _ratio(now: Mean, before: Mean) -> NDArray[np.float64]:
    return np.asarray(now.draws / np.maximum(before.draws, 1e-9), np.float64)


def doubted(h: Measurement, numbers: Mapping[tuple[str, str], Measurement]) -> Measurement:
    """H_c with an interval also where all pictures were judged alike: from the ends of the accuracies it is made of."""
    gone, left = (numbers.get((h.subject, f"accuracy on {what}")) for what in ("erased", "kept"))
    if h.low != h.high or gone is None or left is None:
        return h
    (gone_low, gone_high), (left_low, left_high) = ends(gone), ends(left)
    low, high = h_composed([gone_high, gone_low], [left_low, left_high])
    return replace(h, low=float(low), high=float(high))


def ends(row: Measurement) -> tuple[float, float]:
    """The interval; the value twice where it was counted and not sampled."""
    return (row.value if row.low is None else row.low), (row.value if row.high is None else row.high)
