"""The rows of a registry, for the upkeep of all of them: every patch, and what contradicts itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime

from sqlalchemy import Date, Text, select, type_coerce
from sqlalchemy.orm import Session, selectinload

from overpaint.concepts import Concept
from overpaint.errors import OverpaintError
from overpaint.registry import models
from overpaint.registry.past import laid_at, laid_now
from overpaint.registry.registry import Registry

MANY = 1000
"""How many rows are fetched at a time."""


@dataclass(frozen=True)
class PatchRow:
    """What a row says of a patch's bytes; `concept` is a name, `fingerprint` that of the base."""

    id: str
    blob: str
    nbytes: int
    kind: str
    solver: str
    concept: str
    fingerprint: str


def patch_rows(registry: Registry) -> Iterator[PatchRow]:
    """Every patch of a registry, by id; all of one moment."""
    patch = models.Patch
    query = (
        select(
            patch.id, patch.blob, patch.nbytes, patch.kind, patch.solver, models.Concept.name, models.Base.fingerprint
        )
        .join(models.Concept, models.Concept.id == patch.concept_id)
        .join(models.Base, models.Base.id == patch.base_id)
        .order_by(patch.id)
    )
    with registry._database.reading() as session:
        for row in session.execute(query.execution_options(yield_per=MANY)):
            yield PatchRow(*row)


def row_problems(registry: Registry) -> list[str]:
    """What is wrong in the database itself: damage, references to nothing, rows that contradict each other."""
    with registry._database.reading() as session:
        # What cannot be read at all is said first, because nothing else can be checked then.
        unreadable = [*_damage(session), *_moments(session)]
        return unreadable or [*_concepts(session), *_patches(session), *_recipes(session)]


def _damage(session: Session) -> Iterator[str]:
    """A server checks its files and its references itself."""
    if session.get_bind().dialect.name != "sqlite":
        return
    connection = session.connection()
    for (verdict,) in connection.exec_driver_sql("PRAGMA integrity_check(20)"):
        if verdict != "ok":
            yield f"the database is damaged: {verdict}; put back a backup with `overpaint db restore`"
    for table, row, other, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield f"row {row} of {table} refers to a {other} that is not there"


def _moments(session: Session) -> Iterator[str]:
    """Times and days are text in SQLite, which takes any text for one."""
    for table in models.Row.metadata.sorted_tables:
        for column in table.columns:
            kind = {models.UtcTime: datetime, Date: date}.get(type(column.type))
            if kind is None:
                continue
            query = select(*table.primary_key.columns, type_coerce(column, Text)).where(column.is_not(None))
            for *key, text in session.execute(query.execution_options(yield_per=MANY)):
                try:
                    if isinstance(text, str):
                        kind.fromisoformat(text)
                except ValueError:
                    yield f"row {', '.join(map(str, key))} of {table.name} has {text!r} for {column.name}, which is no time"


def _concepts(session: Session) -> Iterator[str]:
    for row in session.scalars(select(models.Concept).execution_options(yield_per=MANY)):
        try:
            concept = Concept.from_json(json.loads(row.definition))
        except (ValueError, TypeError, AttributeError, OverpaintError) as error:
            yield f"the definition of the concept {row.name!r} cannot be read: {error}"
            continue
        if (concept.name, concept.kind) != (row.name, row.kind):
            yield f"the concept {row.name!r} ({row.kind}) is defined as {concept.name!r} ({concept.kind})"


def _patches(session: Session) -> Iterator[str]:
    query = select(models.Patch.id, models.Patch.settings).order_by(models.Patch.id)
    for id, settings in session.execute(query.execution_options(yield_per=MANY)):
        try:
            json.loads(settings)
        except ValueError as error:
            yield f"the settings of patch {id} cannot be read: {error}"


def _recipes(session: Session) -> Iterator[str]:
    """What lies on each recipe is what its history says, its revisions count without a gap, and its base fits."""
    together = selectinload(models.Recipe.patches).joinedload(models.RecipePatch.patch)
    for recipe in session.scalars(select(models.Recipe).options(together).order_by(models.Recipe.id)):
        numbers = select(models.Revision.number).where(models.Revision.recipe_id == recipe.id)
        found = list(session.scalars(numbers.order_by(models.Revision.number)))
        if found != list(range(1, recipe.revision + 1)):
            yield f"recipe {recipe.name!r} is at revision {recipe.revision}, and its history has {found[-20:]}"
        if laid_now(recipe) != laid_at(session, recipe, recipe.revision):
            yield f"what lies on recipe {recipe.name!r} is not what its history says"
        for laid in recipe.patches:
            if laid.patch.base_id != recipe.base_id:
                yield f"patch {laid.patch_id} lies on recipe {recipe.name!r}, which is on another base"
