"""What a pass over a whole registry has read so far, on the disk: there may be more blobs than memory has room for.

It is written down with each page of patches, so that a pass that was stopped can go on where it was. A folder that cannot be
written, or in which somebody else's pass is at work, gets one in a temporary place instead, which no other pass finds.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

SCHEMA = """
    CREATE TABLE IF NOT EXISTS blob (digest TEXT PRIMARY KEY, nbytes INTEGER) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS patch (id TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS note (text TEXT);
"""


class Ledger:
    """The patches and blobs that one pass has read, and what it noted down of them."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @property
    def last(self) -> str:
        """The greatest id of a patch that was read, or nothing."""
        return str(self._one("SELECT max(id) FROM patch") or "")

    def patch(self, id: str) -> None:
        """Write down that a patch was read."""
        self._connection.execute("INSERT OR IGNORE INTO patch VALUES (?)", (id,))

    def patches(self) -> Iterator[str]:
        """The ids of the patches that were read, sorted."""
        return (id for (id,) in self._connection.execute("SELECT id FROM patch ORDER BY id"))

    def blob(self, digest: str, nbytes: int = 0) -> None:
        """Write down a blob."""
        self._connection.execute("INSERT OR REPLACE INTO blob VALUES (?, ?)", (digest, nbytes))

    def has(self, digest: str) -> bool:
        """Whether a blob was written down."""
        return self._one("SELECT 1 FROM blob WHERE digest = ?", digest) is not None

    def note(self, text: str) -> None:
        """Write down a line."""
        self._connection.execute("INSERT INTO note VALUES (?)", (text,))

    def notes(self) -> list[str]:
        """The lines, in the order in which they were written."""
        return [text for (text,) in self._connection.execute("SELECT text FROM note ORDER BY rowid")]

    def totals(self) -> tuple[int, int, int]:
        """How many patches, how many blobs, and how many bytes these have."""
        every = "SELECT (SELECT count(*) FROM patch), count(*), coalesce(sum(nbytes), 0) FROM blob"
        patches, blobs, nbytes = self._connection.execute(every).fetchone()
        return patches, blobs, nbytes

    def save(self) -> None:
        """Make what was written down last beyond this program."""
        self._connection.commit()

    def _one(self, query: str, *values: str) -> object:
        row = self._connection.execute(query, values).fetchone()
        return row[0] if row else None


@contextmanager
def ledger(path: Path, *, resume: bool) -> Iterator[Ledger]:
    """The ledger at `path`, as it was left with `resume` and else a new one; it is gone after a block that ends well."""
    with tempfile.TemporaryDirectory(prefix="overpaint-") as elsewhere:
        try:
            connection = _opened(path, resume)
        except sqlite3.Error:
            path = Path(elsewhere) / path.name
            connection = _opened(path, resume)
        with closing(connection):
            try:
                yield Ledger(connection)
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.commit()
                raise
        path.unlink(missing_ok=True)


def _opened(path: Path, resume: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=0)
    try:
        # Nothing here need survive a power cut, and nobody else may write.
        connection.executescript(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = DELETE; PRAGMA synchronous = OFF"
        )
        connection.execute("BEGIN EXCLUSIVE")
        connection.commit()
        if not resume:
            connection.executescript("DROP TABLE IF EXISTS blob; DROP TABLE IF EXISTS patch; DROP TABLE IF EXISTS note")
        connection.executescript(SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection
