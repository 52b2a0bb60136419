"""What lies beside a report's page: the numbers as JSON and CSV, the figures as PNG."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from overpaint.errors import OverpaintError
from overpaint.evaluation.figures import heat_map, line_chart
from overpaint.evaluation.suites.crosstalk import LOST, PREDICTED
from overpaint.registry.evaluations import EvaluationRecord
from overpaint.reporting.crosstalk import matrix
from overpaint.reporting.numbers import Numbers
from overpaint.reporting.sections import curve


def save_numbers(out: Path, records: Sequence[EvaluationRecord]) -> tuple[Path, ...]:
    """Every number of `records` in `out`'s name with .json and .csv."""
    files = out.with_suffix(".json"), out.with_suffix(".csv")
    runs = [{**asdict(record), "at": record.at.isoformat()} for record in records]
    files[0].write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", "utf-8")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["suite", "subject", "metric", "value", "low", "high", "n", "judge", "seed"])
    for record in records:
        for r in record.results:
            writer.writerow([record.suite, r.subject, r.metric, r.value, r.low, r.high, r.n, record.judge, record.seed])
    files[1].write_text(text.getvalue(), "utf-8")
    return files


def save_figures(out: Path, found: Mapping[str, Numbers]) -> tuple[list[Path], list[str]]:
    """The figures of the suites that have one, and a sentence where they cannot be drawn."""
    files: list[Path] = []
    try:
        if "crosstalk" in found:
            for metric, label in ((LOST, "measured"), (PREDICTED, "predicted")):
                files.append(_matrix(out, found["crosstalk"], metric, label))
        if "scale" in found:
            place = out.with_name(f"{out.stem}-scale.png")
            line_chart(place, curve(found["scale"]))
            files.append(place)
    except OverpaintError as error:
        return files, [f"no PNG figures: {error}"]
    return files, []


def _matrix(out: Path, numbers: Numbers, metric: str, label: str) -> Path:
    place = out.with_name(f"{out.stem}-crosstalk-{label}.png")
    shown = matrix(numbers, metric, metric)
    values = np.array([[np.nan if value is None else value for value in row] for row in shown.values], np.float64)
    heat_map(
        place,
        values,
        shown.rows,
        shown.columns,
        title=f"Cross-talk, {label}",
        row_label="patch",
        column_label="concept",
    )
    return place
