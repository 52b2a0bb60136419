"""The tour of the code is true: its picture is that of the imports, its steps are functions that are there."""

from __future__ import annotations

import ast
import re

from tests.docs.pages import ROOT
from tools.house import picture

PAGE = (ROOT / "docs" / "contributing" / "architecture.md").read_text("utf-8")


def test_the_picture_is_that_of_the_imports() -> None:
    drawn = picture.svg(picture.rooms())
    assert picture.PICTURE.read_text("utf-8") == drawn, "a room or an arrow is new: python -m tools.house.picture"


def test_the_picture_leaves_out_only_what_follows() -> None:
    def reached(arrows: dict[str, set[str]], name: str) -> set[str]:
        return arrows[name].union(*(reached(arrows, each) for each in arrows[name]))

    rooms = picture.rooms()
    fewer = picture.direct(rooms)
    assert {name: reached(fewer, name) for name in rooms} == {name: reached(rooms, name) for name in rooms}
    assert sum(map(len, fewer.values())) < sum(map(len, rooms.values()))


def test_every_room_is_explained() -> None:
    table = PAGE.partition("| room |")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == picture.rooms().keys() - {"overpaint", "cli"}


def test_every_step_names_a_function_of_its_file() -> None:
    steps = re.findall(r"^\d+\. `([\w/]+\.py)`, `(\w+)`", PAGE, re.MULTILINE)
    assert len(steps) == 10
    for path, function in steps:
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in defined, (path, function)
