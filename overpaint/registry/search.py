"""The registry's search: words in patches, in recipes and in the reasons of their history."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from overpaint.errors import OverpaintError
from overpaint.registry import models
from overpaint.registry.names import checked_name, checked_tag
from overpaint.registry.past import records_now
from overpaint.registry.queries import find, patches_by_id
from overpaint.registry.records import Found, PatchRecord, RecipeRecord
from overpaint.registry.shelf import Shelf
from overpaint.registry.texts import BASE, KIND, SOLVER, TAG, is_marked, mentions


class Search(Shelf):
    """Finding by what is written anywhere, not by name."""

    def search(
        self,
        text: str = "",
        *,
        kind: str | None = None,
        solver: str | None = None,
        tag: str | None = None,
        base: str | None = None,
        limit: int | None = 50,
        offset: int = 0,
    ) -> Found:
        """What mentions every word of `text` and is of the kind of concept, solver, tag and base asked for.

        Words are looked for also inside longer ones, and capitals do not matter. A patch is found by its concept's name,
        synonyms, anchor and kind, by its own kind, its solver, its base and its tags. A recipe is found by its name, base
        and tags, or by one of the reasons in its history; it has no kind and no solver, so asking for one leaves recipes
        out. Each list is newest first, `limit` long at most, after the first `offset`. Raises OverpaintError when nothing
        is asked for, NotFound for an unknown base.
        """
        words = checked_name(text, "search").split() if text.strip() else []
        if not words and {kind, solver, tag, base} == {None}:
            raise OverpaintError("say what to search for: words, or a kind, a solver, a tag or a base")
        with self._database.reading() as session:
            base_id = None if base is None else find(session, models.Base, base).id
            marks = [(KIND, kind), (SOLVER, solver), (TAG, tag and checked_tag(tag)), (BASE, base_id)]
            given = [(mark, checked_name(str(value), "search")) for mark, value in marks if value is not None]
            recipes: list[RecipeRecord] = []
            if kind is None and solver is None:
                recipes = _recipes(session, words, tag, base_id, limit, offset)
            return Found(_patches(session, words, given, limit, offset), tuple(recipes))


def _patches(
    session: Session, words: Sequence[str], marks: Sequence[tuple[str, str]], limit: int | None, offset: int
) -> tuple[PatchRecord, ...]:
    text = models.PatchText.text
    conditions = [*mentions(text, words), *(is_marked(text, mark, value) for mark, value in marks)]
    page = select(models.PatchText.patch_id).where(*conditions).order_by(models.PatchText.id.desc())
    ids = session.scalars(page.limit(limit).offset(offset)).all()
    by_id = patches_by_id(session, ids)
    return tuple(PatchRecord.of(by_id[each]) for each in ids)


def _recipes(
    session: Session, words: Sequence[str], tag: str | None, base_id: int | None, limit: int | None, offset: int
) -> list[RecipeRecord]:
    query = select(models.Recipe).where(models.Recipe.deleted_at.is_(None))
    if words:
        mentioned = select(models.RecipeText.recipe_id).where(*mentions(models.RecipeText.text, words))
        query = query.where(models.Recipe.id.in_(mentioned))
    if tag is not None:
        tagged = select(models.RecipeTag.recipe_id).where(models.RecipeTag.tag == checked_tag(tag))
        query = query.where(models.Recipe.id.in_(tagged))
    if base_id is not None:
        query = query.where(models.Recipe.base_id == base_id)
    return records_now(
        session, session.scalars(query.order_by(models.Recipe.id.desc()).limit(limit).offset(offset)).all()
    )
