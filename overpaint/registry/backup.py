"""Backups of a registry's database. Its blobs are not in them: those never change, and may be copied as files."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from overpaint.core.atomic import require_parent
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import models, schema
from overpaint.registry.database import (
    Database,
    RegistryVersionError,
    SqliteDatabase,
    copy_database,
    database_at,
    free_name,
)
from overpaint.registry.db_errors import plain_database_errors, plain_disk_errors

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
    if schema.current(database) is None:
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
        revision = schema.current(SqliteDatabase(source.absolute()))
    except OverpaintError as error:
        raise BadBackup(f"{source} is not a backup of a registry ({error}); nothing was changed") from error
    if revision is None:
        raise BadBackup(f"{source} is an empty database; nothing was changed. Try an older backup")
    if revision not in schema.known_revisions():
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
