"""Changing a recipe: one patch laid on, lifted off, or made stronger, and the line of history that says so."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from overpaint.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import models
from overpaint.registry.records import Action


class RecipeMoved(OverpaintError):
    """A recipe that no longer holds what its change was worked out for."""


def change(session: Session, recipe: models.Recipe, patch: models.Patch, after: float | None) -> models.History:
    """Set `patch` to strength `after` in `recipe`, or take it out if None; return the line for the history, unsigned.

    Raises NotFound when taking out what is not there, AlreadyExists when nothing would change, and OverpaintError when
    the patch was made for another base.
    """
    laid = session.get(models.RecipePatch, (recipe.id, patch.id))
    before = None if laid is None else laid.strength
    action = _action(recipe, patch, before, after)
    if laid is None:
        _refuse_other_base(recipe, patch)
        session.add(models.RecipePatch(recipe_id=recipe.id, patch_id=patch.id, strength=after))
    elif after is None:
        session.delete(laid)
    else:
        laid.strength = after
    return models.History(
        recipe_id=recipe.id,
        revision=_next_revision(session, recipe),
        action=action,
        patch_id=patch.id,
        strength_before=before,
        strength_after=after,
    )


def _action(recipe: models.Recipe, patch: models.Patch, before: float | None, after: float | None) -> Action:
    if before is None and after is None:
        raise NotFound(f"recipe {recipe.name!r} does not contain {_called(patch)}, so it cannot be taken out")
    if before == after:
        raise AlreadyExists(f"{_called(patch)} is already there: recipe {recipe.name!r} has it at strength {before:g}")
    if before is None:
        return "add"
    return "remove" if after is None else "strength"


def _refuse_other_base(recipe: models.Recipe, patch: models.Patch) -> None:
    if patch.base_id != recipe.base_id:
        raise OverpaintError(
            f"{_called(patch)} was made for base {patch.base.name!r} ({patch.base.fingerprint}), "
            f"and recipe {recipe.name!r} lies on {recipe.base.name!r} ({recipe.base.fingerprint}); "
            f"solve {patch.concept.name!r} for {recipe.base.name!r}"
        )


def _next_revision(session: Session, recipe: models.Recipe) -> int:
    last = select(func.max(models.History.revision)).where(models.History.recipe_id == recipe.id)
    return (session.scalar(last) or 0) + 1


def _called(patch: models.Patch) -> str:
    return f"patch {patch.id[:12]} ({patch.concept.name})"
