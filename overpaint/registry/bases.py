"""The registry's bases."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import select

from overpaint.errors import AlreadyExists
from overpaint.registry import models
from overpaint.registry.names import checked_name, checked_note
from overpaint.registry.queries import added, find, lookup
from overpaint.registry.records import BaseRecord
from overpaint.registry.shelf import Shelf


class Bases(Shelf):
    """Base models, each under a name of its own."""

    def add_base(self, name: str, source: Path, layout: str, fingerprint: str) -> BaseRecord:
        """Remember a base under `name`; `source` is kept as it is given. Raises AlreadyExists if the name is taken."""
        with self._database.writing() as session:
            known = lookup(session, models.Base, name)
            if known is not None:
                raise AlreadyExists(f"base {known.name!r} is there already ({known.source}); choose another name")
            row = models.Base(
                name=checked_name(name, "base"),
                source=checked_note(str(source), "the source of a base"),
                layout=checked_name(layout, "layout"),
                fingerprint=checked_name(fingerprint, "fingerprint"),
            )
            return BaseRecord.of(added(session, row))

    def bases(self) -> list[BaseRecord]:
        """All bases, in the order they came."""
        with self._database.reading() as session:
            return [BaseRecord.of(row) for row in session.scalars(select(models.Base).order_by(models.Base.id))]

    def base(self, name: str) -> BaseRecord:
        """The base of that name. Raises NotFound."""
        with self._database.reading() as session:
            return BaseRecord.of(find(session, models.Base, name))
