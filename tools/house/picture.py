"""Draw the rooms of the package and the arrows between them, from the imports: `python -m tools.house.picture`.

An arrow that follows from others is left out: a room that imports what the room below imports needs no arrow of its own.
The picture says nothing that changes with every commit, so that it is drawn again when a room or an arrow is new.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import grimp

PACKAGE = "overpaint"
PICTURE = Path(__file__).parents[2] / "docs" / "figures" / "rooms.svg"
BOX, ROW, COLUMN, MARGIN = (138, 34), 66, 190, 20
STYLE = (
    "rect{fill:#e0f2f1;stroke:#00796b;stroke-width:1.5}text{font:15px sans-serif;fill:#12302c;text-anchor:middle}"
    "path{fill:none;stroke:#546e7a;stroke-width:1.5;marker-end:url(#a)}marker path{fill:#546e7a;stroke:none;marker-end:none}"
    "@media(prefers-color-scheme:dark){rect{fill:#12302c;stroke:#4db6ac}text{fill:#e0f2f1}path{stroke:#b0bec5}"
    "marker path{fill:#b0bec5}}"
)


def rooms() -> dict[str, set[str]]:
    """Every room and the rooms it imports, wherever in its modules that is; the package's own `__init__` is `overpaint`."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=False)
    found: dict[str, set[str]] = defaultdict(set)
    for module in graph.modules:
        found[_room(module)] |= {_room(each) for each in graph.find_modules_directly_imported_by(module)} - {
            _room(module)
        }
    # A room that says `from overpaint import core` or `overpaint.open` imports what `overpaint.__init__` hands on.
    for name in found:
        if name not in (PACKAGE, "testing"):
            found[name].discard(PACKAGE)
    return dict(found)


def _room(module: str) -> str:
    if module == f"{PACKAGE}.__main__":  # starts the command line, and belongs to it
        return "cli"
    return module.split(".")[1] if "." in module else PACKAGE


def direct(rooms: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others."""

    def below(name: str) -> set[str]:
        return rooms[name].union(*(below(each) for each in rooms[name]))

    return {name: {t for t in to if not any(t in below(other) for other in to - {t})} for name, to in rooms.items()}


def levels(rooms: Mapping[str, set[str]]) -> dict[str, int]:
    """How high every room stands: right below the lowest that imports it; what nobody imports, right above what it imports."""

    def height(name: str) -> int:
        return max((height(each) + 1 for each in rooms[name]), default=0)

    heights = {name: height(name) for name in rooms}
    imported = set().union(*rooms.values())
    for name in sorted(imported, key=lambda each: (-heights[each], each)):
        heights[name] = min((heights[n] - 1 for n in imported if name in rooms[n]), default=heights[name])
    tops = {name: max(heights[each] + 1 for each in rooms[name]) for name in rooms.keys() - imported}
    return heights | tops


def svg(rooms: Mapping[str, set[str]]) -> str:
    """The picture: one row for each level, the room that stands on the highest one first."""
    heights, places = levels(rooms), {}

    def middle_first(name: str) -> tuple[int, int, str]:
        return -max((heights[each] for each in rooms[name]), default=0), -sum(name in to for to in rooms.values()), name

    for level in set(heights.values()):
        row = sorted((name for name in rooms if heights[name] == level), key=middle_first)
        for column, name in enumerate(row):
            places[name] = (column, level)
    width = 2 * MARGIN + BOX[0] + COLUMN * max(column for column, _ in places.values())
    top = max(heights.values())
    x, y = MARGIN + BOX[0] // 2, MARGIN + BOX[1] // 2
    points = {name: (x + COLUMN * column, y + ROW * (top - level)) for name, (column, level) in places.items()}
    lines = [
        _arrow(points[name], points[to]) for name, all_to in sorted(direct(rooms).items()) for to in sorted(all_to)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {2 * MARGIN + BOX[1] + ROW * top}" width="{width}" '
            f'role="img" aria-label="{described(rooms)}">',
            f"<style>{STYLE}</style>",
            '<marker id="a" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"><path d="M0,0L8,4L0,8z"/></marker>',
            *lines,
            *(_box(name, point) for name, point in sorted(points.items())),
            "</svg>\n",
        ]
    )


def described(rooms: Mapping[str, set[str]]) -> str:
    """The picture in words."""
    arrows = (f"{name} imports {_listed(to)}" for name, to in sorted(direct(rooms).items()) if to)
    return "Rooms of the package. " + "; ".join(arrows)


def _listed(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))


def _box(name: str, point: tuple[int, int]) -> str:
    x, y = point
    rect = f'<rect x="{x - BOX[0] // 2}" y="{y - BOX[1] // 2}" width="{BOX[0]}" height="{BOX[1]}" rx="6"/>'
    return f'{rect}<text x="{x}" y="{y + 5}">{name}</text>'


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """Straight down within a column and between rows beside each other; else down, and into the side of the box."""
    (x, y), (to_x, to_y) = (start[0], start[1] + BOX[1] // 2), end
    if x == to_x:
        return f'<path d="M{x},{y}V{to_y - BOX[1] // 2}"/>'
    side = to_x + (BOX[0] // 2 if x > to_x else -BOX[0] // 2)
    if to_y - start[1] == ROW:
        return f'<path d="M{x},{y}L{to_x + (BOX[0] // 4 if x > to_x else -BOX[0] // 4)},{to_y - BOX[1] // 2}"/>'
    return f'<path d="M{x},{y}V{to_y - 12}Q{x},{to_y} {x + (-12 if x > to_x else 12)},{to_y}H{side}"/>'


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(svg(rooms()), "utf-8")
    print(PICTURE)
