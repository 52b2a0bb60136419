"""Kept results, looked up and spelled for a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from overpaint.evaluation.report import Table
from overpaint.registry.evaluations import EvaluationRecord, ResultRecord

SHARES = re.compile(r"accuracy|share|UA|IRA|CRA|retention|probability|H_[co]")
"""Metrics that are shares and read best in percent."""


class Numbers:
    """The results of one evaluation, by subject and metric."""

    def __init__(self, record: EvaluationRecord) -> None:
        self.record = record
        self._found = {(result.subject, result.metric): result for result in record.results}

    def get(self, subject: str, metric: str) -> ResultRecord | None:
        return self._found.get((subject, metric))

    def value(self, subject: str, metric: str) -> float | None:
        found = self.get(subject, metric)
        return None if found is None else found.value

    def subjects(self, beginning: str = "") -> list[str]:
        """The subjects that begin so, in the order in which they were found."""
        return list(dict.fromkeys(r.subject for r in self.record.results if r.subject.startswith(beginning)))

    def table(self, subjects: Sequence[str], metrics: Sequence[str], caption: str, *, strip: str = "") -> Table:
        """One row for each subject, one column for each metric; what was not measured is a dash."""
        rows = tuple(
            (subject.removeprefix(strip), *(spelled(self.get(subject, metric)) for metric in metrics))
            for subject in subjects
        )
        return Table(("", *metrics), rows, caption)


def spelled(result: ResultRecord | None) -> str:
    """A number with its interval and n: in percent where it is a share."""
    if result is None:
        return "—"
    one = percent if SHARES.search(result.metric) else plain
    text = one(result.value)
    if result.low is not None and result.high is not None:
        text += f" ({one(result.low)} to {one(result.high)}, n={result.n})"
    return text


def percent(value: float) -> str:
    return f"{value:.1%}"


def plain(value: float) -> str:
    """Four significant digits; whole numbers as they are."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def worst(numbers: Numbers, subjects: Iterable[str], metric: str, *, lowest: bool) -> tuple[str, ResultRecord] | None:
    """The subject with the highest (or lowest) value of a metric, where there is any."""
    found = [(subject, result) for subject in subjects if (result := numbers.get(subject, metric)) is not None]
    if not found:
        return None
    return (min if lowest else max)(found, key=lambda pair: pair[1].value)


@cache
def _published() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(files("overpaint.evaluation").joinpath("published.json").read_text("utf-8"))
    return raw


def published(suite: str) -> tuple[Table, ...]:
    """The numbers that papers give for a suite's protocol; nothing where there are none."""
    found = _published().get(suite)
    if found is None:
        return ()
    return (Table(tuple(found["columns"]), tuple(tuple(row) for row in found["rows"]), found["caption"]),)
