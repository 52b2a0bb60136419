"""A report that can be mailed: one HTML file with its pictures inside, no scripts, readable by screen readers.

The same report gives the same bytes: nothing is dated unless the caller's provenance says so.
"""

from __future__ import annotations

import base64
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from overpaint.core.errors import OverpaintError

# Pictures of numbers inside a report's page: heat maps that are tables, and line charts that are SVG.
#
# Both are text: they follow the page's light and dark colours, print, scale, and say their numbers to a screen reader.


WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 12, 44
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")
COLOURS = 6
# A cell is pale, mid or deep; the style sheet writes black or white on each, whichever has a contrast of 4.5 to 1 there.
"""How many line colours the style sheet has."""


@dataclass(frozen=True)
class HeatMap:
    """A matrix of numbers from 0 to 1, row by row; None is an empty cell, larger numbers are coloured as 1.

    Raises OverpaintError when a row has not one cell per column.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    caption: str
    corner: str = ""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise OverpaintError(
                f"the heat map {self.caption!r} has rows that do not fit its {len(self.columns)} columns"
            )


@dataclass(frozen=True)
class Line:
    """One line of a chart: a name and its points (x, y, low, high), y from 0 to 1."""

    name: str
    points: tuple[tuple[float, float, float | None, float | None], ...]


@dataclass(frozen=True)
class Chart:
    """Lines over x, whose values are spaced evenly; y goes from 0 to 1."""

    lines: tuple[Line, ...]
    caption: str
    x_label: str
    y_label: str


def heat_map(found: HeatMap) -> Iterator[str]:
    """The matrix as a table whose cells are coloured by their number."""
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(found.caption)}"><table class="heat">'
    yield f"<caption>{escape(found.caption)}</caption>"
    heads = "".join(f'<th scope="col"><span>{escape(column)}</span></th>' for column in found.columns)
    yield f"<thead><tr><td>{escape(found.corner)}</td>{heads}</tr></thead><tbody>"
    for name, row in zip(found.rows, found.values, strict=True):
        yield f'<tr><th scope="row">{escape(name)}</th>{"".join(_heat_map_cell(value) for value in row)}</tr>'
    yield "</tbody></table></div>"


def _heat_map_cell(value: float | None) -> str:
    if value is None:
        return "<td></td>"
    depth = round(100 * min(1.0, max(0.0, value)))
    shade = "pale" if depth < 58 else "mid" if depth < 88 else "deep"
    return f'<td class="{shade}" style="--depth:{depth}%">{value:.2f}</td>'


def line_chart(chart: Chart) -> Iterator[str]:
    """The chart as a figure: an SVG, and a legend in words and strokes."""
    ticks = sorted({x for line in chart.lines for x, *_ in line.points})
    if not ticks:
        raise OverpaintError(f"the chart {chart.caption!r} has no points")
    place = {x: LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / len(ticks) for i, x in enumerate(ticks)}
    yield f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_said(chart))}">'
    yield from _axes(chart, ticks, place)
    for number, line in enumerate(chart.lines):
        yield from _drawn(line, number, place)
    yield "</svg>"
    yield f"<figcaption>{escape(chart.caption)}<ul>"
    for number, line in enumerate(chart.lines):
        stroke = _stroke(number)
        yield f'<li><svg viewBox="0 0 40 10" aria-hidden="true"><path d="M1 5H39"{stroke}/></svg>{escape(line.name)}</li>'
    yield "</ul></figcaption></figure>"


def _axes(chart: Chart, ticks: Sequence[float], place: dict[float, float]) -> Iterator[str]:
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _height(share)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:g}</text>'
    for x in ticks:
        yield f'<text x="{place[x]:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x_label)}</text>'
    yield f'<text x="14" y="{TOP + 4}" class="label">{escape(chart.y_label)}</text>'


def _drawn(line: Line, number: int, place: dict[float, float]) -> Iterator[str]:
    """The doubt as whiskers, the line over them, and a dot at every point."""
    for x, _, low, high in line.points:
        if low is not None and high is not None:
            yield f'<path class="whisker line{number % COLOURS}" d="M{place[x]:.1f} {_height(low):.1f}V{_height(high):.1f}"/>'
    points = " ".join(f"{place[x]:.1f},{_height(y):.1f}" for x, y, *_ in sorted(line.points))
    yield f'<polyline points="{points}"{_stroke(number)}/>'
    for x, y, *_ in line.points:
        yield f'<circle class="line{number % COLOURS}" cx="{place[x]:.1f}" cy="{_height(y):.1f}" r="3.5"/>'


def _stroke(number: int) -> str:
    dash = DASHES[number % len(DASHES)]
    return f' class="line{number % COLOURS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _height(share: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(1.0, max(0.0, share)))


def _said(chart: Chart) -> str:
    """The chart in words."""
    lines = (f"{line.name}: " + ", ".join(f"{y:.2f} at {x:g}" for x, y, *_ in line.points) for line in chart.lines)
    return f"{chart.caption} {chart.y_label} over {chart.x_label}. {'; '.join(lines)}"


NUMBER = re.compile(r"[-+±~<>≤≥]?\s*[\d.,]+\s?(%|[kKMG]i?B|s|ms)?( \(.*\))?|—|")


@dataclass(frozen=True)
class Picture:
    """Pixels, uint8 [h, w, 3], and what a reader who cannot see them should be told."""

    pixels: NDArray[np.uint8]
    alt: str


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


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (a blank line parts them), and optionally a table and rows of pictures.

    `columns` heads the picture columns; leave it empty for none. What there is comes in the order of the fields. Raises
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


@dataclass(frozen=True)
class Report:
    """Everything a report says. `provenance` is key and value, `commands` is what to type to get the same again."""

    title: str
    intro: str
    sections: tuple[Section, ...]
    provenance: tuple[tuple[str, str], ...] = ()
    commands: tuple[str, ...] = ()


def write_report(path: Path, report: Report) -> None:
    """Write `report` to `path`, whole or not at all: a temporary file in the same folder, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(render(report))
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a report is for others to read.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def render(report: Report) -> str:
    """The report as an HTML page."""
    style = files(__package__).joinpath("report.css").read_text("utf-8")
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(report.title)}</title>",
        f"<style>\n{style}</style></head>",
        f"<body><main><header><h1>{escape(report.title)}</h1>",
        *_paragraphs(report.intro),
        "</header>",
    ]
    for section in report.sections:
        parts += _section(section)
    parts += [*_provenance(report.provenance), *_commands(report.commands), "</main></body></html>", ""]
    return "\n".join(parts)


def _section(section: Section) -> Iterable[str]:
    yield f"<section><h2>{escape(section.heading)}</h2>"
    yield from _paragraphs(section.text)
    if section.table is not None:
        yield from _table(section.table, section.heading)
    if section.pictures:
        yield from _pictures(section)
    for chart in section.charts:
        yield from line_chart(chart)
    for heat in section.heats:
        yield from heat_map(heat)
    for table in section.more:
        yield from _table(table, section.heading)
    yield "</section>"


def _paragraphs(text: str) -> Iterable[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if paragraph:
            yield f"<p>{escape(paragraph)}</p>"


def _table(table: Table, heading: str) -> Iterable[str]:
    # A column lines up on the right when all of it is numbers, its heading included.
    right = [all(NUMBER.fullmatch(row[j]) for row in table.rows) for j in range(len(table.columns))]
    marks = [' class="n"' if found and j else "" for j, found in enumerate(right)]
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(heading)}, table"><table>'
    if table.caption:
        yield f"<caption>{escape(table.caption)}</caption>"
    heads = (f'<th scope="col"{mark}>{escape(c)}</th>' for c, mark in zip(table.columns, marks, strict=True))
    yield f"<thead><tr>{''.join(heads)}</tr></thead><tbody>"
    for first, *rest in table.rows:
        cells = "".join(f"<td{mark}>{_table_cell(cell, mark)}</td>" for cell, mark in zip(rest, marks[1:], strict=True))
        yield f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _table_cell(text: str, mark: str) -> str:
    """The text of a cell; in a column of numbers, what stands in brackets comes under its number."""
    value, bracket, doubt = text.partition(" (")
    return f"{escape(value)}<small> ({escape(doubt)}</small>" if mark and bracket else escape(text)


def _pictures(section: Section) -> Iterable[str]:
    label = f"{escape(section.heading)}, pictures"
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="pictures">'
    if section.columns:
        heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in section.columns)
        yield f"<thead><tr><td></td>{heads}</tr></thead>"
    yield "<tbody>"
    for row in section.pictures:
        cells = "".join(f"<td>{_image(picture)}</td>" for picture in row.pictures)
        yield f'<tr><th scope="row">{escape(row.label)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _image(picture: Picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture.pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    height, width = picture.pixels.shape[:2]
    return f'<img alt="{escape(picture.alt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'


def _provenance(pairs: Iterable[tuple[str, str]]) -> Iterable[str]:
    if rows := [f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in pairs]:
        yield from ("<section><h2>Provenance</h2><dl>", *rows, "</dl></section>")


def _commands(commands: Iterable[str]) -> Iterable[str]:
    if lines := [escape(command) for command in commands]:
        body = "\n".join(lines)
        yield f'<section><h2>How to reproduce</h2><pre tabindex="0"><code>{body}</code></pre></section>'
