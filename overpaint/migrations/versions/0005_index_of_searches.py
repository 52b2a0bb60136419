"""An index of the pieces of three letters that a search reads, so that a rare word is found among a million patches."""

from __future__ import annotations

import sqlite3
from typing import NoReturn

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Without positions: what the index finds is compared with the text itself, so that which rows have all pieces is enough.
SQLITE = (
    """
    CREATE VIRTUAL TABLE patch_pieces USING fts5(
        text, content='patch_text', content_rowid='id', tokenize='trigram case_sensitive 1', detail='none'
    )
    """,
    """
    CREATE TRIGGER patch_text_added AFTER INSERT ON patch_text BEGIN
        INSERT INTO patch_pieces (rowid, text) VALUES (new.id, new.text);
    END
    """,
    """
    CREATE TRIGGER patch_text_removed AFTER DELETE ON patch_text BEGIN
        INSERT INTO patch_pieces (patch_pieces, rowid, text) VALUES ('delete', old.id, old.text);
    END
    """,
    """
    CREATE TRIGGER patch_text_changed AFTER UPDATE ON patch_text BEGIN
        INSERT INTO patch_pieces (patch_pieces, rowid, text) VALUES ('delete', old.id, old.text);
        INSERT INTO patch_pieces (rowid, text) VALUES (new.id, new.text);
    END
    """,
    "INSERT INTO patch_pieces (patch_pieces) VALUES ('rebuild')",
)
TRIGRAM_SINCE = (3, 34)
"""The SQLite that first had pieces of three letters; on an older one, or one built without full-text search, a search reads
every text, as before."""
HAS_SEARCH = "SELECT count(*) FROM pragma_module_list WHERE name = 'fts5'"
POSTGRES = "CREATE INDEX ix_patch_text_pieces ON patch_text USING gin (text gin_trgm_ops)"


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        _index_on_sqlite()
    else:
        _index_on_postgres()


def _index_on_sqlite() -> None:
    if sqlite3.sqlite_version_info < TRIGRAM_SINCE or not op.get_bind().scalar(sa.text(HAS_SEARCH)):
        return
    for statement in SQLITE:
        op.execute(statement)


def _index_on_postgres() -> None:
    """Where the server has the extension and lets us use it; a search reads every text elsewhere, as before."""
    connection = op.get_bind()
    if not connection.scalar(sa.text("SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_trgm'")):
        return
    try:
        with connection.begin_nested():
            connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS pg_trgm"))
            connection.execute(sa.text(POSTGRES))
    except sa.exc.ProgrammingError:  # the owner of the database may, and whom the owner allows
        return


def downgrade() -> NoReturn:
    raise NotImplementedError("revision 0004 has no index of searches; put back the backup made before")
