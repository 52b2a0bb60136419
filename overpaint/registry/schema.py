"""Which schema a registry has, and how it gets the one this program knows."""

from __future__ import annotations

import fcntl
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, text

from overpaint.errors import NotFound, OverpaintError
from overpaint.registry import models
from overpaint.registry.faults import plain_database_errors, plain_disk_errors

if TYPE_CHECKING:
    from alembic.config import Config

    from overpaint.registry.database import Database

MIGRATIONS = Path(__file__).parent.parent / "migrations"
LOCK_SECONDS = 20.0


class RegistryVersionError(OverpaintError):
    """A registry whose schema is older or newer than this program."""


def prepare(database: Database, *, create: bool) -> None:
    """See that `database` has the schema of HEAD; make it if nothing is there and `create` allows.

    Raises NotFound, RegistryVersionError, or OverpaintError for a file that is not a registry or cannot become one.
    """
    revision = current(database)
    if revision is None and create:
        revision = _create(database)
    if revision is None:
        raise _nothing_at(database)
    if revision != models.HEAD:
        raise _wrong_version(database, revision)


def current(database: Database) -> str | None:
    """The revision of `database`, or None for one that is missing or still empty. Raises OverpaintError if not ours."""
    with plain_disk_errors(database.path):
        if not database.path.exists():
            return None
    with database.reading() as session:
        tables = set(session.scalars(text("SELECT name FROM sqlite_master WHERE type = 'table'")))
        if not tables:
            return None
        if "alembic_version" not in tables:
            raise OverpaintError(f"{database.path} is a SQLite database but not an Overpaint registry; name another")
        revision: str | None = session.scalar(text("SELECT version_num FROM alembic_version"))
        return revision


def upgrade(database: Database) -> str:
    """Bring an older registry to HEAD and return the revision it had; a copy of the old file is kept beside it.

    Raises NotFound if there is none, RegistryVersionError if it is newer than this program.
    """
    if current(database) is None:
        raise _nothing_at(database)
    with _lock(database.path):
        revision = current(database)
        assert revision is not None, "a registry vanished while it was being locked"
        if revision == models.HEAD:
            return revision
        if revision not in known_revisions():
            raise _wrong_version(database, revision)
        _back_up(database.path, revision)
        _run_migrations(database)
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
    folder = database.path.parent
    with plain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _lock(database.path):
        if current(database) is None:  # another process may have been faster
            _run_migrations(database)
        return current(database)


def _run_migrations(database: Database) -> None:
    """All of them in one transaction: a killed process leaves the schema that was there before."""
    from alembic import command

    with database.migrating() as connection:
        command.upgrade(config(connection), "head")
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            raise OverpaintError(f"{database.path} has a {broken[0]} row that refers to nothing; nothing was changed")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time make or migrate the file. The lock dies with its holder, so it is never stale."""
    lock = path.with_name(path.name + ".lock")
    with plain_disk_errors(path.parent):
        file = lock.open("ab")
    with file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _locked(file.fileno()):
            if time.monotonic() > deadline:
                raise OverpaintError(
                    f"another process is making or upgrading {path} (it holds {lock}); wait for it to end"
                )
            time.sleep(0.05)
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _back_up(path: Path, revision: str) -> None:
    """Copy the database by SQLite itself; a copy of the file alone would miss what is still in the write-ahead log."""
    copy = path.with_name(f"{path.name}.before-upgrade-from-{revision}")
    with (
        plain_database_errors(path),
        closing(sqlite3.connect(path)) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def _nothing_at(database: Database) -> NotFound:
    return NotFound(f"no registry at {database.path.parent}; run `overpaint init`")


def _wrong_version(database: Database, revision: str) -> RegistryVersionError:
    if revision in known_revisions():
        return RegistryVersionError(
            f"the registry at {database.path.parent} has schema {revision} and this program needs {models.HEAD}; "
            "run `overpaint db upgrade`"
        )
    return RegistryVersionError(
        f"the registry at {database.path.parent} has schema {revision}, which is newer than this program knows "
        f"({models.HEAD}); upgrade the program: `pip install --upgrade overpaint`"
    )
