"""Figures as PNG files, drawn by matplotlib (the extra `overpaint[figures]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overpaint.errors import AlreadyExists, OverpaintError
from overpaint.evaluation.graphics import Chart

MARKERS = "osD^vP"


def heat_map(
    path: Path,
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    row_label: str,
    column_label: str,
) -> None:
    """Save a matrix, float64 [rows, columns] in 0 to 1, as a labelled heat map; larger values are cut off at 1.

    NaN is a cell without a number.

    Raises AlreadyExists when the file is there, OverpaintError when matplotlib is missing or the file cannot be written.
    """
    if path.exists():
        raise AlreadyExists(f"{path} is already there; name another file")
    figure: Any = _figure()(figsize=(2.5 + 0.45 * len(columns), 1.8 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(column_label)
    axes.set_ylabel(row_label)
    axes.set_title(title, loc="left")
    if len(rows) * len(columns) <= 400:
        for i, j in np.ndindex(*values.shape):
            if np.isfinite(values[i, j]):
                ink = "black" if values[i, j] > 0.6 else "white"
                axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=ink, fontsize=7)
    figure.colorbar(shown, ax=axes)
    _save(figure, path)


def line_chart(path: Path, chart: Chart) -> None:
    """Save a chart of lines with their whiskers; x is spaced evenly, y goes from 0 to 1.

    Raises AlreadyExists when the file is there, OverpaintError when matplotlib is missing or the file cannot be written.
    """
    if path.exists():
        raise AlreadyExists(f"{path} is already there; name another file")
    figure: Any = _figure()(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ticks = sorted({x for line in chart.lines for x, *_ in line.points})
    for number, line in enumerate(chart.lines):
        places = [ticks.index(x) for x, *_ in line.points]
        values = [y for _, y, *_ in line.points]
        below = [y - (y if low is None else low) for _, y, low, _ in line.points]
        above = [(y if high is None else high) - y for _, y, _, high in line.points]
        doubt = np.clip([below, above], 0, None)
        axes.errorbar(places, values, doubt, marker=MARKERS[number % len(MARKERS)], capsize=2, label=line.name)
    axes.set_xticks(range(len(ticks)), [f"{x:g}" for x in ticks])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OverpaintError(f"cannot write {path} ({error.strerror}); choose a place you may write to") from error


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OverpaintError("figures need matplotlib: pip install 'overpaint[figures]'") from error
    return Figure
