"""The SQLite file of a registry: where it is, how it is opened, and the two kinds of session on it."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from overpaint.errors import OverpaintError
from overpaint.registry import schema
from overpaint.registry.faults import plain_database_errors

FILE_NAME = "registry.db"
BUSY_SECONDS = 20
SQLITE = "sqlite:///"


def connect(location: str | Path, *, create: bool) -> Database:
    """The database at `location`, of the schema this program knows; made if `create` and nothing is there.

    Raises NotFound if nothing is there, RegistryVersionError if its schema is older or newer, and OverpaintError if the
    location cannot hold a registry.
    """
    database = Database(locate(location))
    schema.prepare(database, create=create)
    return database


def locate(location: str | Path) -> Path:
    """The database file that a folder or an sqlite:/// URL means. Raises OverpaintError for what is neither."""
    text = str(location)
    if text.startswith(SQLITE):
        return _file(text.removeprefix(SQLITE))
    scheme = re.match(r"([A-Za-z][\w+.-]*)://", text)
    if scheme:  # the rest is not repeated: it may hold a password
        raise OverpaintError(
            f"a {scheme[1]}:// registry is not supported yet in this version (nor is PostgreSQL); "
            "name a folder, or sqlite:///path/to/registry.db"
        )
    folder = Path(location).absolute()
    if folder.is_file():
        raise OverpaintError(f"{folder} is a file, and a registry is a folder; name a folder, or {SQLITE}{folder}")
    return folder / FILE_NAME


def _file(text: str) -> Path:
    path = Path(text).absolute()
    if text in ("", ":memory:") or path.is_dir():
        raise OverpaintError(f"{SQLITE}{text} names no database file; write {SQLITE}path/to/{FILE_NAME}")
    return path


class Database:
    """A SQLite file and sessions on it.

    Connections are not pooled: opening one costs about a millisecond, and so a `Database` has nothing to close, may
    be carried through a fork, and may be used from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _engine(path, "BEGIN", _prepare_reader)
        # A transaction that reads first and writes later fails at once if another process wrote in between, whatever
        # the timeout; one that takes the write lock at its beginning waits its turn.
        self._writer = _engine(path, "BEGIN IMMEDIATE", _prepare_writer)
        self._migrator = _engine(path, "BEGIN IMMEDIATE", _prepare_migrator)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that sees one moment of the registry and cannot change it."""
        with plain_database_errors(self.path), Session(self._reader) as session, session.begin():
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that holds the write lock; committed at the end, undone by any exception."""
        with plain_database_errors(self.path), Session(self._writer) as session, session.begin():
            yield session

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """A connection in a write transaction with foreign keys off, because migrations copy and drop tables."""
        with plain_database_errors(self.path), self._migrator.begin() as connection:
            yield connection


def _engine(path: Path, begin: str, prepare: Any) -> Engine:
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
