"""A recipe's record laid into a registry, where nothing that is there already is lost."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from overpaint.errors import OverpaintError
from overpaint.registry import models, texts
from overpaint.registry.names import checked_name
from overpaint.registry.queries import added, lookup, patches_by_id
from overpaint.registry.registry import Registry
from overpaint.transport.records import Outcome, Record, compared, day, history, moment


def lay(registry: Registry, record: Record, base: str, name: str | None = None) -> Outcome:
    """Make the recipe of a record on the base of that name, or let the one that is there catch up with the record.

    `name` is another name for it here. Its patches must be in the registry. Raises Diverged when the recipe that is there
    has another history, OverpaintError when one of its patches is kept for another base.
    """
    with registry._database.writing() as session:
        wanted = _base(session, record, base)
        recipe = lookup(session, models.Recipe, name or record.name)
        outcome: Outcome = "new"
        if recipe is None:
            made = checked_name(name or record.name, "recipe")
            recipe = added(session, models.Recipe(name=made, base=wanted, created_at=record.created_at))
        else:
            outcome = compared(history(session, recipe), recipe.base.fingerprint, record, recipe.name)
        if outcome in ("new", "updated"):
            _append(session, recipe, record)
        if outcome != "newer here":
            _tag(session, recipe, record)
        return outcome


def _base(session: Session, record: Record, name: str) -> models.Base:
    """The base that the record's patches are kept for: there may be several of one fingerprint."""
    found = {patch.base_id: patch for patch in patches_by_id(session, record.patches).values()}
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise OverpaintError(
            f"the patches of recipe {record.name!r} are kept here for more than one base: {first.id[:12]} for "
            f"{first.base.name!r}, {second.id[:12]} for {second.base.name!r}; nothing was changed"
        )
    return next((patch.base for patch in found.values()), None) or _named(session, name)


def _named(session: Session, name: str) -> models.Base:
    base = lookup(session, models.Base, name)
    assert base is not None, "a base is never removed"
    return base


def _append(session: Session, recipe: models.Recipe, record: Record) -> None:
    for revision in record.revisions[recipe.revision :]:
        row = models.Revision(
            recipe_id=recipe.id,
            **{key: revision[key] for key in ("number", "action", "source", "why", "who")},
            at=moment(revision["at"]),
            digest_before=revision["digest_before"],
            digest_after=revision["digest_after"],
            changes=[
                models.RevisionPatch(
                    patch_id=change["patch"],
                    strength_before=change["strength_before"],
                    strength_after=change["strength_after"],
                    until_before=day(change["until_before"]),
                    until_after=day(change["until_after"]),
                )
                for change in revision["changes"]
            ],
        )
        session.add(row)
        texts.keep_reason(session, row)
    recipe.revision = len(record.revisions)
    for old in session.scalars(select(models.RecipePatch).where(models.RecipePatch.recipe_id == recipe.id)):
        session.delete(old)
    session.flush()
    for each in record.laid().values():
        row_now = models.RecipePatch(recipe_id=recipe.id, patch_id=each.patch, strength=each.strength, until=each.until)
        session.add(row_now)
    session.flush()


def _tag(session: Session, recipe: models.Recipe, record: Record) -> None:
    """Tags that are here already stay on their revisions."""
    for tag in record.tags:
        if session.get(models.RecipeTag, (recipe.id, tag["tag"])) is None:
            marks = {key: tag[key] for key in ("tag", "revision", "who")}
            session.add(models.RecipeTag(recipe_id=recipe.id, at=moment(tag["at"]), **marks))
    session.flush()
    session.refresh(recipe, ["tags"])
    texts.keep_recipe(session, recipe, [each.tag for each in recipe.tags])
