"""What is particular to a registry on a PostgreSQL server: its URL, its sessions, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry import Registry, database, schema
from overpaint.registry.database import database_at
from overpaint.registry.schema import connect

from .contents import add_patch, stock
from .postgres_server import GUEST, PASSWORD, Server


@pytest.fixture
def url(server: Server, empty_database: str, folder: Path) -> str:
    """An empty database."""
    server.run("DROP SCHEMA public CASCADE; CREATE SCHEMA public", database=empty_database)
    return server.url(empty_database, folder)


def test_rows_are_in_the_database_and_blobs_in_the_folder(url: str, folder: Path) -> None:
    registry = stock(Registry.open(url))
    patch = add_patch(registry, "one")
    assert registry.folder == folder
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [patch.blob]
    again = Registry.open(url, create=False)
    assert again.patches() == [patch]
    assert again.blob(patch) == b"one"


def test_an_empty_database_is_refused_with_the_command_to_run(url: str, folder: Path) -> None:
    with pytest.raises(NotFound, match=r"no registry at postgresql://.*; run `overpaint init`"):
        Registry.open(url, create=False)
    assert not folder.exists()


def test_a_foreign_database_is_refused_and_left_as_it_was(server: Server, empty_database: str, url: str) -> None:
    for table in ("bookmarks", "alembic_version"):
        server.run(f"CREATE TABLE {table} (version_num TEXT)", database=empty_database)
        with pytest.raises(OverpaintError, match="not an Overpaint registry"):
            Registry.open(url)
    server.run("SELECT version_num FROM bookmarks", database=empty_database)


@pytest.mark.parametrize(
    ("spoiled", "sentence"),
    [
        ("postgresql://me:{password}@/db", "blobs=/shared/folder"),
        ("postgresql://me:{password}@/db?blobs=", "blobs=/shared/folder"),
        ("postgresql://me:{password}@/db?blobs=/a&blobs=/b", "blobs=/shared/folder"),
        ("postgresql://me:{password}@host?blobs=/a", "blobs=/shared/folder"),
        ("postgresql://me:{password}@host:port/db?blobs=/a", "cannot be read"),
        ("postgresql://me:{password}@localhost:1/db?blobs=/tmp/x", "cannot reach postgresql://me:.*@localhost:1/db"),
    ],
)
def test_a_url_that_leads_nowhere_is_explained_without_its_password(spoiled: str, sentence: str) -> None:
    with pytest.raises(OverpaintError, match=sentence) as caught:
        Registry.open(spoiled.format(password="geheim"))
    assert "geheim" not in str(caught.value)


def test_a_refused_login_is_reported(server: Server, empty_database: str, folder: Path) -> None:
    with pytest.raises(OverpaintError, match="does not let this user into") as caught:
        Registry.open(server.url(empty_database, folder, user=GUEST, password="wrong & geheim"))
    assert "geheim" not in str(caught.value)
    with pytest.raises(NotFound):
        Registry.open(server.url(empty_database, folder, user=GUEST, password=PASSWORD), create=False)


def test_a_database_that_is_not_there_is_named(server: Server, folder: Path) -> None:
    with pytest.raises(OverpaintError, match=r"there is no database postgresql://.*nowhere.*createdb"):
        Registry.open(server.url("nowhere", folder))


def test_a_read_only_user_gets_a_clear_refusal(server: Server, stocked_database: str, folder: Path) -> None:
    grant = f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {GUEST}"
    server.run(grant, database=stocked_database)
    registry = Registry.open(server.url(stocked_database, folder, user=GUEST, password=PASSWORD), create=False)
    assert registry.bases() == Registry.open(server.url(stocked_database, folder)).bases()
    with pytest.raises(OverpaintError, match="read-only for this user"):
        registry.add_base("x", Path("/x"), "sd1", "0")


def test_a_database_that_cannot_hold_every_name_is_refused(server: Server, folder: Path) -> None:
    name = server.create("ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(OverpaintError, match=r"keeps text as LATIN1.*createdb --encoding UTF8"):
        Registry.open(server.url(name, folder))
    assert schema.current(database_at(server.url(name, folder))) is None


def test_without_the_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("psycopg")
    monkeypatch.setattr(database, "find_spec", lambda name: None)
    with pytest.raises(OverpaintError, match=r"pip install 'overpaint\[postgres\]'"):
        Registry.open("postgresql:///db?blobs=/x")


def test_a_reader_sees_one_moment(url: str) -> None:
    registry = stock(Registry.open(url))
    with connect(url, create=False).reading() as session:
        count = text("SELECT count(*) FROM patch")
        before = session.scalar(count)
        add_patch(registry, "one")
        assert session.scalar(count) == before == 0


def test_a_writer_waits_for_another_and_does_not_wait_for_ever(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = stock(Registry.open(url))
    monkeypatch.setattr(database, "BEGIN_WRITING", database.BEGIN_WRITING.replace("20s", "200ms"))
    with connect(url, create=False).writing(), pytest.raises(OverpaintError, match="another process has been writing"):
        registry.create_recipe("r", "small")
    monkeypatch.undo()
    with connect(url, create=False).writing():
        waiting = threading.Thread(target=registry.create_recipe, args=("r", "small"))
        waiting.start()
        waiting.join(0.2)
        assert registry.recipes() == []
    waiting.join()
    assert [recipe.name for recipe in registry.recipes()] == ["r"]


def test_a_commit_is_confirmed_when_it_is_durable_whatever_the_server_is_used_to(
    server: Server, empty_database: str, url: str
) -> None:
    Registry.open(url)
    server.run(f"ALTER DATABASE {empty_database} SET synchronous_commit = off")
    with connect(url, create=False).writing() as session:
        assert session.scalar(text("SHOW synchronous_commit")) == "on"
    server.run(f"ALTER DATABASE {empty_database} RESET synchronous_commit")


def test_a_server_that_goes_away_is_one_sentence(server: Server, empty_database: str, url: str) -> None:
    Registry.open(url)
    kill = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{empty_database}'"

    def write() -> None:
        with connect(url, create=False).writing() as session:
            server.run(kill)
            session.scalar(text("SELECT 1"))

    with pytest.raises(OverpaintError, match="cannot reach"):
        write()
