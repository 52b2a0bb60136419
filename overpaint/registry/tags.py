"""The registry's tags, on patches and on recipes."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from overpaint.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import models, texts
from overpaint.registry.names import checked_note, checked_tag
from overpaint.registry.past import find_revision
from overpaint.registry.queries import find, find_patch
from overpaint.registry.records import TagRecord
from overpaint.registry.shelf import Shelf


class Tags(Shelf):
    """Words that people tie to patches and recipes. On a recipe, a tag also marks a revision."""

    def tag(self, tag: str, *, patches: Iterable[str] = (), recipes: Iterable[str] = (), who: str) -> list[TagRecord]:
        """Tie `tag` to patches and recipes: to all of them, or to none.

        A recipe is tagged as it is now, or as it was at NAME@NUMBER; NAME@TAG means that revision from then on. Raises
        NotFound, and AlreadyExists for what has the tag.
        """
        tag, who = checked_tag(tag), checked_note(who, "the name of who did it")
        with self._database.writing() as session:
            found = [_tag_recipe(session, key, tag, who) for key in recipes]
            found += [_tag_patch(session, key, tag, who) for key in patches]
        return _something(found)

    def untag(self, tag: str, *, patches: Iterable[str] = (), recipes: Iterable[str] = ()) -> list[TagRecord]:
        """Untie `tag` from patches and recipes: from all of them, or from none. Raises NotFound."""
        tag = checked_tag(tag)
        with self._database.writing() as session:
            found = [_untag_recipe(session, name, tag) for name in recipes]
            found += [_untag_patch(session, key, tag) for key in patches]
        return _something(found)

    def tags(self, tag: str | None = None) -> list[TagRecord]:
        """Every tag and what it is on, or one tag; by tag, recipes before patches. Deleted recipes are left out."""
        of_patches = select(models.PatchTag).order_by(models.PatchTag.at)
        of_recipes = select(models.RecipeTag).join(models.RecipeTag.recipe).where(models.Recipe.deleted_at.is_(None))
        of_recipes = of_recipes.order_by(models.RecipeTag.at)
        if tag is not None:
            of_patches = of_patches.where(models.PatchTag.tag == checked_tag(tag))
            of_recipes = of_recipes.where(models.RecipeTag.tag == checked_tag(tag))
        with self._database.reading() as session:
            found = [_on_recipe(row) for row in session.scalars(of_recipes)]
            found += [_on_patch(row) for row in session.scalars(of_patches)]
        return sorted(found, key=lambda each: each.tag)


def _something(found: list[TagRecord]) -> list[TagRecord]:
    if not found:
        raise OverpaintError("a tag is tied to something; name a patch or a recipe")
    return found


def _tag_patch(session: Session, key: str, tag: str, who: str) -> TagRecord:
    patch = find_patch(session, key)
    if session.get(models.PatchTag, (patch.id, tag)) is not None:
        raise AlreadyExists(f"patch {patch.id[:12]} ({patch.concept.name}) has the tag {tag!r} already")
    row = models.PatchTag(patch_id=patch.id, tag=tag, who=who)
    session.add(row)
    _rewrite_patch(session, patch)
    return _on_patch(row)


def _tag_recipe(session: Session, key: str, tag: str, who: str) -> TagRecord:
    recipe, number = find_revision(session, key)
    known = session.get(models.RecipeTag, (recipe.id, tag))
    if known is not None:
        raise AlreadyExists(
            f"recipe {recipe.name!r} has the tag {tag!r} already, at revision {known.revision}; remove it there first"
        )
    row = models.RecipeTag(recipe_id=recipe.id, tag=tag, revision=number, who=who)
    session.add(row)
    _rewrite_recipe(session, recipe)
    return _on_recipe(row)


def _untag_patch(session: Session, key: str, tag: str) -> TagRecord:
    patch = find_patch(session, key)
    row = session.get(models.PatchTag, (patch.id, tag))
    if row is None:
        raise NotFound(f"patch {patch.id[:12]} ({patch.concept.name}) does not have the tag {tag!r}")
    record = _on_patch(row)
    session.delete(row)
    _rewrite_patch(session, patch)
    return record


def _untag_recipe(session: Session, name: str, tag: str) -> TagRecord:
    recipe = find(session, models.Recipe, name)
    row = session.get(models.RecipeTag, (recipe.id, tag))
    if row is None:
        raise NotFound(f"recipe {recipe.name!r} does not have the tag {tag!r}")
    record = _on_recipe(row)
    session.delete(row)
    _rewrite_recipe(session, recipe)
    return record


def _rewrite_patch(session: Session, patch: models.Patch) -> None:
    session.flush()
    session.refresh(patch, ["tags"])
    texts.keep_patch(session, patch, [each.tag for each in patch.tags])


def _rewrite_recipe(session: Session, recipe: models.Recipe) -> None:
    session.flush()
    session.refresh(recipe, ["tags"])
    texts.keep_recipe(session, recipe, [each.tag for each in recipe.tags])


def _on_patch(row: models.PatchTag) -> TagRecord:
    return TagRecord(row.tag, "patch", row.patch_id, None, row.who, row.at)


def _on_recipe(row: models.RecipeTag) -> TagRecord:
    return TagRecord(row.tag, "recipe", row.recipe.name, row.revision, row.who, row.at)
