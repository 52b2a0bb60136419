"""What a search reads: one short text for each patch, recipe and reason, in folded letters.

A search passes over all of them, newest first, and stops when it has a page. That takes a scan of the narrowest table
that can answer, which SQLite and PostgreSQL do alike; the index of words that each of them offers is its own.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from overpaint.concepts import Concept
from overpaint.registry import models

# What must match as a whole stands on a line of its own behind one of these, which no name and no search can contain.
KIND, SOLVER, BASE, TAG = "\x1c", "\x1d", "\x1e", "\x1f"


def folded(text: str) -> str:
    """`text` so that upper and lower case and compatible spellings are equal."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def keep_patch(session: Session, patch: models.Patch, tags: Iterable[str] = ()) -> None:
    """Write what a search finds `patch` by."""
    known = session.scalar(select(models.PatchText).where(models.PatchText.patch_id == patch.id))
    row = known or models.PatchText(patch_id=patch.id)
    concept = Concept.from_json(json.loads(patch.concept.definition))
    row.text = of_patch(concept, patch.kind, patch.solver, patch.base.name, patch.base_id, tags)
    session.add(row)


def of_patch(concept: Concept, kind: str, solver: str, base: str, base_id: int, tags: Iterable[str] = ()) -> str:
    """The words of a patch's concept, its kind, its solver and the name of its base; what must match exactly, marked."""
    words = [*concept.words, concept.anchor, concept.kind, kind, solver, base]
    marks = [(KIND, concept.kind), (SOLVER, solver), (BASE, str(base_id)), *((TAG, tag) for tag in tags)]
    return _text(words, marks)


def keep_recipe(session: Session, recipe: models.Recipe, tags: Iterable[str] = ()) -> None:
    """Write what a search finds `recipe` by, beside the reasons in its history: its name, its base and its tags."""
    of_recipe = (models.RecipeText.recipe_id == recipe.id) & (models.RecipeText.revision == 0)
    known = session.scalar(select(models.RecipeText).where(of_recipe))
    row = known or models.RecipeText(recipe_id=recipe.id, revision=0)
    row.text = _text([recipe.name, recipe.base.name], [(TAG, tag) for tag in tags])
    session.add(row)


def keep_reason(session: Session, revision: models.Revision) -> None:
    """Write the reason that somebody gave for a revision, if any, for a search."""
    if revision.why:
        text = _text([revision.why], [])
        session.add(models.RecipeText(recipe_id=revision.recipe_id, revision=revision.number, text=text))


def mentions(text: InstrumentedAttribute[str], words: Iterable[str]) -> list[ColumnElement[bool]]:
    """Conditions that `text` contains every one of `words`, in any order, also within other words."""
    return [text.contains(folded(word), autoescape=True) for word in words]


def is_marked(text: InstrumentedAttribute[str], mark: str, value: str) -> ColumnElement[bool]:
    """The condition that `text` has exactly `value` behind `mark`."""
    return text.contains(f"\n{mark}{folded(value)}\n", autoescape=True)


def _text(words: Iterable[str], marks: Iterable[tuple[str, str]]) -> str:
    lines = [*(folded(word) for word in words if word), *(f"{mark}{folded(value)}" for mark, value in marks)]
    return "\n".join(["", *lines, ""])
