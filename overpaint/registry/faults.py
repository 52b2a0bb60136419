"""What the disk and SQLite say when they refuse, in sentences a person can act on."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from overpaint.errors import OverpaintError

FULL = "the disk that holds {path} is full; free some space and run this again. Nothing was changed"
READ_ONLY = "cannot write in {path}: it is read-only for this user; make it writable, or name another registry"
BUSY = "the registry {path} is busy: another process has been writing for 20 seconds; wait for it and run this again"
CANNOT_OPEN = "cannot open {path}; check that its folder exists and that this user may write there"
NOT_A_DATABASE = "{path} is not a SQLite database; name another registry, or move this file away"
DAMAGED = "the database {path} is damaged; keep a copy of it, then put back a backup (`registry.db.before-*` beside it)"

OF_DISK = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: READ_ONLY,
    errno.EACCES: READ_ONLY,
    errno.EPERM: READ_ONLY,
}
# By SQLite's fixed messages, because Python 3.10 does not tell the error codes.
OF_SQLITE = {
    "database or disk is full": FULL,
    "attempt to write a readonly database": READ_ONLY,
    "database is locked": BUSY,
    "unable to open database file": CANNOT_OPEN,
    "file is not a database": NOT_A_DATABASE,
    "database disk image is malformed": DAMAGED,
}


@contextmanager
def plain_disk_errors(path: Path) -> Iterator[None]:
    """Turn any OSError in the block into an OverpaintError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        sentence = OF_DISK.get(error.errno or 0, "cannot use {path}: {reason}")
        raise OverpaintError(sentence.format(path=path, reason=error.strerror or error)) from error


@contextmanager
def plain_database_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's refusals in the block into an OverpaintError; an error that only a bug can cause passes through."""
    try:
        yield
    except (sqlite3.Error, DBAPIError) as error:
        # Handlers of SQLAlchemy's "connect" event raise the driver's own errors, everything later the wrapped ones.
        message = str(error.orig if isinstance(error, DBAPIError) else error)
        for known, sentence in OF_SQLITE.items():
            if known in message:
                raise OverpaintError(sentence.format(path=path)) from error
        raise
