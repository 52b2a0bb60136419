"""Which schema a registry has, and how it gets the one this program knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect

from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry import models
from overpaint.registry.database import REVISION, Database, RegistryVersionError, database_at

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent.parent / "migrations"


def connect(location: str | Path, *, create: bool) -> Database:
    """The database at `location`, of the schema this program knows; made if `create` and nothing is there.

    Raises NotFound if nothing is there, RegistryVersionError if its schema is older or newer, and OverpaintError for a
    database that is not a registry's, or a location that cannot hold one.
    """
    database = database_at(location)
    revision = current(database)
    if revision is None and create:
        revision = _create(database)
    if revision is None:
        raise _nothing_at(database)
    if revision != models.HEAD:
        raise _wrong_version(database, revision)
    return database


def current(database: Database) -> str | None:
    """The revision of `database`, or None for one that is missing or still empty. Raises OverpaintError if not ours."""
    if not database.exists():
        return None
    with database.reading() as session:
        tables = set(inspect(session.connection()).get_table_names())
        if not tables:
            return None
        if not {"alembic_version", "recipe_patch"} <= tables:
            raise OverpaintError(f"{database.where} is a database but not an Overpaint registry; name another")
        revision: str | None = session.scalar(REVISION)
        return revision


def upgrade(database: Database) -> str:
    """Bring an older registry to HEAD and return the revision it had; a copy of an SQLite file is kept beside it.

    Raises NotFound if there is none, RegistryVersionError if it is newer than this program.
    """
    if current(database) is None:
        raise _nothing_at(database)
    with database.alone():
        revision = current(database)
        assert revision is not None, "a registry vanished while it was being locked"
        if revision == models.HEAD:
            return revision
        if revision not in known_revisions():
            raise _wrong_version(database, revision)
        _run_migrations(database, back_up=revision)
    return revision


def known_revisions() -> list[str]:
    """The revisions this program has migrations for, newest first."""
    from alembic.script import ScriptDirectory

    return [script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()]


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, which other programs read from an alembic.ini."""
    from alembic.config import Config

    configuration = Config(attributes={"connection": connection})
    configuration.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return configuration


def _create(database: Database) -> str | None:
    database.make_room()
    with database.alone():
        if current(database) is None:  # another process may have been faster
            _run_migrations(database)
        return current(database)


def _run_migrations(database: Database, *, back_up: str | None = None) -> None:
    """All of them in one transaction: a killed process leaves the schema that was there before."""
    from alembic import command

    with database.migrating() as connection:
        if back_up is not None:  # now that nobody can write any more
            database.back_up(back_up)
        command.upgrade(config(connection), "head")
        broken = database.broken_reference(connection)
        if broken is not None:
            raise OverpaintError(f"{database.where} has a {broken} row that refers to nothing; nothing was changed")


def _nothing_at(database: Database) -> NotFound:
    return NotFound(f"no registry at {database.where}; run `overpaint init`")


def _wrong_version(database: Database, revision: str) -> RegistryVersionError:
    if revision in known_revisions():
        return RegistryVersionError(
            f"the registry at {database.where} has schema {revision} and this program needs {models.HEAD}; "
            "run `overpaint db upgrade`"
        )
    return RegistryVersionError(
        f"the registry at {database.where} has schema {revision}, which is newer than this program knows "
        f"({models.HEAD}); upgrade the program: `pip install --upgrade overpaint`"
    )
