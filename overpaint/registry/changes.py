"""Changing a recipe: patches laid on, lifted off or laid otherwise, and the revision that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from overpaint.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import models, texts
from overpaint.registry.names import checked_note
from overpaint.registry.queries import chunks, patches_by_id
from overpaint.registry.records import Action, Laid


class RecipeMoved(OverpaintError):
    """A recipe that no longer holds what its change was worked out for."""


@dataclass(frozen=True)
class Note:
    """What a revision says beside what it does: why, who, and the digests of the weights before and after."""

    why: str
    who: str
    digest_before: str | None = None
    digest_after: str | None = None


def refuse_if_moved(recipe: models.Recipe, expected: int | None) -> None:
    """Raise RecipeMoved unless `recipe` is at the revision `expected`; None expects nothing."""
    if expected is not None and recipe.revision != expected:
        raise RecipeMoved(f"recipe {recipe.name!r} was changed by somebody else at the same moment; try again")


def change(session: Session, recipe: models.Recipe, patch: models.Patch, after: Laid | None, note: Note) -> int:
    """Lay `patch` on `recipe` as `after` says, or take it out if None; return the number of the new revision.

    Raises NotFound when taking out what is not there, AlreadyExists when nothing would change, and OverpaintError when
    the patch was made for another base.
    """
    row = session.get(models.RecipePatch, (recipe.id, patch.id))
    before = None if row is None else Laid(patch.id, row.strength, row.until)
    if after is not None and before is None:
        _refuse_other_base(recipe, patch)
    return revise(session, recipe, {patch.id: after}, _action(recipe, patch, before, after), note)


def exchange(session: Session, recipe: models.Recipe, new: Mapping[str, str], note: Note) -> int:
    """Lay patches in the place of others, as those lay, in one revision; `new` has their ids by the others'.

    Returns the revision's number. Raises NotFound for what is not there, AlreadyExists for a new patch that lies there or
    would be there twice, and OverpaintError for one that was made for another base.
    """
    rows = _rows(session, recipe, [*new, *new.values()])
    patches = patches_by_id(session, new.values())
    wanted: dict[str, Laid | None] = dict.fromkeys(new)
    for old, patch_id in new.items():
        if old not in rows or patch_id not in patches:
            raise NotFound(
                f"recipe {recipe.name!r} has no patch {old[:12]}, or there is no {patch_id[:12]} to replace it"
            )
        if patch_id in rows or patch_id in wanted:
            raise AlreadyExists(f"{_called(patches[patch_id])} would lie twice on recipe {recipe.name!r}")
        _refuse_other_base(recipe, patches[patch_id])
        wanted[patch_id] = Laid(patch_id, rows[old].strength, rows[old].until)
    return revise(session, recipe, wanted, "add", note)


def revise(
    session: Session,
    recipe: models.Recipe,
    wanted: Mapping[str, Laid | None],
    action: Action,
    note: Note,
    source: str | None = None,
) -> int:
    """Lay every patch of `wanted` as it says there, in one new revision of `recipe`; return the revision's number."""
    recipe.revision += 1
    revision = models.Revision(
        recipe_id=recipe.id,
        number=recipe.revision,
        action=action,
        source=source,
        why=checked_note(note.why, "a reason"),
        who=checked_note(note.who, "the name of who did it"),
        digest_before=note.digest_before,
        digest_after=note.digest_after,
    )
    rows = _rows(session, recipe, wanted)
    for patch_id, after in sorted(wanted.items()):
        row = rows.get(patch_id)
        revision.changes.append(_line(patch_id, row, after))
        _lay(session, recipe, patch_id, row, after)
    session.add(revision)
    texts.keep_reason(session, revision)
    session.flush()
    return revision.number


def _rows(session: Session, recipe: models.Recipe, patch_ids: Iterable[str]) -> dict[str, models.RecipePatch]:
    query = select(models.RecipePatch).where(models.RecipePatch.recipe_id == recipe.id)
    pieces = (query.where(models.RecipePatch.patch_id.in_(some)) for some in chunks(patch_ids))
    return {row.patch_id: row for piece in pieces for row in session.scalars(piece)}


def _line(patch_id: str, row: models.RecipePatch | None, after: Laid | None) -> models.RevisionPatch:
    return models.RevisionPatch(
        patch_id=patch_id,
        strength_before=row and row.strength,
        strength_after=after and after.strength,
        until_before=row and row.until,
        until_after=after and after.until,
    )


def _lay(
    session: Session, recipe: models.Recipe, patch_id: str, row: models.RecipePatch | None, after: Laid | None
) -> None:
    if after is None:
        assert row is not None, "a patch is taken out that does not lie there"
        session.delete(row)
    elif row is None:
        session.add(
            models.RecipePatch(recipe_id=recipe.id, patch_id=patch_id, strength=after.strength, until=after.until)
        )
    else:
        row.strength, row.until = after.strength, after.until


def _action(recipe: models.Recipe, patch: models.Patch, before: Laid | None, after: Laid | None) -> Action:
    if before is None:
        if after is None:
            raise NotFound(f"recipe {recipe.name!r} does not contain {_called(patch)}, so it cannot be taken out")
        return "add"
    if after is None:
        return "remove"
    if before == after:
        day = f" until {before.until}" if before.until else ""
        raise AlreadyExists(
            f"{_called(patch)} is already there: recipe {recipe.name!r} has it at strength {before.strength:g}{day}"
        )
    return "until" if before.strength == after.strength else "strength"


def _refuse_other_base(recipe: models.Recipe, patch: models.Patch) -> None:
    if patch.base_id != recipe.base_id:
        raise OverpaintError(
            f"{_called(patch)} was made for base {patch.base.name!r} ({patch.base.fingerprint}), "
            f"and recipe {recipe.name!r} lies on {recipe.base.name!r} ({recipe.base.fingerprint}); "
            f"solve {patch.concept.name!r} for {recipe.base.name!r}"
        )


def _called(patch: models.Patch) -> str:
    return f"patch {patch.id[:12]} ({patch.concept.name})"
