"""What every shelf of the registry stands on: its database and its blobs. A shelf is the methods for one noun."""

from __future__ import annotations

from overpaint.registry.database import Database
from overpaint.registry.store import BlobStore


class Shelf:
    """The root of the shelves. Every method is one transaction."""

    _database: Database
    blobs: BlobStore
