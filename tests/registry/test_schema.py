"""How a registry comes to be, and what happens when its schema is not this program's."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import CheckConstraint, delete, inspect, text
from sqlalchemy.exc import IntegrityError

from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry import Registry, database, models, schema
from overpaint.registry.database import RegistryVersionError, database_at
from overpaint.registry.schema import connect

from .contents import stock


def set_revision(location: str | Path, revision: str) -> None:
    with database_at(location).migrating() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


def test_models_equal_migrations(location: str | Path) -> None:
    def is_stated(_: object, name: str | None, *about: object) -> bool:
        """Whether models state it: all but the index of searches, which SQLite keeps in tables of its own."""
        return "_pieces" not in (name or "")

    options = {"compare_type": True, "compare_server_default": True, "include_object": is_stated}
    with connect(location, create=True).reading() as session:
        context = MigrationContext.configure(session.connection(), opts=options)
        assert compare_metadata(context, models.Row.metadata) == []


def test_migrations_make_the_checks_and_conditions_that_models_state(location: str | Path) -> None:
    """Which Alembic does not compare."""
    with connect(location, create=True).reading() as session:
        found = inspect(session.connection())
        checks = {check["name"] for table in found.get_table_names() for check in found.get_check_constraints(table)}
        index = next(index for index in found.get_indexes("recipe") if index["name"] == "uq_recipe_name")
        dialect = session.get_bind().dialect.name
    stated = [rule for table in models.Row.metadata.tables.values() for rule in table.constraints]
    assert checks == {rule.name for rule in stated if isinstance(rule, CheckConstraint)}
    assert "deleted_at IS NULL" in str(index["dialect_options"][f"{dialect}_where"])
    with pytest.raises(IntegrityError), connect(location, create=False).writing() as session:
        session.execute(
            text("INSERT INTO revision (recipe_id, number, action, why, who, at) VALUES (1, 1, 'x', '', '', '')")
        )


def test_the_constant_head_is_the_newest_migration() -> None:
    assert schema.known_revisions()[0] == models.HEAD


def test_history_is_linear() -> None:
    scripts = list(ScriptDirectory.from_config(schema.config()).walk_revisions())
    assert [script.down_revision for script in scripts] == [*(script.revision for script in scripts[1:]), None]


def test_every_constraint_has_a_name() -> None:
    for table in models.Row.metadata.tables.values():
        assert all(constraint.name for constraint in table.constraints), table.name


def test_a_newer_schema_is_refused_with_the_advice_to_upgrade(anywhere: str | Path) -> None:
    set_revision(anywhere, "9999")
    with pytest.raises(RegistryVersionError, match="upgrade the program"):
        Registry.open(anywhere)
    with pytest.raises(RegistryVersionError, match="upgrade the program"):
        Registry.upgrade(anywhere)


def test_a_program_notices_that_the_registry_it_has_open_was_upgraded(anywhere: str | Path) -> None:
    registry = Registry.open(anywhere)
    set_revision(anywhere, "9999")
    with pytest.raises(RegistryVersionError, match=r"brought to schema 9999 .* nothing was written"):
        registry.create_recipe("r", "small")
    set_revision(anywhere, models.HEAD)
    assert registry.recipes() == []


def test_a_failed_creation_leaves_nothing_in_the_way(location: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(table: str, *columns: Any, **options: Any) -> NoReturn:
        raise RuntimeError("the power went out")

    with monkeypatch.context() as broken:
        broken.setattr("alembic.op.create_index", fail)
        with pytest.raises(RuntimeError, match="power"):
            Registry.open(location)
    with pytest.raises(NotFound):
        Registry.open(location, create=False)
    assert stock(Registry.open(location)).bases()


def test_opening_an_existing_registry_imports_neither_alembic_nor_torch(folder: Path) -> None:
    stock(Registry.open(folder))
    program = (
        "import sys; from overpaint.registry import Registry\n"
        f"assert Registry.open({str(folder)!r}).bases()\n"
        "print({'alembic', 'torch', 'numpy'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert output.stdout.strip() == "set()", output.stderr


def test_writers_get_wal_and_full_durability(folder: Path) -> None:
    database = connect(folder, create=True)
    with database.writing() as session:
        connection = session.connection()
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    assert values == ["wal", 2, 1, 20_000]


def test_readers_cannot_write(anywhere: str | Path) -> None:
    database = connect(anywhere, create=False)
    with pytest.raises(OverpaintError, match="read-only"), database.reading() as session:
        session.execute(delete(models.BaseRow))


def test_no_registry_says_what_to_run(folder: Path) -> None:
    with pytest.raises(NotFound, match=r"no registry at .*registry.db; run `overpaint init`"):
        Registry.open(folder, create=False)
    assert not folder.exists()


def test_other_databases_are_refused_without_repeating_the_password() -> None:
    with pytest.raises(
        OverpaintError, match=r"mysql\+pymysql:// registry is not supported; name .* or postgresql:"
    ) as caught:
        Registry.open("mysql+pymysql://me:secret@host/db")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:///", "sqlite:///:memory:", "sqlite://", "sqlite://host"])
def test_a_registry_in_memory_is_refused(url: str) -> None:
    with pytest.raises(OverpaintError, match="names no database file"):
        Registry.open(url)


def test_a_url_and_its_folder_are_the_same_registry(folder: Path) -> None:
    stock(Registry.open(f"sqlite:///{folder}/registry.db"))
    assert Registry.open(folder, create=False).base("small")


def test_a_folder_with_odd_characters_is_a_folder(tmp_path: Path) -> None:
    assert stock(Registry.open(tmp_path / "100% ünïque? #1 & 'more'")).bases()


def test_a_file_is_not_a_registry(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x" * 2000)
    with pytest.raises(OverpaintError, match="is a file, and a registry is a folder"):
        Registry.open(tmp_path / "notes.txt")
    with pytest.raises(OverpaintError, match="not a SQLite database"):
        Registry.open(f"sqlite:///{tmp_path}/notes.txt")
    with pytest.raises(OverpaintError):
        Registry.open(tmp_path / "notes.txt" / "below")


def test_a_foreign_database_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    before = path.read_bytes()
    with pytest.raises(OverpaintError, match="not an Overpaint registry"):
        Registry.open(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OverpaintError, match=r"cannot write in .*registry: it is read-only"):
        Registry.open(folder)


def test_a_damaged_database_says_so(folder: Path) -> None:
    stock(Registry.open(folder))
    path = folder / "registry.db"
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(OverpaintError, match="is damaged"):
        Registry.open(folder).bases()


def test_a_creation_under_way_elsewhere_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.1)
    opened = database_at(folder)
    with opened.alone(), pytest.raises(OverpaintError, match="another process is making or upgrading"):
        Registry.open(folder)
    assert schema.current(opened) is None
    Registry.open(folder)
