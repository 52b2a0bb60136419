"""The page's section on cross-talk: three matrices, how far prediction and measurement agree, and why where they do not."""

from __future__ import annotations

from overpaint.evaluation.crosstalk import WARN_ABOVE
from overpaint.evaluation.graphics import HeatMap
from overpaint.evaluation.report import Section
from overpaint.evaluation.suites.crosstalk import LOST, MOVED, PREDICTED
from overpaint.reporting.numbers import Numbers, percent, plain

BELIEVED = 0.7
"""A rank correlation from which the closed form may stand for the measurement."""


def matrix(numbers: Numbers, metric: str, caption: str) -> HeatMap:
    """A matrix of the pairs "emitter -> receiver" of the crosstalk suite."""
    pairs = [tuple(subject.split(" -> ")) for subject in numbers.subjects() if " -> " in subject]
    rows = tuple(dict.fromkeys(pair[0] for pair in pairs))
    columns = tuple(dict.fromkeys([*(row for row in rows), *(pair[1] for pair in pairs)]))
    values = tuple(tuple(numbers.value(f"{row} -> {column}", metric) for column in columns) for row in rows)
    return HeatMap(rows, columns, values, caption, "patch")


def crosstalk(numbers: Numbers) -> Section:
    """What each patch does to every other concept."""
    correlations = [
        f"{r.metric}: {r.value:.2f} over {r.n} pairs"
        for r in numbers.record.results
        if r.subject == "all pairs" and "rank" in r.metric
    ]
    lost = numbers.get("all pairs", "pairs that lost accuracy")
    text = (
        "Rows are patches, each alone on the base; columns are concepts that it should leave alone. 0 is no effect.\n\n"
    )
    if lost is not None:
        text += f"{plain(lost.value)} of {lost.n} pairs lost accuracy. "
    text += "; ".join(correlations) or "No pair differs from another, so that there is no order to compare."
    text += _doubt(numbers)
    heats = (
        matrix(numbers, LOST, "Share of the base's accuracy that is lost"),
        matrix(numbers, MOVED, "Change of the pictures, relative to the patch's own concept"),
        matrix(numbers, PREDICTED, "Predicted in closed form, relative to the patch's own concept"),
    )
    return Section("Cross-talk", text, heats=heats)


def _doubt(numbers: Numbers) -> str:
    """Why predicted and measured cross-talk are ordered differently, where they are."""
    ranked = [r.value for r in numbers.record.results if r.subject == "all pairs" and "rank" in r.metric]
    if not ranked or max(ranked) >= BELIEVED:
        return ""
    predicted = [r.value for r in numbers.record.results if r.metric == PREDICTED]
    most = percent(max(predicted, default=0.0))
    if max(predicted, default=0.0) < WARN_ABOVE:
        why = "so small a change of what is read ends in a picture's chance details, and there is little to rank but those"
    else:
        why = "the prediction knows how much of what is read changes, and not what the model makes of it"
    return f". The largest predicted effect is {most} of what a patch does to its own concept: {why}."
