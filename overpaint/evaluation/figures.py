"""Figures as PNG files, drawn by matplotlib (the extra `overpaint[figures]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from overpaint.core.errors import AlreadyExists, OverpaintError
from overpaint.evaluation.report_page import Chart, HeatMap, Section

MARGIN, GAP, PADDING = 28, 10, 16
"""Pixels around the sheet, between pictures, and between pictures and words."""
LABEL_LIMIT = 220
"""A row's label is wrapped at this width, in pixels."""
PAPER, INK, SOFT = (255, 255, 255), (24, 24, 27), (90, 90, 99)


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]],
    columns: Sequence[str],
    *,
    scale: int = 2,
    title: str = "",
) -> Image.Image:
    """A sheet with one labelled row of pictures per model and a header over every column.

    Pictures are uint8 [h, w, 3], all of one size, enlarged `scale` times. Headers and labels wrap; nothing is cut off.
    Raises OverpaintError when there is no picture, a row has not one picture per column, or the sizes differ.
    """
    height, width = _size(rows, columns)
    height, width = height * scale, width * scale
    heads = [_wrap(text, _font(15), width) for text in columns]
    labels = [_wrap(label, _font(17), LABEL_LIMIT) for label, _ in rows]
    left = MARGIN + _widest(labels, _font(17)) + PADDING
    right = left + len(columns) * (width + GAP) - GAP + MARGIN
    banner = _wrap(title, _font(22), right - 2 * MARGIN) if title else []
    head_bottom = MARGIN + len(banner) * _line(22) + (PADDING if banner else 0)
    head_bottom += max(len(lines) for lines in heads) * _line(15)
    top = head_bottom + GAP
    sheet = Image.new("RGB", (right, top + len(rows) * (height + GAP) - GAP + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, banner, MARGIN, MARGIN, 22, INK)
    for j, lines in enumerate(heads):
        x = left + j * (width + GAP) + width // 2
        _write(pen, lines, x, head_bottom - len(lines) * _line(15), 15, SOFT, anchor="ma")
    for i, (_, pictures) in enumerate(rows):
        y = top + i * (height + GAP)
        _write(pen, labels[i], left - PADDING, y + (height - len(labels[i]) * _line(17)) // 2, 17, INK, anchor="ra")
        for j, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + j * (width + GAP), y))
    return sheet


def _size(rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], columns: Sequence[str]) -> tuple[int, int]:
    """Height and width that all pictures share."""
    if not rows or not columns:
        raise OverpaintError("a grid needs at least one row and one column of pictures")
    for label, pictures in rows:
        if len(pictures) != len(columns):
            raise OverpaintError(f"row {label!r} has {len(pictures)} pictures for {len(columns)} columns")
    sizes = {picture.shape for _, pictures in rows for picture in pictures}
    if len(sizes) != 1 or len(next(iter(sizes))) != 3:
        raise OverpaintError(f"the pictures of a grid must share one size [h, w, 3]; got {sorted(sizes)}")
    height, width, _ = sizes.pop()
    return height, width


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _line(size: int) -> int:
    """Height of a line of text, in pixels."""
    return round(size * 1.3)


def _widest(texts: Sequence[Sequence[str]], font: Any) -> int:
    return max((round(font.getlength(line) + 0.5) for lines in texts for line in lines), default=0)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider alone is broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _write(
    pen: ImageDraw.ImageDraw,
    lines: Sequence[str],
    x: int,
    y: int,
    size: int,
    ink: tuple[int, int, int],
    anchor: str = "la",
) -> None:
    """Lines of text downwards from (x, y), which is the anchor of the first."""
    for i, line in enumerate(lines):
        pen.text((x, y + i * _line(size)), line, fill=ink, font=_font(size), anchor=anchor)


MARKERS = "osD^vP"


def save_figures(page: Path, sections: Sequence[Section]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The heat maps and charts of a page that have a file, as PNG beside it; and a sentence where they cannot be drawn."""
    files: list[Path] = []
    try:
        for heat in (heat for section in sections for heat in section.heats if heat.file):
            files.append(page.with_name(f"{page.stem}-{heat.file}.png"))
            heat_map(files[-1], heat)
        for chart in (chart for section in sections for chart in section.charts if chart.file):
            files.append(page.with_name(f"{page.stem}-{chart.file}.png"))
            line_chart(files[-1], chart)
    except OverpaintError as error:
        return tuple(files[:-1]), (f"no PNG figures: {error}",)
    return tuple(files), ()


def heat_map(path: Path, heat: HeatMap) -> None:
    """Save a heat map; numbers above 1 are coloured as 1.

    Raises AlreadyExists when the file is there, OverpaintError when matplotlib is missing or the file cannot be written.
    """
    axes = _axes(path, 2.5 + 0.45 * len(heat.columns), 1.8 + 0.4 * len(heat.rows))
    values = np.array([[np.nan if value is None else value for value in row] for row in heat.values], np.float64)
    shown = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(heat.columns)), heat.columns, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(heat.rows)), heat.rows)
    axes.set_xlabel("concept")
    axes.set_ylabel(heat.corner)
    axes.set_title(heat.caption, loc="left")
    if values.size <= 400:
        for i, j in np.ndindex(*values.shape):
            if np.isfinite(values[i, j]):
                ink = "black" if values[i, j] > 0.6 else "white"
                axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=ink, fontsize=7)
    axes.figure.colorbar(shown, ax=axes)
    _save(axes.figure, path)


def line_chart(path: Path, chart: Chart) -> None:
    """Save a chart of lines with their whiskers; x is spaced evenly, y goes from 0 to 1.

    Raises AlreadyExists when the file is there, OverpaintError when matplotlib is missing or the file cannot be written.
    """
    axes = _axes(path, 7, 4)
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
    _save(axes.figure, path)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OverpaintError(f"cannot write {path} ({error.strerror}); choose a place you may write to") from error


def _axes(path: Path, width: float, height: float) -> Any:
    """An empty figure for a new file, in inches."""
    if path.exists():
        raise AlreadyExists(f"{path} is already there; name another file")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OverpaintError("figures need matplotlib: pip install 'overpaint[figures]'") from error
    return Figure(figsize=(width, height), layout="constrained").subplots()
