"""The database of a registry, a SQLite file or on a PostgreSQL server: which one a location means, and sessions on it.

What the disk and the database say when they refuse is turned into sentences that a person can act on (`plain_disk_errors`,
`plain_database_errors`).
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from overpaint.core.atomic import locked, make_folder, replacing, share
from overpaint.core.errors import OverpaintError
from overpaint.core.names import printed, printed_url, typed_path
from overpaint.registry import models

BUSY_SECONDS = 20
"""How long a writer waits for another."""


REVISION = text("SELECT version_num FROM alembic_version")


class RegistryVersionError(OverpaintError):
    """A registry whose schema is older or newer than this program."""


def database_at(location: str | Path) -> Database:
    """The database at a folder or a URL, not opened yet. Raises OverpaintError for anything else."""
    scheme = re.match(r"([A-Za-z][\w+.-]*)://", str(location))
    if scheme is None or scheme[1] == "sqlite":
        return SqliteDatabase(locate(location))
    if scheme[1] in ("postgresql", "postgresql+psycopg"):
        return postgres_at(str(location))
    raise OverpaintError(  # the rest is not repeated: it may hold a password
        f"a {scheme[1]}:// registry is not supported; name a folder, sqlite:///path/to/registry.db, "
        "or postgresql://host/database?blobs=/folder"
    )


class Database(ABC):
    """A database and sessions on it: any number of readers, and one writer at a time.

    Connections are not pooled: a `Database` has nothing to close, may be carried through a fork, and may be used from
    several threads. `where` is what messages call it, `folder` is for what is beside it: blobs and caches.
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
            self._refuse_if_upgraded(session)
            yield session

    def refuse_if_upgraded(self) -> None:
        """Raise RegistryVersionError if another program has upgraded the registry since it was opened."""
        with self.reading() as session:
            self._refuse_if_upgraded(session)

    def _refuse_if_upgraded(self, session: Session) -> None:
        revision = session.scalar(REVISION)
        if revision != models.HEAD:
            raise RegistryVersionError(
                f"the registry {self.where} was brought to schema {revision} while this program, which knows "
                f"{models.HEAD}, had it open; nothing was written. Upgrade the program: `pip install --upgrade overpaint`"
            )

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


FILE_NAME = "registry.db"
SQLITE = "sqlite:///"
LOCK_SECONDS = 20.0
"""How long to wait for another process that makes or upgrades the same file."""


def locate(location: str | Path) -> Path:
    """The database file at a folder or an sqlite:/// URL. Raises OverpaintError for anything else."""
    text = str(location)
    if text.startswith("sqlite:"):
        return _file(text.removeprefix(SQLITE))
    folder = typed_path(location)
    if folder.is_file():
        raise OverpaintError(f"{folder} is a file, and a registry is a folder; name a folder, or {SQLITE}{folder}")
    return folder / FILE_NAME


def _file(text: str) -> Path:
    if text in ("", ":memory:") or text.startswith("sqlite:") or (path := typed_path(text)).is_dir():
        raise OverpaintError(f"{SQLITE}{text} names no database file; write {SQLITE}path/to/{FILE_NAME}")
    return path


class SqliteDatabase(Database):
    """A SQLite file. Opening a connection costs about a millisecond."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(
            str(path),
            path.parent,
            _engine("BEGIN", lambda: _open_reader(path)),
            # A transaction that reads first and writes later fails at once if another process wrote in between, whatever
            # the timeout; one that takes the write lock at its beginning waits its turn.
            _engine("BEGIN IMMEDIATE", lambda: _open_writer(path, foreign_keys=True)),
            # Migrations copy and drop tables that others refer to.
            _engine("BEGIN IMMEDIATE", lambda: _open_writer(path, foreign_keys=False)),
        )

    def exists(self) -> bool:
        with plain_disk_errors(self.path):
            return self.path.exists()

    def make_room(self) -> None:
        with plain_disk_errors(self.folder):
            make_folder(self.folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """By a lock on a neighbouring file, which dies with its holder and so is never stale."""
        lock = self.path.with_name(self.path.name + ".lock")
        with ExitStack() as held:
            with plain_database_errors(str(lock)):
                try:
                    held.enter_context(locked(lock, LOCK_SECONDS))
                except TimeoutError as error:
                    raise OverpaintError(
                        f"another process is making or upgrading {self.path} (it holds {lock}); wait for it to end"
                    ) from error
            yield

    def back_up(self, revision: str) -> None:
        """Beside the file, under a name that says from where the upgrade came; an earlier copy stays too."""
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
            with replacing(target, scratch=part, durable=True):
                _copy_pages(source, part)
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


def _engine(begin: str, connect: Callable[[], sqlite3.Connection]) -> Engine:
    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    @event.listens_for(engine, "commit")
    def on_commit(connection: Connection) -> None:
        reader = connection.connection.dbapi_connection
        if isinstance(reader, _Connection):
            reader.refuse_if_changed()

    return engine


class _Connection(sqlite3.Connection):
    """A connection that may do without locks on a file that nobody is writing, and notices when somebody did."""

    unlocked: tuple[Path, tuple[int, int, int]] | None = None

    def refuse_if_changed(self) -> None:
        if self.unlocked and _stamp(self.unlocked[0]) != self.unlocked[1]:
            raise OverpaintError(f"the registry {self.unlocked[0]} was changed while it was being read; run this again")


def _connect(path: Path, options: str = "") -> _Connection:
    # isolation_level=None stops the sqlite3 module from beginning transactions by itself; `_engine` does it.
    return sqlite3.connect(
        f"{path.as_uri()}{options}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        factory=_Connection,
    )


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _open_reader(path: Path) -> sqlite3.Connection:
    """A connection that leaves the database as it is, its journal mode too: it may turn out not to be ours.

    Who may not write the database makes no files beside it either: SQLite would leave a log that the owner cannot write.
    """
    if all(os.access(each, os.W_OK) for each in (path, path.parent)):
        connection = _connect(path)
        try:
            connection.execute(
                "PRAGMA schema_version"
            )  # opens the log and its index, for which the disk may be too full
            return _reading_only(connection)
        except sqlite3.OperationalError as error:
            connection.close()
            if not any(known in str(error) for known in ("disk I/O error", "is full", "unable to open")):
                raise
    log = path.with_name(path.name + "-wal")
    with plain_disk_errors(path):
        if log.exists() and log.stat().st_size:
            return _reading_only(_connect(path, "?mode=ro&readonly_shm=1"))
        # All there is stands in the file itself. Without locks no index of the log is needed, which takes 32 KB of disk.
        reader = _connect(path, "?mode=ro&immutable=1")
        reader.unlocked = path, _stamp(path)
    return _reading_only(reader)


def _reading_only(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.execute("PRAGMA query_only = ON")
    return connection


def _open_writer(path: Path, *, foreign_keys: bool) -> sqlite3.Connection:
    """A connection that may change the database, which is made if it is not there. The log has the file's own mode."""
    with plain_disk_errors(path.parent):
        if not path.exists():
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
                share(path)
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    connection = _connect(path)
    try:
        _prepare_writer(connection, path)
        connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare_writer(connection: sqlite3.Connection, path: Path) -> None:
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise OverpaintError(
            f"{path.parent} does not support SQLite's write-ahead log (got {mode!r}), as network folders do not; "
            "put the registry on a local disk"
        )
    # FULL, not the usual NORMAL: commits here are few and each may be hours of solving.
    connection.execute("PRAGMA synchronous = FULL")


WRITER, MAKER = 0x0EA9A1, 0x0EA9A2
"""Keys of the two locks that registries take; PostgreSQL keeps such locks for each database by itself."""

# One writer at a time, as on SQLite, so that what reads and then writes need not know which of the two it is on. The
# server may be configured to confirm commits early; a registry's are few, and each may be hours of solving.
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
    return PostgresDatabase(server, typed_path(blobs))


class PostgresDatabase(Database):
    """A database on a PostgreSQL server. Opening a connection costs some milliseconds."""

    def __init__(self, url: URL, folder: Path) -> None:
        engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": BUSY_SECONDS})
        writer = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": BUSY_SECONDS})
        event.listen(writer, "begin", _begin_writing)
        reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        where = printed_url(url.set(drivername="postgresql").render_as_string(hide_password=False))
        super().__init__(where, folder, reader, writer, writer)
        self._plain: Engine = engine

    def exists(self) -> bool:
        return True

    def make_room(self) -> None:
        with plain_disk_errors(self.folder):
            make_folder(self.folder)
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


FULL = "the disk that holds {path} is full; free some space and run this again. Nothing was changed"
READ_ONLY = "cannot write in {path}: it is read-only for this user; make it writable, or name another place"
UNREADABLE = "cannot read {path}: this user may not; ask its owner to allow it, or for a copy"
BUSY = "the registry {path} is busy: another process has been writing for 20 seconds; wait for it and run this again"
CANNOT_OPEN = "cannot open {path}; check that its folder exists and that this user may write there"
NOT_A_DATABASE = "{path} is not a SQLite database; name another registry, or move this file away"
DAMAGED = (
    "the database {path} is damaged ({reason}); keep a copy, then put back a backup (`registry.db.before-*` beside it)"
)
UNKNOWN_OPTION = "the URL {path} has an option that PostgreSQL does not know ({reason}); correct it or leave it out"
IO_ERROR = (
    "the disk that holds {path} is full or failing ({reason}); free some space, or check the disk, and run this again. "
    "Nothing was changed"
)
NO_SUCH_DATABASE = "there is no database {path}; make it with `createdb --encoding UTF8`, or name another registry"
NOT_LET_IN = "the server does not let this user into {path}; check the user and the password in the URL"
CANNOT_REACH = "cannot reach {path}; check that the server runs and lets this machine in ({reason})"

OF_DISK = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: READ_ONLY,
    errno.EACCES: READ_ONLY,
    errno.EPERM: READ_ONLY,
}
# By SQLite's fixed messages, because Python 3.10 does not give the error codes.
OF_SQLITE = {
    "database or disk is full": FULL,
    "disk I/O error": IO_ERROR,
    "attempt to write a readonly database": READ_ONLY,
    "database is locked": BUSY,
    "unable to open database file": CANNOT_OPEN,
    "file is not a database": NOT_A_DATABASE,
    "database disk image is malformed": DAMAGED,
    "vtable constructor failed": DAMAGED,
    "Could not decode to UTF-8": DAMAGED,
    # What is written follows from rows that were read, so those do not fit each other.
    "FOREIGN KEY constraint failed": DAMAGED,
    "UNIQUE constraint failed": DAMAGED,
}
# By the standard's codes, which PostgreSQL gives and SQLite does not.
OF_POSTGRES = {
    "53100": FULL,
    "25006": READ_ONLY,
    "42501": READ_ONLY,
    "55P03": BUSY,
    "3D000": NO_SUCH_DATABASE,
    "28P01": NOT_LET_IN,
    "28000": NOT_LET_IN,
}


@contextmanager
def plain_disk_errors(path: Path, *, reading: bool = False) -> Iterator[None]:
    """Turn any OSError in the block, which only reads or also writes, into an OverpaintError that names `path`."""
    try:
        yield
    except OSError as error:
        sentence = OF_DISK.get(error.errno or 0, "cannot use {path}: {reason}")
        if reading and sentence is READ_ONLY:
            sentence = UNREADABLE
        raise OverpaintError(sentence.format(path=path, reason=error.strerror or error)) from error


@contextmanager
def plain_database_errors(path: Path | str) -> Iterator[None]:
    """Turn a database's refusals in the block into an OverpaintError; what only a bug can cause passes through."""
    try:
        yield
    except (sqlite3.Error, DBAPIError) as error:
        # Handlers of SQLAlchemy's "connect" event raise the driver's own errors, everything later the wrapped ones.
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(cause, sqlite3.Error):
            sentence = next((text for known, text in OF_SQLITE.items() if known in str(cause)), None)
        else:
            sentence = _of_postgres(cause)
        if sentence is None:
            raise
        reason = printed(str(cause).strip().replace("\n", " "))
        kind = models.Damaged if sentence is DAMAGED else OverpaintError
        raise kind(sentence.format(path=path, reason=reason)) from error


def _of_postgres(error: BaseException | None) -> str | None:
    """By the code, or by having none: a connection that failed or broke."""
    code: str | None = getattr(error, "sqlstate", None)
    if code is None and "invalid connection option" in str(error):
        return UNKNOWN_OPTION
    if code is not None and not code.startswith(("08", "57P")):
        return OF_POSTGRES.get(code)
    if any(kind.__name__ == "OperationalError" for kind in type(error).__mro__):
        refusals = {"does not exist": NO_SUCH_DATABASE, "authentication failed": NOT_LET_IN}
        return next((text for known, text in refusals.items() if known in str(error)), CANNOT_REACH)
    return None
