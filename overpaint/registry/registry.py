"""The registry: the one object through which bases, concepts, patches and recipes are remembered and found again."""

from __future__ import annotations

from pathlib import Path

from overpaint.registry import schema
from overpaint.registry.bases import Bases
from overpaint.registry.concepts import Concepts
from overpaint.registry.database import Database, connect, database_at
from overpaint.registry.evaluations import Evaluations
from overpaint.registry.kept import Kept
from overpaint.registry.patches import Patches
from overpaint.registry.recipes import Recipes
from overpaint.registry.search import Search
from overpaint.registry.store import open_store
from overpaint.registry.tags import Tags


class Registry(Bases, Concepts, Patches, Recipes, Tags, Search, Evaluations, Kept):
    """A folder with `registry.db`, `blobs/` and, once something went bad, `quarantine/`; or the same with PostgreSQL.

    Every method is one transaction. Names are free text; where one is unknown, NotFound names the nearest. A full or
    read-only disk, a damaged database and a writer that does not finish raise OverpaintError.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.folder = database.folder
        self.blobs = open_store(self.folder)

    @classmethod
    def open(cls, location: str | Path, *, create: bool = True) -> Registry:
        """The registry at `location`: a folder, an sqlite:/// URL, or postgresql://HOST/DATABASE?blobs=FOLDER.

        Made if nothing is there and `create` allows. Raises NotFound if there is none, RegistryVersionError if its schema
        is older or newer than this program's, and OverpaintError if no registry can be there.
        """
        return cls(connect(location, create=create))

    @staticmethod
    def upgrade(location: str | Path) -> str:
        """Bring the registry at `location` to this program's schema and return the revision it had.

        A copy of an SQLite file is kept beside it; of a PostgreSQL database, take one with pg_dump before.
        """
        return schema.upgrade(database_at(location))
