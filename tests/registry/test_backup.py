"""A backup is one sound moment of the database; restoring it replaces all rows or none and keeps what was there."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest

from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import Registry, models
from overpaint.registry.database import RegistryVersionError
from overpaint.registry.schema import BadBackup, backup, restore

from .patch_maker import keep, patch_file


@pytest.fixture
def copy(registry: Registry, tmp_path: Path) -> Path:
    """A backup of a registry with one patch; since then, the registry has another, and a concept."""
    keep(registry, patch_file("one"))
    backup(registry.folder, tmp_path / "copy.db")
    keep(registry, patch_file("two"))
    registry.add_concept(Concept("plum"))
    return tmp_path / "copy.db"


def names(registry: Registry) -> list[str]:
    return [concept.name for concept in registry.concepts()]


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_backup_is_one_file_that_may_lie_anywhere(registry: Registry, copy: Path) -> None:
    assert files_in(copy.parent) == {"copy.db", "registry"}
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT count(*) FROM patch").fetchone() == (1,)


def test_restoring_gives_the_rows_of_the_backup_and_keeps_the_others(registry: Registry, copy: Path) -> None:
    done = restore(registry.folder, copy)
    assert names(registry) == ["apple"]
    assert [registry.blob(record) for record in registry.patches()] == [patch_file("one")]
    assert done.revision == models.HEAD
    assert done.kept == registry.folder / "registry.db.before-restore"
    restore(registry.folder, done.kept)
    assert names(registry) == ["apple", "plum"]
    assert "registry.db.before-restore-2" in files_in(registry.folder)


def test_others_may_read_and_write_while_a_backup_is_restored(registry: Registry, copy: Path) -> None:
    stop, seen, failures = threading.Event(), set[tuple[str, ...]](), list[BaseException]()

    def read() -> None:
        try:
            while not stop.is_set():
                seen.add(tuple(names(registry)))
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    with registry._database.reading() as held:  # a reader in the middle of something keeps what it began with
        held.connection()
        restore(registry.folder, copy)
    stop.set()
    reader.join()
    assert failures == []
    assert seen <= {("apple",), ("apple", "plum")}
    registry.add_concept(Concept("pear"))
    assert names(registry) == ["apple", "pear"]


def test_a_registry_can_be_made_from_a_backup(copy: Path, tmp_path: Path) -> None:
    assert restore(tmp_path / "new", copy).kept is None
    assert names(Registry.open(tmp_path / "new", create=False)) == ["apple"]


def test_a_damaged_database_is_moved_aside_with_its_log(registry: Registry, copy: Path) -> None:
    path = registry.folder / "registry.db"
    path.write_bytes(b"no database" * 1000)
    path.with_name("registry.db-wal").write_bytes(b"log")
    done = restore(registry.folder, copy)
    assert names(Registry.open(registry.folder)) == ["apple"]
    assert done.kept is not None
    assert done.kept.read_bytes().startswith(b"no database")
    assert done.kept.with_name(done.kept.name + "-wal").read_bytes() == b"log"


def test_a_damaged_database_goes_back_when_the_backup_cannot_be_written(
    registry: Registry, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*paths: Any) -> NoReturn:
        raise OverpaintError("the disk is full")

    path = registry.folder / "registry.db"
    path.write_bytes(b"no database" * 1000)
    before = files_in(registry.folder)
    monkeypatch.setattr("overpaint.registry.schema.copy_database", fail)
    with pytest.raises(OverpaintError, match="full"):
        restore(registry.folder, copy)
    assert path.read_bytes() == b"no database" * 1000
    assert files_in(registry.folder) == before


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")


def _foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (_truncate, BadBackup, "damaged or no database"),
        (lambda path: path.write_bytes(b"text " * 999), BadBackup, "damaged or no database"),
        (lambda path: path.write_bytes(b""), BadBackup, "empty database"),
        (_newer, RegistryVersionError, "newer than this program"),
        (_foreign, BadBackup, "not a backup of a registry"),
        (lambda path: path.unlink(), NotFound, "there is no file"),
    ],
    ids=["truncated", "text", "empty", "newer", "foreign", "gone"],
)
def test_what_is_no_backup_changes_nothing(
    registry: Registry, copy: Path, spoil: Callable[[Path], object], kind: type[OverpaintError], message: str
) -> None:
    spoil(copy)
    before = files_in(registry.folder)
    with pytest.raises(kind, match=message):
        restore(registry.folder, copy)
    assert names(registry) == ["apple", "plum"]
    assert files_in(registry.folder) == before


def test_a_backup_replaces_no_file_and_needs_a_registry(registry: Registry, copy: Path, tmp_path: Path) -> None:
    before = copy.read_bytes()
    with pytest.raises(AlreadyExists, match="is there already"):
        backup(registry.folder, copy)
    assert copy.read_bytes() == before
    with pytest.raises(NotFound, match="no folder"):
        backup(registry.folder, tmp_path / "nowhere" / "copy.db")
    with pytest.raises(NotFound, match="no registry"):
        backup(tmp_path / "empty", tmp_path / "other.db")


def test_an_older_backup_is_restored_and_says_what_it_is(registry: Registry, copy: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(copy)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    assert restore(registry.folder, copy).revision == "0001"
    with pytest.raises(RegistryVersionError, match="overpaint db upgrade"):
        Registry.open(registry.folder)


def test_a_server_has_its_own_backups(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason='psycopg is not installed; pip install -e ".[dev]" does')
    with pytest.raises(OverpaintError, match="pg_dump"):
        backup(f"postgresql://localhost/x?blobs={tmp_path}", tmp_path / "copy.db")


def test_a_backup_on_a_read_only_disk_restores(registry: Registry, copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    shutil.copy(copy, folder)
    (folder / "copy.db").chmod(0o444)
    os.chmod(folder, 0o555)
    try:
        restore(registry.folder, folder / "copy.db")
    finally:
        os.chmod(folder, 0o755)
    assert names(registry) == ["apple"]
