"""The database of a registry: which one a location means, and the sessions there are on it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from overpaint.errors import OverpaintError
from overpaint.registry import schema
from overpaint.registry.faults import plain_database_errors

BUSY_SECONDS = 20
"""How long a writer waits for another."""


def connect(location: str | Path, *, create: bool) -> Database:
    """The database at `location`, of the schema this program knows; made if `create` and nothing is there.

    Raises NotFound if nothing is there, RegistryVersionError if its schema is older or newer, and OverpaintError if the
    location cannot hold a registry.
    """
    database = database_at(location)
    schema.prepare(database, create=create)
    return database


def database_at(location: str | Path) -> Database:
    """The database that a folder or a URL means, not opened yet. Raises OverpaintError for what is neither."""
    scheme = re.match(r"([A-Za-z][\w+.-]*)://", str(location))
    if scheme is None or scheme[1] == "sqlite":
        from overpaint.registry.sqlite import SqliteDatabase, locate

        return SqliteDatabase(locate(location))
    if scheme[1] in ("postgresql", "postgresql+psycopg"):
        from overpaint.registry.postgres import postgres_at

        return postgres_at(str(location))
    raise OverpaintError(  # the rest is not repeated: it may hold a password
        f"a {scheme[1]}:// registry is not supported; name a folder, sqlite:///path/to/registry.db, "
        "or postgresql://host/database?blobs=/folder"
    )


class Database(ABC):
    """A database and sessions on it: any number of readers, and one writer at a time.

    Connections are not pooled: a `Database` has nothing to close, may be carried through a fork, and may be used from
    several threads. `where` is what messages call it, `folder` what lies beside it: blobs and caches.
    """

    def __init__(self, where: str, folder: Path, reader: Engine, writer: Engine, migrator: Engine) -> None:
        self.where, self.folder = where, folder
        self._reader, self._writer, self._migrator = reader, writer, migrator

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that sees one moment of the registry and cannot change it."""
        with plain_database_errors(self.where), Session(self._reader) as session, session.begin():
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that holds the write lock; committed at the end, undone by any exception.

        Raises RegistryVersionError if another program has upgraded the registry since it was opened.
        """
        with plain_database_errors(self.where), Session(self._writer) as session, session.begin():
            schema.require_head(self, session)
            yield session

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """A connection that holds the write lock, for migrations to run on."""
        with plain_database_errors(self.where), self._migrator.begin() as connection:
            yield connection

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is a database to connect to; it may still be empty."""

    @abstractmethod
    def make_room(self) -> None:
        """Make what must be there before tables can be: folders. Raises OverpaintError when they cannot be made."""

    @abstractmethod
    def alone(self) -> AbstractContextManager[None]:
        """Let one process at a time make or upgrade the tables. Raises OverpaintError when another does not finish."""

    @abstractmethod
    def back_up(self, revision: str) -> None:
        """Keep a copy before an upgrade from `revision`, where that can be done from here."""

    @abstractmethod
    def broken_reference(self, connection: Connection) -> str | None:
        """A table with a row that refers to nothing, if migrations could have left one."""
