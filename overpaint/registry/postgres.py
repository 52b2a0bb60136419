"""A registry's database on a PostgreSQL server, for registries that several machines share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool

from overpaint.errors import OverpaintError
from overpaint.registry.database import BUSY_SECONDS, Database
from overpaint.registry.faults import plain_database_errors, plain_disk_errors

WRITER, MAKER = 0x0EA9A1, 0x0EA9A2
"""Keys of the two locks that registries take; PostgreSQL keeps such locks for each database by itself."""

# One writer at a time, as on SQLite, so that what reads and then writes need not know which of the two it is on. The
# server may have been told to confirm commits early; a registry's are few, and each may be hours of solving.
BEGIN_WRITING = (
    f"SELECT set_config('lock_timeout', '{BUSY_SECONDS}s', true), set_config('synchronous_commit', 'on', true), "
    f"pg_advisory_xact_lock({WRITER})"
)


def postgres_at(location: str) -> PostgresDatabase:
    """The database that postgresql://USER@HOST/DATABASE?blobs=FOLDER means; other options go to the driver.

    Raises OverpaintError when the driver is not installed, or the URL names no database or no folder for the blobs.
    """
    if find_spec("psycopg") is None:
        raise OverpaintError("a PostgreSQL registry needs psycopg; run `pip install 'overpaint[postgres]'`")
    try:
        url = make_url(location)
    except (ArgumentError, ValueError):
        raise OverpaintError(
            "this postgresql:// URL cannot be read; write postgresql://user:password@host:port/database?blobs=/folder "
            "with '@', ':' and '/' in a password as %40, %3A and %2F"
        ) from None  # the message of the cause may hold the password
    blobs = url.query.get("blobs")
    if not url.database or not isinstance(blobs, str) or not blobs:
        raise OverpaintError(
            "a PostgreSQL registry is a database and a folder that all who use it share: "
            "write postgresql://host/database?blobs=/shared/folder"
        )
    server = url.set(drivername="postgresql+psycopg").difference_update_query(["blobs"])
    return PostgresDatabase(server, Path(blobs).absolute())


class PostgresDatabase(Database):
    """A database on a PostgreSQL server. Opening a connection costs some milliseconds."""

    def __init__(self, url: URL, folder: Path) -> None:
        engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": BUSY_SECONDS})
        writer = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": BUSY_SECONDS})
        event.listen(writer, "begin", _begin_writing)
        reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        where = url.set(drivername="postgresql").render_as_string(hide_password=True)
        super().__init__(where, folder, reader, writer, writer)
        self._plain: Engine = engine

    def exists(self) -> bool:
        return True

    def make_room(self) -> None:
        with plain_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with plain_database_errors(self.where), self._plain.connect() as connection:
            encoding = connection.scalar(text("SHOW server_encoding"))
        if encoding != "UTF8":
            raise OverpaintError(
                f"{self.where} keeps text as {encoding}, which cannot hold every name; make a database with "
                "`createdb --encoding UTF8 --template template0 NAME`"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """By a lock of the server, which dies with its holder's connection."""
        with plain_database_errors(self.where), self._plain.begin() as connection:
            connection.execute(text(f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'"))
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MAKER})"))
            yield

    def back_up(self, revision: str) -> None:
        """Nothing: a server's backups are its own, and an upgrade that fails is undone by the server."""

    def broken_reference(self, connection: Connection) -> str | None:
        return None  # the server checks references all the time


def _begin_writing(connection: Connection) -> None:
    connection.exec_driver_sql(BEGIN_WRITING)
