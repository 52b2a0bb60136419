"""What a recipe held at any of its revisions, and what is different between two."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from overpaint.errors import NotFound
from overpaint.registry import models
from overpaint.registry.names import checked_tag
from overpaint.registry.queries import find, lookup, patches_by_id
from overpaint.registry.records import Difference, Laid, RecipeRecord


def find_revision(session: Session, key: str) -> tuple[models.Recipe, int]:
    """The recipe and the revision that `key` means: NAME (as it is now), NAME@NUMBER or NAME@TAG.

    A recipe whose name has an "@" goes before another's revision. Raises NotFound.
    """
    name, at, mark = key.rpartition("@")
    recipe = lookup(session, models.Recipe, key)
    if recipe is not None or not at or not name.strip() or not mark.strip():
        recipe = recipe or find(session, models.Recipe, key)
        return recipe, recipe.revision
    recipe = find(session, models.Recipe, name)
    return recipe, _numbered(recipe, int(mark)) if mark.isdecimal() else _tagged(session, recipe, mark)


def record_at(session: Session, recipe: models.Recipe, number: int) -> RecipeRecord:
    """`recipe` as it was at revision `number`."""
    if number == recipe.revision:
        return records_now(session, [recipe])[0]
    of_number = (models.Revision.recipe_id == recipe.id) & (models.Revision.number == number)
    digest = session.scalar(select(models.Revision.digest_after).where(of_number))
    return _record(recipe, number, laid_at(session, recipe, number), digest)


def records_now(session: Session, recipes: Sequence[models.Recipe]) -> list[RecipeRecord]:
    """All of `recipes` as they are."""
    newest = select(models.Recipe.id, models.Revision.digest_after).join(
        models.Revision,
        (models.Revision.recipe_id == models.Recipe.id) & (models.Revision.number == models.Recipe.revision),
    )
    if len(recipes) == 1:
        newest = newest.where(models.Recipe.id == recipes[0].id)
    digests = {row.id: row.digest_after for row in session.execute(newest)}
    return [_record(recipe, recipe.revision, laid_now(recipe), digests.get(recipe.id)) for recipe in recipes]


def _record(recipe: models.Recipe, number: int, laid: dict[str, Laid], digest: str | None) -> RecipeRecord:
    return RecipeRecord(
        name=recipe.name,
        base=recipe.base.name,
        revision=number,
        laid=tuple(laid[patch_id] for patch_id in sorted(laid)),
        digest=digest if number else recipe.base.fingerprint,
        tags=tuple((tag.tag, tag.revision) for tag in recipe.tags),
        created_at=recipe.created_at,
        deleted_at=recipe.deleted_at,
    )


def laid_now(recipe: models.Recipe) -> dict[str, Laid]:
    """What lies on `recipe`, by patch id."""
    return {row.patch_id: Laid(row.patch_id, row.strength, row.until) for row in recipe.patches}


def laid_at(session: Session, recipe: models.Recipe, number: int) -> dict[str, Laid]:
    """What lay on `recipe` at revision `number`: of each patch, what the last change up to then made of it."""
    changed, revision = models.RevisionPatch, models.Revision
    past = (revision.recipe_id == recipe.id) & (revision.number <= number)
    of_revision = revision.id == changed.revision_id
    last = select(changed.patch_id, func.max(revision.number).label("number")).join(revision, of_revision).where(past)
    each = last.group_by(changed.patch_id).subquery()
    is_last = (each.c.patch_id == changed.patch_id) & (each.c.number == revision.number)
    found: dict[str, Laid] = {}
    for row in session.scalars(select(changed).join(revision, of_revision).join(each, is_last).where(past)):
        if row.strength_after is not None:
            found[row.patch_id] = Laid(row.patch_id, row.strength_after, row.until_after)
    return found


def differences(session: Session, before: RecipeRecord, after: RecipeRecord) -> list[Difference]:
    """Every patch that does not lie on both alike, by concept."""
    first, second = ({each.patch: each for each in record.laid} for record in (before, after))
    changed = [patch_id for patch_id in {**first, **second} if first.get(patch_id) != second.get(patch_id)]
    patches = patches_by_id(session, changed)
    found = [Difference(each, patches[each].concept.name, first.get(each), second.get(each)) for each in changed]
    return sorted(found, key=lambda each: (each.concept, each.patch))


def _numbered(recipe: models.Recipe, number: int) -> int:
    if number > recipe.revision:
        raise NotFound(f"recipe {recipe.name!r} has no revision {number}; its newest is {recipe.revision}")
    return number


def _tagged(session: Session, recipe: models.Recipe, mark: str) -> int:
    tag = session.get(models.RecipeTag, (recipe.id, checked_tag(mark)))
    if tag is None:
        known = ", ".join(repr(each.tag) for each in recipe.tags) or "none"
        raise NotFound(
            f"recipe {recipe.name!r} has no revision {mark!r}; name a number up to {recipe.revision}, or a tag ({known})"
        )
    return tag.revision
