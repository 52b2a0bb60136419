"""The registry's concepts."""

from __future__ import annotations

import json

from sqlalchemy import func, select

from overpaint.concepts import Concept
from overpaint.errors import AlreadyExists
from overpaint.registry import models
from overpaint.registry.names import checked_json, checked_name
from overpaint.registry.queries import find, lookup
from overpaint.registry.shelf import Shelf


class Concepts(Shelf):
    """What can be erased. A concept is never changed, because patches were solved for it."""

    def add_concept(self, concept: Concept) -> None:
        """Remember a concept. Raises AlreadyExists if its name is taken, be it by an equal one."""
        self._keep_concept(concept, equal_is_fine=False)

    def ensure_concept(self, concept: Concept) -> None:
        """Remember a concept unless an equal one is there. Raises AlreadyExists if the name means something else."""
        self._keep_concept(concept, equal_is_fine=True)

    def _keep_concept(self, concept: Concept, *, equal_is_fine: bool) -> None:
        name = checked_name(concept.name, "concept")
        for word in filter(None, (*concept.synonyms, concept.anchor)):
            checked_name(word, f"synonym or anchor of {name!r}")
        definition = checked_json(concept.as_json(), f"the concept {name!r}")
        with self._database.writing() as session:
            known = lookup(session, models.Concept, name)
            if known is None:
                session.add(models.Concept(name=name, kind=concept.kind, definition=definition))
            elif not (equal_is_fine and _concept(known) == concept):
                raise AlreadyExists(
                    f"concept {known.name!r} is there already, as {known.definition}; choose another name"
                )

    def concepts(self, *, limit: int | None = None, offset: int = 0) -> list[Concept]:
        """All concepts, in the order they came, or `limit` of them after the first `offset`."""
        query = select(models.Concept).order_by(models.Concept.id).limit(limit).offset(offset)
        with self._database.reading() as session:
            return [_concept(row) for row in session.scalars(query)]

    def count_concepts(self) -> int:
        """How many there are."""
        with self._database.reading() as session:
            return session.scalar(select(func.count()).select_from(models.Concept)) or 0

    def concept(self, name: str) -> Concept:
        """The concept of that name. Raises NotFound."""
        with self._database.reading() as session:
            return _concept(find(session, models.Concept, name))


def _concept(row: models.Concept) -> Concept:
    return Concept.from_json(json.loads(row.definition))
