"""A registry in a temporary folder, with a base and a concept in it; and the same on a PostgreSQL server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from overpaint.registry import Registry, models

from .contents import add_patch, stock
from .postgres_server import Server, programs, running

REQUIRED = "OVERPAINT_POSTGRES"
"""Set to "required", a missing server fails the tests that need one instead of skipping them."""


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


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A PostgreSQL server for the whole run."""
    bin = programs()
    if bin is None:
        missing = "PostgreSQL is not installed (on Debian: apt-get install postgresql)"
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    with running(bin) as server:
        yield server


@pytest.fixture(scope="session")
def empty_database(server: Server) -> str:
    """The name of a database for tests that make registries; they get it empty."""
    return server.create()


@pytest.fixture(scope="session")
def stocked_database(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a database with the tables of a registry; tests get it with a base and a concept in it."""
    name = server.create()
    Registry.open(server.url(name, tmp_path_factory.mktemp("blobs")))
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, folder: Path) -> str | Path:
    """Where an empty registry may be made, on each kind of database."""
    if request.param == "sqlite":
        return folder
    server, name = request.getfixturevalue("server"), request.getfixturevalue("empty_database")
    server.run("DROP SCHEMA public CASCADE; CREATE SCHEMA public", database=name)
    return str(server.url(name, folder))


@pytest.fixture(params=["sqlite", "postgresql"])
def anywhere(request: pytest.FixtureRequest, folder: Path) -> str | Path:
    """Where a registry with a base and a concept lies, on each kind of database."""
    if request.param == "sqlite":
        return shutil.copytree(request.getfixturevalue("stocked"), folder)
    server, name = request.getfixturevalue("server"), request.getfixturevalue("stocked_database")
    # A new database for each test would be megabytes to write; emptying tables is milliseconds.
    tables = ", ".join(models.Row.metadata.tables)
    emptied = f"TRUNCATE {tables} RESTART IDENTITY CASCADE"
    server.run(f"{emptied}; UPDATE alembic_version SET version_num = '{models.HEAD}'", database=name)
    url = str(server.url(name, folder))
    stock(Registry.open(url))
    return url


@pytest.fixture
def either(anywhere: str | Path) -> Registry:
    """As `registry`, on each kind of database."""
    return Registry.open(anywhere, create=False)


@pytest.fixture
def patches(registry: Registry) -> list[str]:
    """The ids of three patches, sorted; beside them the recipe "r"."""
    registry.create_recipe("r", "small")
    return sorted(add_patch(registry, label).id for label in ("one", "two", "three"))
