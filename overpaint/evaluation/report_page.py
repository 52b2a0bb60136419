"""A report that can be mailed: one HTML file with its pictures inside, no scripts, readable by screen readers; and PNG figures.

Suites, and what reports on a recipe, make a `Section` for each question, with tables of `Numbers`. The page is
`templates/report.html.j2`, which escapes whatever it shows. Heat maps are tables and charts are SVG, so that they follow the
page's light and dark colours, print, scale, and give their numbers to a screen reader. The same report gives the same bytes:
nothing is dated unless the caller's provenance says so.

As PNG files there are sheets of pictures (`labelled_grid`), and the page's heat maps and charts, drawn by matplotlib (the extra
`overpaint[figures]`).
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from overpaint.core.atomic import write_over
from overpaint.core.errors import AlreadyExists, OverpaintError
from overpaint.evaluation.metrics import Measurement, plain_words

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 12, 44
"""The margins of a chart, in its own units."""
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")
MARKDOWN = frozenset("\\`*_[]<>|&#~!$\"'")
"""What Markdown, or HTML within it, takes for markup."""
COLOURS = 6
"""How many line colours the style sheet has."""
SHARES = re.compile(r"accuracy|share|UA|IRA|CRA|retention|probability|H_[co]")
"""Metrics that are shares and read best in percent."""
NUMBER = re.compile(r"[-+±~<>≤≥]?\s*[\d.,]+\s?(%|[kKMG]i?B|s|ms)?( \(.*\))?|—|")


@dataclass(frozen=True)
class HeatMap:
    """A matrix of numbers from 0 to 1, row by row; None is an empty cell, larger numbers are coloured as 1.

    `file` is how the name of its PNG beside the page ends; empty: it has none. Raises OverpaintError when a row has not one
    cell per column.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    caption: str
    corner: str = ""
    file: str = ""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise OverpaintError(
                f"the heat map {self.caption!r} has rows that do not fit its {len(self.columns)} columns"
            )

    def depth(self, value: float) -> int:
        """How deep a cell's colour is, 0 to 100; the style sheet writes black or white on it, whichever reads better."""
        return round(100 * min(1.0, max(0.0, value)))


@dataclass(frozen=True)
class Line:
    """One line of a chart: a name and its points (x, y, low, high), y from 0 to 1."""

    name: str
    points: tuple[tuple[float, float, float | None, float | None], ...]


@dataclass(frozen=True)
class Chart:
    """Lines over x, whose values are spaced evenly; y goes from 0 to 1. `file` as of a `HeatMap`."""

    lines: tuple[Line, ...]
    caption: str
    x_label: str
    y_label: str
    file: str = ""

    def __post_init__(self) -> None:
        if not any(line.points for line in self.lines):
            raise OverpaintError(f"the chart {self.caption!r} has no points")

    @property
    def in_words(self) -> str:
        lines = (f"{line.name}: " + ", ".join(f"{y:.2f} at {x:g}" for x, y, *_ in line.points) for line in self.lines)
        return f"{self.caption} {self.y_label} over {self.x_label}. {'; '.join(lines)}"

    @property
    def drawn(self) -> DrawnChart:
        return DrawnChart(self)


@dataclass(frozen=True)
class DrawnLine:
    """A line in a chart's own units, with the class of its colour and its dashes."""

    name: str
    colour: str
    dash: str
    points: list[tuple[float, float]]
    whiskers: list[tuple[float, float, float]]


class DrawnChart:
    """Where everything in a chart is, in its own units, y downwards."""

    width, height, left, right, bottom = WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        xs = sorted({x for line in chart.lines for x, *_ in line.points})
        self._place = {x: round(LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / len(xs), 1) for i, x in enumerate(xs)}
        self.ticks = [(f"{x:g}", place) for x, place in self._place.items()]
        self.levels = [(f"{share:g}", _height(share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
        self.lines = [self._line(number, line) for number, line in enumerate(chart.lines)]

    def _line(self, number: int, line: Line) -> DrawnLine:
        points = [(self._place[x], _height(y)) for x, y, *_ in sorted(line.points)]
        whiskers = [
            (self._place[x], _height(low), _height(high))
            for x, _, low, high in line.points
            if low is not None and high is not None
        ]
        return DrawnLine(line.name, f"line{number % COLOURS}", DASHES[number % len(DASHES)], points, whiskers)


def _height(share: float) -> float:
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(1.0, max(0.0, share))), 1)


@dataclass(frozen=True)
class Picture:
    """Pixels, uint8 [h, w, 3], and a description for readers who cannot see them."""

    pixels: NDArray[np.uint8]
    alt: str

    @property
    def source(self) -> str:
        """The picture as a data URL of a PNG file."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


@dataclass(frozen=True)
class PictureRow:
    """A labelled row of pictures."""

    label: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Table:
    """A table: the first column names the row. Raises OverpaintError when a row's length differs from the header's."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise OverpaintError(
                    f"a row of the table {self.caption!r} has {len(row)} cells for {len(self.columns)} columns"
                )

    @property
    def numeric_columns(self) -> list[bool]:
        """Which columns behind the first hold numbers alone, and line up on the right with their heading."""
        columns = range(len(self.columns))
        return [j > 0 and all(NUMBER.fullmatch(row[j]) for row in self.rows) for j in columns]


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (a blank line parts them), and optionally a table and rows of pictures.

    `columns` heads the picture columns; leave it empty for none. It is shown in the order of the fields. Raises
    OverpaintError when a row of pictures does not fit `columns`.
    """

    heading: str
    text: str = ""
    table: Table | None = None
    columns: tuple[str, ...] = ()
    pictures: tuple[PictureRow, ...] = ()
    charts: tuple[Chart, ...] = ()
    heats: tuple[HeatMap, ...] = ()
    more: tuple[Table, ...] = ()

    def __post_init__(self) -> None:
        for row in self.pictures:
            if self.columns and len(row.pictures) != len(self.columns):
                raise OverpaintError(
                    f"row {row.label!r} has {len(row.pictures)} pictures for {len(self.columns)} columns"
                )


class Numbers:
    """The measurements of one suite, by subject and metric."""

    def __init__(self, measurements: Sequence[Measurement]) -> None:
        self.measurements = tuple(measurements)
        self._by_name = {(each.subject, each.metric): each for each in measurements}

    def get(self, subject: str, metric: str) -> Measurement | None:
        """What was measured of a subject by a metric, if it was."""
        return self._by_name.get((subject, metric))

    def value(self, subject: str, metric: str) -> float | None:
        """The same, its value alone."""
        measurement = self.get(subject, metric)
        return None if measurement is None else measurement.value

    def subjects(self, beginning: str = "") -> list[str]:
        """The subjects that begin so, in the order in which they were measured."""
        return list(dict.fromkeys(each.subject for each in self.measurements if each.subject.startswith(beginning)))

    def metrics(self, *without: str) -> list[str]:
        """The metrics, but for some, in the order in which they were measured."""
        return list(dict.fromkeys(each.metric for each in self.measurements if each.metric not in without))

    def table(self, subjects: Sequence[str], metrics: Sequence[str], caption: str, *, strip: str = "") -> Table:
        """One row for each subject, one column for each metric; what was not measured is a dash."""
        rows = tuple(
            (plain_words(subject).removeprefix(strip), *(as_text(self.get(subject, metric)) for metric in metrics))
            for subject in subjects
        )
        return Table(("", *map(plain_words, metrics)), rows, caption)


def as_text(result: Measurement | None) -> str:
    """A number with its interval and n: in percent where it is a share."""
    if result is None:
        return "—"
    one = percent if SHARES.search(result.metric) else plain
    text = one(result.value)
    if result.low is not None and result.high is not None:
        text += f" ({one(result.low)} to {one(result.high)}, n={result.n})"
    return text


def percent(value: float) -> str:
    """A share with one decimal."""
    return f"{value:.1%}"


def plain(value: float) -> str:
    """Four significant digits; whole numbers as they are."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


@cache
def published(suite: str) -> tuple[Table, ...]:
    """The numbers that papers give for a suite's protocol; nothing where there are none."""
    table = json.loads(files(__package__).joinpath("published.json").read_text("utf-8")).get(suite)
    return (Table(tuple(table["columns"]), tuple(map(tuple, table["rows"])), table["caption"]),) if table else ()


@dataclass(frozen=True)
class Report:
    """Everything a report says. `provenance` is key and value, `commands` is what to type to get the same again."""

    title: str
    intro: str
    sections: tuple[Section, ...]
    provenance: tuple[tuple[str, str], ...] = ()
    commands: tuple[str, ...] = ()


def write_report(path: Path, report: Report) -> None:
    """Write `report` to `path`, whole or not at all, in place of an earlier one."""
    write_over(path, render(report).encode(), durable=True)


def render(report: Report) -> str:
    """The report as an HTML page."""
    return rendered("report.html.j2", report=report)


def rendered(template: str, **values: object) -> str:
    """A template of `templates/` with these values, each escaped."""
    text: str = templates().get_template(template).render(values)
    return text


@cache
def templates(*packages: str) -> Environment:
    """The templates of some packages, and behind them those of this one, whose macros they may use; what they show is escaped."""
    loader = ChoiceLoader([PackageLoader(package) for package in (*packages, __package__)])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["paragraphs"] = lambda text: [part for part in re.split(r"\n\s*\n", text.strip()) if part]
    environment.filters["markdown"] = _escaped_markdown
    return environment


def _escaped_markdown(text: str) -> Markup:
    """Text for one line or cell of Markdown: entities stand for whatever would be markup, blanks for line breaks."""
    return Markup("".join(f"&#{ord(c)};" if c in MARKDOWN else c for c in " ".join(text.split())))


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
"""Those of a chart's lines, as matplotlib has them, in turn."""


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
