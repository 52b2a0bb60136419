"""Registries of earlier programs are upgraded, and then used; what goes wrong on the way leaves them as they were."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest
from sqlalchemy import select

from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.registry import Registry, models, queries, schema
from overpaint.registry.database import RegistryVersionError, database_at
from overpaint.registry.records import RecipeEntry

from .contents import add_patch, digest_of, lay
from .freeze import LABELS
from .old import REVISIONS, dump, thaw
from .processes import CLEAN, run_until_killed
from .workers import die_while_copying, die_while_migrating, upgrade

ONE, TWO, THREE = (digest_of(label) for label in LABELS)
PAINTED = "Äpfel & 'Birnen'"


def test_every_earlier_revision_is_frozen() -> None:
    assert set(schema.known_revisions()) - {models.HEAD} <= set(REVISIONS) <= set(schema.known_revisions())


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_frozen_registry_is_upgraded_and_then_used(location: str | Path, revision: str) -> None:
    thaw(location, revision)
    if revision != models.HEAD:
        with pytest.raises(RegistryVersionError, match=f"has schema {revision} .* run `overpaint db upgrade`"):
            Registry.open(location)
    assert Registry.upgrade(location) == revision
    assert Registry.upgrade(location) == models.HEAD
    registry = Registry.open(location, create=False)
    _holds_what_was_frozen(registry)
    _can_be_used(registry)


def _holds_what_was_frozen(registry: Registry) -> None:
    assert [base.name for base in registry.bases()] == ["small", "large"]
    painted = Concept(PAINTED, "style", ("Pomologie", "fruit; still life"), "一枚の絵")
    assert registry.concepts() == [Concept("apple", anchor="pear"), painted]
    assert [(patch.id, patch.concept) for patch in registry.patches()] == [
        (ONE, "apple"),
        (TWO, PAINTED),
        (THREE, "apple"),
    ]
    assert [registry.blob(patch) for patch in registry.patches()] == [label.encode() for label in LABELS]
    assert registry.patch(ONE).settings == {"lambda": 0.1}
    assert registry.recipe("safe").patches == tuple(sorted([(TWO, 0.5), (THREE, 1.0)]))
    assert registry.recipe("empty").patches == ()
    log = registry.log("safe")
    assert [(line.revision, line.action, line.patch, line.strength_before, line.strength_after) for line in log] == [
        (1, "add", ONE, None, 1.0),
        (2, "add", TWO, None, 0.5),
        (3, "strength", ONE, 1.0, 2.0),
        (4, "remove", ONE, 2.0, None),
        (5, "add", THREE, None, 1.0),
    ]
    assert {(line.who, line.why) for line in log[:3]} == {
        ("tester", "Übung: one\nin two lines"),
        ("tester", "Übung: two\nin two lines"),
    }


def _can_be_used(registry: Registry) -> None:
    four = add_patch(registry, "four", concept=PAINTED)
    assert lay(registry, "safe", four.id, 1.0) == 6
    assert registry.recipe("safe@3").entries == tuple(
        sorted([RecipeEntry(ONE, 2.0), RecipeEntry(TWO, 0.5)], key=lambda each: each.patch)
    )
    assert [patch.id for patch in registry.search("pomologie").patches] == [four.id, TWO]
    assert [recipe.name for recipe in registry.search("ÜBUNG three").recipes] == ["safe"]
    assert [recipe.name for recipe in registry.search("large").recipes] == ["empty"]
    registry.delete_recipe("empty", why="", who="tester")
    assert registry.create_recipe("empty", "small").revision == 0


def test_an_upgrade_writes_the_texts_that_this_program_writes(location: str | Path) -> None:
    thaw(location, "0001")
    Registry.upgrade(location)
    database = database_at(location)
    written = _texts(database_at(location))
    with database.writing() as session:
        for row in (*session.scalars(select(models.PatchTextRow)), *session.scalars(select(models.RecipeTextRow))):
            session.delete(row)
        session.flush()
        for patch in session.scalars(select(models.PatchRow)):
            queries.index_patch(session, patch)
        for recipe in session.scalars(select(models.RecipeRow)):
            queries.index_recipe(session, recipe)
        for revision in session.scalars(select(models.RevisionRow)):
            queries.index_reason(session, revision)
    assert _texts(database) == written
    assert len(written) == 3 + 2 + 5


def _texts(database: Any) -> list[tuple[Any, ...]]:
    with database.reading() as session:
        found: list[tuple[Any, ...]] = [
            (row.patch_id, row.text) for row in session.scalars(select(models.PatchTextRow))
        ]
        found += [(str(row.recipe_id), row.revision, row.text) for row in session.scalars(select(models.RecipeTextRow))]
    return sorted(found, key=str)


def test_a_failed_upgrade_leaves_the_registry_as_it_was(location: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(table: str, **options: Any) -> NoReturn:
        raise RuntimeError("the power went out")

    thaw(location, "0001")
    with monkeypatch.context() as broken:
        broken.setattr("alembic.op.drop_table", fail)  # by then, half of it has happened
        with pytest.raises(RuntimeError, match="power"):
            Registry.upgrade(location)
    assert schema.current(database_at(location)) == "0001"
    assert Registry.upgrade(location) == "0001"
    _holds_what_was_frozen(Registry.open(location))


# What follows is about SQLite files: a PostgreSQL server has backups and killed clients in hand itself.


@pytest.fixture
def old(folder: Path) -> Path:
    """A folder with the oldest registry there is."""
    thaw(folder, "0001")
    return folder


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("registry.db.before-*"))


def test_the_copy_made_before_an_upgrade_is_the_old_registry_log_and_all(old: Path) -> None:
    with closing(sqlite3.connect(old / "registry.db")) as connection:
        connection.execute("UPDATE base SET source = '/moved' WHERE name = 'small'")
        connection.commit()  # and stays in the write-ahead log as long as somebody is connected
        assert (old / "registry.db-wal").stat().st_size
        Registry.upgrade(old)
    (copy,) = copies(old)
    assert copy.name == "registry.db.before-upgrade-from-0001"
    copy.rename(old / "registry.db")
    for rest in old.glob("registry.db-*"):
        rest.unlink()
    assert Registry.upgrade(old) == "0001"
    assert Registry.open(old).base("small").source == Path("/moved")


def test_an_earlier_copy_is_kept(old: Path) -> None:
    earlier = old / "registry.db.before-upgrade-from-0001"
    earlier.write_bytes(b"precious")
    Registry.upgrade(old)
    assert earlier.read_bytes() == b"precious"
    assert [copy.name for copy in copies(old)] == [earlier.name, f"{earlier.name}-2"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_without_a_copy_there_is_no_upgrade(old: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: Any, **options: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(os, call, full)
        with pytest.raises(OverpaintError, match="is full; free some space"):
            Registry.upgrade(old)
    assert schema.current(database_at(old)) == "0001"
    assert copies(old) == []


def test_a_damaged_registry_is_not_upgraded(old: Path) -> None:
    with closing(sqlite3.connect(old / "registry.db")) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ix_history_patch_id'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray((old / "registry.db").read_bytes())
    content[(page - 1) * size : page * size] = bytes(size)
    (old / "registry.db").write_bytes(content)
    with pytest.raises(OverpaintError, match="is damaged"):
        Registry.upgrade(old)
    assert copies(old) == []


def test_a_row_that_refers_to_nothing_stops_the_upgrade(old: Path) -> None:
    with closing(sqlite3.connect(old / "registry.db")) as connection:
        connection.execute("DELETE FROM concept WHERE name = 'apple'")
        connection.commit()
    with pytest.raises(OverpaintError, match="a patch row that refers to nothing; nothing was changed"):
        Registry.upgrade(old)
    assert schema.current(database_at(old)) == "0001"


@pytest.mark.parametrize("death", [die_while_copying, die_while_migrating])
def test_a_killed_upgrade_is_simply_run_again(old: Path, death: Callable[[Path], None]) -> None:
    run_until_killed(death, old)
    assert schema.current(database_at(old)) == "0001"
    assert Registry.upgrade(old) == "0001"
    _holds_what_was_frozen(Registry.open(old))
    for copy in copies(old):
        with closing(sqlite3.connect(copy)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("0001",)
    assert list(old.glob("*.part*")) == []


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(3, mp_context=CLEAN) as processes:
        yield processes


def test_of_three_who_upgrade_at_once_one_does(location: str | Path, pool: ProcessPoolExecutor) -> None:
    thaw(location, "0001")
    assert sorted(pool.map(upgrade, [location] * 3)) == ["0001", models.HEAD, models.HEAD]
    _holds_what_was_frozen(Registry.open(location))


def test_rows_of_an_upgraded_registry_equal_those_of_a_new_one(folder: Path, tmp_path: Path) -> None:
    """The oldest frozen registry and a fresh one, filled alike, differ in moments and in nothing else."""
    from .freeze import fill

    thaw(folder, "0001")
    Registry.upgrade(folder)
    fill(Registry.open(tmp_path / "fresh"))
    upgraded, fresh = (_rows(place / "registry.db") for place in (folder, tmp_path / "fresh"))
    assert upgraded == fresh


def _rows(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    moments = {"added_at", "solved_at", "created_at", "deleted_at", "at"}
    found = {}
    with closing(sqlite3.connect(path)) as connection:
        for table in models.Row.metadata.tables.values():
            columns = ", ".join(sorted(column.name for column in table.columns if column.name not in moments))
            found[table.name] = sorted(connection.execute(f"SELECT {columns} FROM {table.name}").fetchall(), key=str)
    return found


def test_what_is_frozen_is_text_that_makes_a_database() -> None:
    for revision in REVISIONS:
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(dump(revision))
            assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (revision,)
