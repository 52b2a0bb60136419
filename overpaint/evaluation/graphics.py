"""Pictures of numbers inside a report's page: heat maps that are tables, and line charts that are SVG.

Both are text: they follow the page's light and dark colours, print, scale, and say their numbers to a screen reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from overpaint.errors import OverpaintError

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
        yield f'<tr><th scope="row">{escape(name)}</th>{"".join(_cell(value) for value in row)}</tr>'
    yield "</tbody></table></div>"


def _cell(value: float | None) -> str:
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
