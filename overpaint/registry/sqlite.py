"""A registry's database as one SQLite file."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.pool import NullPool

from overpaint.durable import sync
from overpaint.errors import OverpaintError
from overpaint.registry.database import BUSY_SECONDS, Database
from overpaint.registry.faults import plain_database_errors, plain_disk_errors

FILE_NAME = "registry.db"
SQLITE = "sqlite:///"
LOCK_SECONDS = 20.0
"""How long to wait for another process that makes or upgrades the same file."""


def locate(location: str | Path) -> Path:
    """The database file that a folder or an sqlite:/// URL means. Raises OverpaintError for what is neither."""
    text = str(location)
    if text.startswith("sqlite:"):
        return _file(text.removeprefix(SQLITE))
    folder = Path(location).absolute()
    if folder.is_file():
        raise OverpaintError(f"{folder} is a file, and a registry is a folder; name a folder, or {SQLITE}{folder}")
    return folder / FILE_NAME


def _file(text: str) -> Path:
    path = Path(text).absolute()
    if text in ("", ":memory:") or path.is_dir() or text.startswith("sqlite:"):
        raise OverpaintError(f"{SQLITE}{text} names no database file; write {SQLITE}path/to/{FILE_NAME}")
    return path


class SqliteDatabase(Database):
    """A SQLite file. Opening a connection costs about a millisecond."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(
            str(path),
            path.parent,
            _engine(path, "BEGIN", _prepare_reader),
            # A transaction that reads first and writes later fails at once if another process wrote in between, whatever
            # the timeout; one that takes the write lock at its beginning waits its turn.
            _engine(path, "BEGIN IMMEDIATE", _prepare_writer),
            _engine(path, "BEGIN IMMEDIATE", _prepare_migrator),
        )

    def exists(self) -> bool:
        with plain_disk_errors(self.path):
            return self.path.exists()

    def make_room(self) -> None:
        with plain_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """By a lock on a neighbouring file, which dies with its holder and so is never stale."""
        lock = self.path.with_name(self.path.name + ".lock")
        with plain_disk_errors(self.folder):
            file = lock.open("ab")
        with file:
            deadline = time.monotonic() + LOCK_SECONDS
            while not _locked(file.fileno()):
                if time.monotonic() > deadline:
                    raise OverpaintError(
                        f"another process is making or upgrading {self.path} (it holds {lock}); wait for it to end"
                    )
                time.sleep(0.05)
            yield

    def back_up(self, revision: str) -> None:
        """Beside the file, under a name that says from where the upgrade came; an earlier copy is kept too."""
        copy_database(self.path, free_name(self.path.with_name(f"{self.path.name}.before-upgrade-from-{revision}")))

    def broken_reference(self, connection: Connection) -> str | None:
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        return None if broken is None else str(broken[0])


def copy_database(source: Path, target: Path) -> None:
    """Copy a SQLite file that may be in use: whole, sound and durable under the name `target`, or not there at all.

    By SQLite itself, because a copy of the file alone would miss what is still in the write-ahead log. Raises
    OverpaintError when the source is damaged or the disk full.
    """
    part = target.with_name(target.name + ".part")
    parts = (part, part.with_name(part.name + "-journal"))
    with plain_database_errors(str(source)), plain_disk_errors(target.parent):
        _remove(parts)  # what a killed process left
        try:
            _copy_pages(source, part)
            sync(part)
            os.replace(part, target)
            sync(target.parent)
        finally:
            _remove(parts)


def _copy_pages(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as reader, closing(sqlite3.connect(target)) as writer:
        reader.backup(writer)
        writer.execute("PRAGMA journal_mode = DELETE")  # the copy is one file, without a log beside it
        (verdict,) = writer.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise OverpaintError(f"the database {source} is damaged ({verdict}), so it was not copied; put back a backup")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """The name itself, or with the first number behind it, at which there is nothing yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _engine(path: Path, begin: str, prepare: Callable[[sqlite3.Connection, Path], None]) -> Engine:
    # isolation_level=None stops the sqlite3 module from beginning transactions by itself; the handler below does it.
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=NullPool,
        connect_args={"timeout": BUSY_SECONDS, "isolation_level": None},
    )

    @event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, _record: object) -> None:
        prepare(connection, path)

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _prepare_reader(connection: sqlite3.Connection, path: Path) -> None:
    """Readers leave the file as it is, its journal mode too: it may turn out not to be ours."""
    connection.execute("PRAGMA query_only = ON")


def _prepare_writer(connection: sqlite3.Connection, path: Path) -> None:
    _require_wal(connection, path)
    connection.execute("PRAGMA foreign_keys = ON")


def _prepare_migrator(connection: sqlite3.Connection, path: Path) -> None:
    """Foreign keys are off, because migrations copy and drop tables that others refer to."""
    _require_wal(connection, path)
    connection.execute("PRAGMA foreign_keys = OFF")


def _require_wal(connection: sqlite3.Connection, path: Path) -> None:
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise OverpaintError(
            f"{path.parent} does not support SQLite's write-ahead log (got {mode!r}), as network folders do not; "
            "put the registry on a local disk"
        )
    # FULL, not the usual NORMAL: commits here are few and each may be hours of solving.
    connection.execute("PRAGMA synchronous = FULL")
