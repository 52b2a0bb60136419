"""The demo as a person meets it: what is left when it is interrupted, what it concludes from few pictures, its threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from overpaint.bases.base import Base
from overpaint.cli import main
from overpaint.commands import common
from overpaint.evaluation.context import Verdicts
from overpaint.evaluation.metrics import UNDECIDED
from overpaint.workspace.demo import Demo, Findings


def test_an_interrupted_demo_says_that_it_cleans_up_and_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(demo: Demo) -> None:
        assert (tmp_path / "demo" / "registry").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(Demo, "solve", interrupted)
    monkeypatch.setattr(common, "choose_threads", lambda base: None)
    done = CliRunner().invoke(main, ["demo", "--quick", "-o", str(tmp_path / "demo")])
    assert done.exit_code == 130
    assert "is removed again; start again with `overpaint demo`" in done.stderr
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    done = CliRunner().invoke(main, ["demo", "-o", str(tmp_path)])
    assert done.exit_code == 1
    assert "is not empty" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "precious"


def verdicts(seen: int, of: int) -> Verdicts:
    """A concept that is seen in some of its pictures, each of a prompt of its own."""
    right = np.array([1.0] * seen + [0.0] * (of - seen))
    return Verdicts(right, right, [f"prompt {number}" for number in range(of)])


def test_few_pictures_settle_nothing_and_fail_nothing() -> None:
    findings = Findings()
    findings.check_erased({"cat": verdicts(0, 10)})
    assert {check.holds for check in findings.checks} == {UNDECIDED}
    assert findings.hold
    findings.check_erased({"cat": verdicts(0, 200), "ink": verdicts(150, 200)})
    assert findings.checks[-1].holds == "no"
    assert not findings.hold
    many = Findings()
    many.check_erased({"cat": verdicts(0, 200)})
    assert {check.holds for check in many.checks} == {"yes"}


def test_a_small_base_is_computed_with_one_thread_unless_the_user_says(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    common.choose_threads(base)
    assert chosen == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    common.choose_threads(base)
    assert chosen == [1]
    monkeypatch.setattr(common, "SMALL_BASE", 1)
    common.choose_threads(base)
    assert chosen == [1]
