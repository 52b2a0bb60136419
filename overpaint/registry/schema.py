"""A registry's database as a whole: which schema it has, how it gets the one this program knows, its backups.

Blobs are not in a backup: those never change, and may be copied as files.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect

from overpaint.core.atomic import require_parent
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import models
from overpaint.registry.database import (
    REVISION,
    Database,
    RegistryVersionError,
    SqliteDatabase,
    copy_database,
    database_at,
    free_name,
    plain_database_errors,
    plain_disk_errors,
)

if TYPE_CHECKING:
    from alembic.config import Config


MIGRATIONS = Path(__file__).parent.parent / "migrations"


def connect(location: str | Path, *, create: bool) -> Database:
    """The database at `location`, of the schema this program knows; made if `create` and nothing is there.

    Raises NotFound if nothing is there, RegistryVersionError if its schema is older or newer, and OverpaintError for a
    database that is not a registry's, or a location that cannot hold one.
    """
    database = database_at(location)
    revision = current(database)
    if revision is None and create:
        revision = _create(database)
    if revision is None:
        raise _nothing_at(database)
    if revision != models.HEAD:
        raise _wrong_version(database, revision)
    return database


def current(database: Database) -> str | None:
    """The revision of `database`, or None for one that is missing or still empty. Raises OverpaintError if not ours."""
    if not database.exists():
        return None
    with database.reading() as session:
        tables = set(inspect(session.connection()).get_table_names())
        if not tables:
            return None
        if not {"alembic_version", "recipe_patch"} <= tables:
            raise OverpaintError(f"{database.where} is a database but not an Overpaint registry; name another")
        revision: str | None = session.scalar(REVISION)
        return revision


def upgrade(database: Database) -> str:
    """Bring an older registry to HEAD and return the revision it had; a copy of an SQLite file is kept beside it.

    Raises NotFound if there is none, RegistryVersionError if it is newer than this program.
    """
    if current(database) is None:
        raise _nothing_at(database)
    with database.alone():
        revision = current(database)
        assert revision is not None, "a registry vanished while it was being locked"
        if revision == models.HEAD:
            return revision
        if revision not in known_revisions():
            raise _wrong_version(database, revision)
        _run_migrations(database, back_up=revision)
    return revision


def known_revisions() -> list[str]:
    """The revisions this program has migrations for, newest first."""
    from alembic.script import ScriptDirectory

    return [script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()]


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, which other programs read from an alembic.ini."""
    from alembic.config import Config

    configuration = Config(attributes={"connection": connection})
    configuration.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return configuration


def _create(database: Database) -> str | None:
    database.make_room()
    with database.alone():
        if current(database) is None:  # another process may have been faster
            _run_migrations(database)
        return current(database)


def _run_migrations(database: Database, *, back_up: str | None = None) -> None:
    """All of them in one transaction: a killed process leaves the schema that was there before."""
    from alembic import command

    with database.migrating() as connection:
        if back_up is not None:  # now that nobody can write any more
            database.back_up(back_up)
        command.upgrade(config(connection), "head")
        broken = database.broken_reference(connection)
        if broken is not None:
            raise OverpaintError(f"{database.where} has a {broken} row that refers to nothing; nothing was changed")


def _nothing_at(database: Database) -> NotFound:
    return NotFound(f"no registry at {database.where}; run `overpaint init`")


def _wrong_version(database: Database, revision: str) -> RegistryVersionError:
    if revision in known_revisions():
        return RegistryVersionError(
            f"the registry at {database.where} has schema {revision} and this program needs {models.HEAD}; "
            "run `overpaint db upgrade`"
        )
    return RegistryVersionError(
        f"the registry at {database.where} has schema {revision}, which is newer than this program knows "
        f"({models.HEAD}); upgrade the program: `pip install --upgrade overpaint`"
    )


SIDECARS = ("-wal", "-shm", "-journal")


class BadBackup(OverpaintError):
    """A file that is not the sound backup of a registry."""


@dataclass(frozen=True)
class Restored:
    """What was restored: the schema of the backup, and where the database that was there before is now, if there was one."""

    revision: str
    kept: Path | None


def backup(location: str | Path, target: Path) -> int:
    """Copy the database of the registry at `location`, which may be in use, to the file `target`; return its bytes.

    The copy is one moment of the registry, checked, and there whole or not at all. Raises NotFound when there is no
    registry, AlreadyExists when `target` is there, OverpaintError when the database is damaged or on a server.
    """
    database = _file(location, "pg_dump --format=custom --file FILE DATABASE")
    if current(database) is None:
        raise NotFound(f"no registry at {database.where}; run `overpaint init`")
    _refuse_existing(target)
    copy_database(database.path, target)
    return target.stat().st_size


def restore(location: str | Path, source: Path) -> Restored:
    """Put the backup `source` in the place of the database of the registry at `location`, which stays beside it.

    Other programs may be using the registry: they find either all of the old rows or all of the new ones. Raises
    BadBackup for a file that is damaged or no backup of a registry, RegistryVersionError for one that is newer than this
    program; nothing is changed then.
    """
    database = _file(location, "pg_restore --clean --dbname DATABASE FILE")
    revision = _revision_of(source)
    database.make_room()
    with database.alone():
        kept = free_name(database.path.with_name(f"{database.path.name}.before-restore"))
        if not database.exists():
            copy_database(source, database.path)
            return Restored(revision, None)
        if _is_sound(database.path):
            copy_database(database.path, kept)
            _overwrite(database.path, source)
        else:
            with _moved_aside(database.path, kept):
                copy_database(source, database.path)
    return Restored(revision, kept)


def _file(location: str | Path, command: str) -> SqliteDatabase:
    database: Database = database_at(location)
    if not isinstance(database, SqliteDatabase):
        raise OverpaintError(f"{database.where} is on a server, which has its own tools for this: `{command}`")
    return database


def _refuse_existing(target: Path) -> None:
    with plain_disk_errors(target):
        if target.exists():
            raise AlreadyExists(f"{target} is there already; name a new file, or remove it first")
        require_parent(target)


def _revision_of(source: Path) -> str:
    """The schema of a backup. Raises NotFound, BadBackup, RegistryVersionError."""
    if not source.is_file():
        raise NotFound(f"there is no file {source}; name one that `overpaint db backup` wrote")
    if not _is_sound(source):
        raise BadBackup(f"{source} is damaged or no database; nothing was changed. Try an older backup")
    try:
        revision = current(SqliteDatabase(source.absolute()))
    except OverpaintError as error:
        raise BadBackup(f"{source} is not a backup of a registry ({error}); nothing was changed") from error
    if revision is None:
        raise BadBackup(f"{source} is an empty database; nothing was changed. Try an older backup")
    if revision not in known_revisions():
        raise RegistryVersionError(
            f"{source} has schema {revision}, which is newer than this program knows ({models.HEAD}); nothing was "
            "changed. Upgrade the program: `pip install --upgrade overpaint`"
        )
    return revision


def _is_sound(path: Path) -> bool:
    """Whether SQLite finds nothing wrong with a file; being locked or unreadable is an error, not damage."""
    try:
        # Read-only, because SQLite would otherwise tidy up a log that belongs to damaged data.
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            return bool(connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError as error:
        if "malformed" in str(error) or "not a database" in str(error):
            return False
        with plain_database_errors(path):
            raise


def _overwrite(path: Path, source: Path) -> None:
    """By SQLite itself, in one transaction: a file that others have open cannot be exchanged under them."""
    with (
        plain_database_errors(path),
        closing(sqlite3.connect(source)) as reader,
        closing(sqlite3.connect(path, timeout=20)) as writer,
    ):
        reader.backup(writer)


@contextmanager
def _moved_aside(path: Path, kept: Path) -> Iterator[None]:
    """Give a damaged database another name, the files beside it first; all of it goes back if the block fails."""
    moved: list[tuple[Path, Path]] = []
    try:
        with plain_disk_errors(path.parent):
            for suffix in (*SIDECARS, ""):
                old, new = path.with_name(path.name + suffix), kept.with_name(kept.name + suffix)
                if old.exists():
                    os.replace(old, new)
                    moved.append((old, new))
        yield
    except BaseException:
        for old, new in reversed(moved):
            os.replace(new, old)
        raise
