"""A registry in a temporary folder, with a base and a concept in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from overpaint.registry import Registry

from .shelf import stock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture(scope="session")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once and copied for each test, which is much faster than migrating each time."""
    folder = tmp_path_factory.mktemp("stocked")
    stock(Registry.open(folder))
    return folder


@pytest.fixture
def registry(stocked: Path, folder: Path) -> Registry:
    shutil.copytree(stocked, folder)
    return Registry.open(folder, create=False)
