"""The registry's concepts."""

from __future__ import annotations

import json
from collections.abc import Iterable

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from overpaint.concepts import Concept
from overpaint.errors import AlreadyExists
from overpaint.registry import models, texts
from overpaint.registry.names import checked_json, checked_name, checked_note
from overpaint.registry.queries import find, lookup
from overpaint.registry.shelf import Shelf


class ConceptDiffers(AlreadyExists):
    """A concept that is known by another description."""


class Concepts(Shelf):
    """What can be erased. A concept changes only where somebody asks for it: patches keep the one they were solved for."""

    def add_concept(self, concept: Concept) -> None:
        """Remember a concept. Raises AlreadyExists if its name is taken, be it by an equal one."""
        self._keep_concept(concept, equal_is_fine=False)

    def ensure_concept(self, concept: Concept) -> None:
        """Remember a concept unless an equal one is there. Raises AlreadyExists if the name means something else."""
        self._keep_concept(concept, equal_is_fine=True)

    def learn_concepts(self, concepts: Iterable[Concept], *, update: bool = False) -> None:
        """Remember many concepts: all of them, or none. One that is there and equal is left alone.

        With `update`, one that is there by another description gets the new one. Raises ConceptDiffers, which shows both
        descriptions of each, without.
        """
        rows = [_row(concept) for concept in concepts]
        with self._database.writing() as session:
            known = {row.name: lookup(session, models.Concept, row.name) for row in rows}
            pairs = [(there, row) for row in rows if (there := known[row.name]) and _concept(there) != _concept(row)]
            if pairs and not update:
                raise ConceptDiffers(told_apart([(_concept(there), _concept(row)) for there, row in pairs]))
            for there, row in pairs:
                there.kind, there.definition = row.kind, row.definition
                _rewrite_texts(session, there)
            session.add_all(row for row in rows if known[row.name] is None)

    def _keep_concept(self, concept: Concept, *, equal_is_fine: bool) -> None:
        row = _row(concept)
        with self._database.writing() as session:
            known = lookup(session, models.Concept, row.name)
            if known is None:
                session.add(row)
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


def told_apart(pairs: Iterable[tuple[Concept, Concept]]) -> str:
    """The sentences that refuse concepts by another description than the one that is kept: (kept, asked) of each."""
    lines = [
        f"  {known.name}\n    kept here: {_described(known)}\n    asked for: {_described(wanted)}"
        for known, wanted in pairs
    ]
    return "\n".join(["some concepts are known here by another description; --update takes the new one:", *lines])


def _described(concept: Concept) -> str:
    said = {key: value for key, value in concept.as_json().items() if value and key != "name"}
    return json.dumps(said, ensure_ascii=False)


def _row(concept: Concept) -> models.Concept:
    name = checked_name(concept.name, "concept")
    for word in filter(None, (*concept.synonyms, concept.anchor)):
        checked_name(word, f"synonym or anchor of {name!r}")
    for prompt in concept.prompts:
        checked_note(prompt, f"a prompt of {name!r}")
    return models.Concept(
        name=name, kind=concept.kind, definition=checked_json(concept.as_json(), f"the concept {name!r}")
    )


def _rewrite_texts(session: Session, concept: models.Concept) -> None:
    """What a search finds patches by has the words of their concept."""
    for patch in session.scalars(select(models.Patch).where(models.Patch.concept_id == concept.id)):
        texts.keep_patch(session, patch, [tag.tag for tag in patch.tags])


def _concept(row: models.Concept) -> Concept:
    return Concept.from_json(json.loads(row.definition))
