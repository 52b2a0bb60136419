"""A registry with the tiny base in it, and the counting solver among the others."""

from __future__ import annotations

from pathlib import Path

import pytest

import overpaint
from overpaint.solvers import SOLVERS
from overpaint.workspace.workspace import Workspace

from . import fakes


@pytest.fixture
def workspace(tmp_path: Path, base_folder: Path, counting: None) -> Workspace:
    workspace = overpaint.open(tmp_path / "registry")
    workspace.add_base("tiny", base_folder)
    return workspace


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "counting", "tests.workspace.solving.fakes:Counting")
    fakes.reset()
