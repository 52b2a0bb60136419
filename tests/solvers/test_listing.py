"""Solvers by name: the package's own first, strangers' beside them, and no stranger breaks anything."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from overpaint import solvers as solvers_module
from overpaint.cli import main
from overpaint.core.errors import NotFound
from overpaint.solvers import SOLVERS, BrokenSolver, is_closed_form, solver_class, solvers
from overpaint.solvers.problem import Solver


@dataclass(frozen=True)
class Point:
    """An entry point of an installed package."""

    name: str
    value: str
    package: str

    @property
    def dist(self) -> Any:
        return SimpleNamespace(name=self.package)


GOOD = """
from dataclasses import dataclass
from overpaint.solvers.problem import EditProblem, Solution, Solver

@dataclass(frozen=True)
class Good(Solver):
    \"\"\"Does nothing well.

    And says more below.
    \"\"\"

    def solve(self, problem: EditProblem) -> Solution:
        raise NotImplementedError
"""


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Modules of other packages, and their entry points: tests add to the list."""
    (tmp_path / "stranger_good.py").write_text(GOOD)
    (tmp_path / "stranger_broken.py").write_text("import no_such_module_anywhere\nclass Broken: 'Looks fine.'\n")
    (tmp_path / "stranger_torn.py").write_text("class Torn(:\n")
    (tmp_path / "stranger_other.py").write_text("class Other: 'Is no solver.'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    points: list[Point] = []
    monkeypatch.setattr(solvers_module, "entry_points", lambda group: points if group == "overpaint.solvers" else [])
    return points


def test_every_own_solver_is_listed_with_its_first_line_and_loads() -> None:
    found, _ = solvers()
    for name in SOLVERS:
        assert found[name].about
        solver = solver_class(name)
        assert issubclass(solver, Solver)
        assert (solver.__doc__ or "").startswith(found[name].about)


def test_a_strangers_solver_is_listed_and_found(strangers: list[Point]) -> None:
    strangers.append(Point("good", "stranger_good:Good", "friendly"))
    found, refused = solvers()
    assert (found["good"].about, found["good"].package, refused) == ("Does nothing well.", "friendly", [])
    assert "stranger_good" not in sys.modules
    assert solver_class("good").__name__ == "Good"


def test_a_name_of_this_package_cannot_be_taken(strangers: list[Point]) -> None:
    strangers.append(Point("uce", "stranger_good:Good", "greedy"))
    found, refused = solvers()
    assert found["uce"].package == "overpaint"
    assert refused == ["greedy: the name 'uce' is overpaint's own solver; the package must choose another"]
    assert solver_class("uce").__name__ == "UCE"


def test_a_name_that_two_packages_claim_is_given_to_neither(strangers: list[Point]) -> None:
    strangers += [Point("twice", "stranger_good:Good", "one"), Point("twice", "stranger_other:Other", "two")]
    found, _ = solvers()
    assert "twice" not in found
    with pytest.raises(NotFound, match="one, two: all of them call a solver 'twice'"):
        solver_class("twice")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("stranger_broken:Broken", "no_such_module_anywhere"),
        ("stranger_torn:Torn", "SyntaxError"),
        ("stranger_absent:Absent", "stranger_absent"),
        ("stranger_other:Other", "no overpaint.solvers.problem.Solver"),
        ("stranger_other:Absent", "Absent"),
    ],
)
def test_a_broken_package_is_named_and_breaks_nothing_else(strangers: list[Point], target: str, message: str) -> None:
    strangers += [Point("bad", target, "careless"), Point("good", "stranger_good:Good", "friendly")]
    with pytest.raises(BrokenSolver, match=f"'bad' of the package careless cannot be used.*{message}"):
        solver_class("bad")
    assert solver_class("good").__name__ == "Good"
    listed = CliRunner().invoke(main, ["solvers", "--json"])
    assert listed.exit_code == 0
    assert {"good", *SOLVERS} <= {row["name"] for row in json.loads(listed.stdout)}


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(NotFound, match="did you mean 'separable'"):
        solver_class("seperable")
    answer = CliRunner().invoke(main, ["solvers", "seperable"])
    assert answer.exit_code == 1
    assert "did you mean 'separable'" in answer.stderr


def test_settings_presets_and_ranges_are_shown() -> None:
    shown = CliRunner().invoke(main, ["solvers", "uce", "--json"])
    rows = {row["setting"]: row for row in json.loads(shown.stdout)}
    assert rows["positions"]["range"] == "one of last, all"
    assert (rows["ridge"]["default"], rows["ridge"]["preset emoji"], rows["ridge"]["range"]) == (
        0.5,
        0.01,
        "at least 0",
    )
    assert all(row["what it is"] for row in rows.values())


def test_listing_solvers_needs_no_pytorch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from overpaint.cli import main; "
        "assert CliRunner().invoke(main, ['solvers']).exit_code == 0; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_whether_an_own_solver_is_closed_form_is_known_without_reading_other_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(solvers_module, "entry_points", lambda group: pytest.fail("other packages were read"))
    assert (is_closed_form("separable"), is_closed_form("esd")) == (True, False)


def test_whether_another_package_s_solver_is_closed_form_is_read_from_its_class(strangers: list[Point]) -> None:
    strangers.append(Point("good", "stranger_good:Good", "stranger"))
    assert not is_closed_form("good")
    assert not is_closed_form("gone")
