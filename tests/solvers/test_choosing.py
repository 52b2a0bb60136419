"""The page about choosing a solver names what there is, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.choosing_page import BEGIN, END, filled
from overpaint.bases.layout import layouts
from overpaint.cli import main
from overpaint.core.errors import OverpaintError
from overpaint.solvers import SOLVERS, solver_class
from overpaint.solvers.problem import configure

PAGE = (Path(__file__).parents[2] / "docs" / "choosing-a-solver.md").read_text("utf-8")


def test_every_solver_is_named_in_the_advice() -> None:
    advice = PAGE.partition(BEGIN)[0] + PAGE.partition(END)[2]
    assert {name for name in SOLVERS if f"`{name}`" not in advice} == set()


@pytest.mark.parametrize(
    ("solver", "value"),
    [("esd", "variant=u"), ("surgical", "part=unet"), ("sepme", "joint=true"), ("few_shot", "until=0")],
)
def test_the_settings_that_it_recommends_exist(solver: str, value: str) -> None:
    name, _, chosen = value.partition("=")
    assert value in PAGE
    configure(solver_class(solver), {name: chosen})


def test_the_table_of_bases_says_what_the_solvers_declare() -> None:
    table = PAGE.partition("## Which solver serves which base")[2].partition("## ")[0]
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line
    )
    named = [match[1] for cell in header[1:-1] if (match := re.match("`(.*?)`", cell))]
    others = [layout for layout in layouts() if layout.name not in named]
    assert {re.findall("`(.*?)`", row[0])[0] for row in rows} == set(SOLVERS)
    for first, *cells in rows:
        name, *settings = re.findall("`(.*?)`", first)
        solver = configure(solver_class(name), dict(each.split("=") for each in settings))
        served = {layout.name: solver.supports(layout) is None for layout in layouts()}
        assert [cell == "yes" for cell in cells[:-1]] == [served[layout] for layout in named]
        assert {served[layout.name] for layout in others} == {cells[-1] == "yes"}


def test_the_commands_that_it_shows_exist() -> None:
    shown = re.findall(r"^overpaint (.*?)(?:  #.*)?$", PAGE, re.MULTILINE)
    assert len(shown) == 4
    for line in shown:
        words = line.split()
        helped = CliRunner().invoke(main, [words[0], "--help"])
        assert helped.exit_code == 0
        assert all(word in helped.output for word in words if word.startswith("--"))


def test_the_measured_table_is_put_between_its_marks_and_nowhere_else() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert filled(page, r"new \1") == f"before\n{BEGIN}\n\nnew \\1\n\n{END}\nafter"
    assert filled(filled(page, "a"), "b") == filled(page, "b")
    with pytest.raises(OverpaintError, match="needs one line"):
        filled("nothing", "new")
