"""A registry that many tests start from, solved once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import overpaint
from overpaint.workspace.workspace import Workspace


@pytest.fixture(scope="session")
def solved(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A registry with the tiny base and patches of three things. Tests work on copies."""
    workspace = overpaint.open(tmp_path_factory.mktemp("solved"))
    workspace.add_base("tiny", base_folder)
    for thing in ("cat", "dog", "fox"):
        workspace.solve(thing, base="tiny")
    return workspace.registry.folder


@pytest.fixture
def workspace(tmp_path: Path, solved: Path) -> Workspace:
    """A copy of that registry for each test."""
    return overpaint.open(shutil.copytree(solved, tmp_path / "registry"))
