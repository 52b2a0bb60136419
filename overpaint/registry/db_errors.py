"""What the disk and the database say when they refuse, in sentences a person can act on."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from overpaint.core.errors import OverpaintError
from overpaint.core.names import printed

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


class Damaged(OverpaintError):
    """A database that another program has changed."""


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
        kind = Damaged if sentence is DAMAGED else OverpaintError
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
