"""How a registry comes to be, and what happens when its schema is not this program's."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import delete

from overpaint.errors import NotFound, OverpaintError
from overpaint.registry import Registry, models, schema
from overpaint.registry.database import Database, connect
from overpaint.registry.schema import RegistryVersionError

from .shelf import stock


def set_revision(folder: Path, revision: str) -> None:
    with closing(sqlite3.connect(folder / "registry.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def test_models_equal_migrations(folder: Path) -> None:
    database = connect(folder, create=True)
    with database.reading() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        assert compare_metadata(context, models.Row.metadata) == []


def test_migrations_make_the_checks_that_models_state(folder: Path) -> None:
    connect(folder, create=True)
    with closing(sqlite3.connect(folder / "registry.db")) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(
            "INSERT INTO history (recipe_id, revision, action, patch_id, why, who, at) "
            "VALUES (1, 1, 'x', 'p', '', '', '')"
        )


def test_the_constant_head_is_the_newest_migration() -> None:
    assert schema.known_revisions()[0] == models.HEAD


def test_every_constraint_has_a_name() -> None:
    for table in models.Row.metadata.tables.values():
        assert all(constraint.name for constraint in table.constraints), table.name


def test_an_older_schema_prints_the_command_and_the_command_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stock(Registry.open(folder))
    # No second revision exists yet, so one is made: a program one step ahead of the registry on the disk.
    migrations = tmp_path / "migrations"
    shutil.copytree(schema.MIGRATIONS, migrations)
    (migrations / "versions" / "0002_notes.py").write_text(
        "from alembic import op\nimport sqlalchemy as sa\n"
        "revision, down_revision, branch_labels, depends_on = '0002', '0001', None, None\n"
        "def upgrade():\n"
        "    with op.batch_alter_table('base', recreate='always') as table:\n"
        "        table.add_column(sa.Column('note', sa.Text(), nullable=True))\n"
    )
    monkeypatch.setattr(schema, "MIGRATIONS", migrations)
    monkeypatch.setattr(models, "HEAD", "0002")

    with pytest.raises(RegistryVersionError, match="run `overpaint db upgrade`"):
        Registry.open(folder)
    assert Registry.upgrade(folder) == "0001"
    assert [base.name for base in Registry.open(folder).bases()] == ["small"]
    assert Registry.upgrade(folder) == "0002"
    assert (folder / "registry.db.before-upgrade-from-0001").is_file()


def test_a_newer_schema_says_to_upgrade_the_program(folder: Path) -> None:
    Registry.open(folder)
    set_revision(folder, "9999")
    with pytest.raises(RegistryVersionError, match="upgrade the program"):
        Registry.open(folder)
    with pytest.raises(RegistryVersionError, match="upgrade the program"):
        Registry.upgrade(folder)


def test_a_failed_migration_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(table: str, *columns: Any, **options: Any) -> NoReturn:
        raise RuntimeError("the power went out")

    with monkeypatch.context() as broken:
        broken.setattr("alembic.op.create_index", fail)
        with pytest.raises(RuntimeError, match="power"):
            Registry.open(folder)
    with pytest.raises(NotFound):
        Registry.open(folder, create=False)
    assert stock(Registry.open(folder)).bases()


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


def test_readers_cannot_write(folder: Path) -> None:
    database = connect(folder, create=True)
    with pytest.raises(OverpaintError, match="read-only"), database.reading() as session:
        session.execute(delete(models.Base))


def test_no_registry_says_what_to_run(folder: Path) -> None:
    with pytest.raises(NotFound, match=r"no registry at .*registry; run `overpaint init`"):
        Registry.open(folder, create=False)
    assert not folder.exists()


@pytest.mark.parametrize("url", ["postgresql://me:secret@host/db", "mysql+pymysql://me:secret@host/db"])
def test_other_databases_are_refused_without_repeating_the_password(url: str) -> None:
    with pytest.raises(OverpaintError, match="not supported yet") as caught:
        Registry.open(url)
    assert "PostgreSQL" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:///", "sqlite:///:memory:"])
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
    monkeypatch.setattr(schema, "LOCK_SECONDS", 0.1)
    with (
        schema._lock(folder / "registry.db"),
        pytest.raises(OverpaintError, match="another process is making or upgrading"),
    ):
        Registry.open(folder)
    assert schema.current(Database(folder / "registry.db")) is None
    Registry.open(folder)
