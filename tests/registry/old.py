"""Registries as earlier programs left them, from the files in `frozen/`."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from alembic import command
from sqlalchemy import MetaData, text

from overpaint.registry import schema
from overpaint.registry.database import database_at
from overpaint.registry.store import open_store

from .freeze import FOLDER, LABELS

REVISIONS = sorted(path.stem for path in FOLDER.glob("*.sql"))


def dump(revision: str) -> str:
    """What lies in `frozen/`: SQL that makes the database again."""
    return (FOLDER / f"{revision}.sql").read_text("utf-8")


def thaw(location: str | Path, revision: str) -> None:
    """Make the registry that was frozen at `revision`, blobs and all."""
    database = database_at(location)
    database.make_room()
    if isinstance(location, Path):
        with closing(sqlite3.connect(location / "registry.db")) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(dump(revision))
    else:
        with database.migrating() as connection:
            command.upgrade(schema.config(connection), revision)
        _copy_rows(location, revision)
    for label in LABELS:
        open_store(database.folder).put(label.encode())


def _copy_rows(location: str, revision: str) -> None:
    """The rows of a frozen SQLite file, put into a PostgreSQL database that has the same tables."""
    with closing(sqlite3.connect(":memory:")) as frozen, database_at(location).migrating() as connection:
        frozen.row_factory = sqlite3.Row
        frozen.executescript(dump(revision))
        tables = MetaData()
        tables.reflect(connection)
        for table in tables.sorted_tables:
            rows = [dict(row) for row in frozen.execute(f"SELECT * FROM {table.name}")]
            if table.name == "alembic_version" or not rows:
                continue
            connection.execute(table.insert(), rows)
            if table.columns.get("id") is not None and table.columns["id"].autoincrement is True:
                last = f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), max(id)) FROM {table.name}"
                connection.execute(text(last))
