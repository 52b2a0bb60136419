"""A recipe's revisions: reading one, writing the next, comparing two histories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session, selectinload

from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.core.names import checked_note, checked_number, checked_tag, shown, sought_name
from overpaint.registry import models, queries
from overpaint.registry.queries import chunks, find, lookup, patches_by_id
from overpaint.registry.records import Action, Difference, RecipeEntry, RecipeRecord, Revision, action_of


def find_revision(session: Session, key: str) -> tuple[models.RecipeRow, int]:
    """The recipe and the revision that `key` means: NAME (as it is now), NAME@NUMBER or NAME@TAG.

    A recipe whose name has an "@" goes before another's revision. Raises NotFound.
    """
    name, at, mark = sought_name(key, "recipe").rpartition("@")
    recipe = lookup(session, models.RecipeRow, key)
    if recipe is not None or not at or not name.strip() or not mark.strip():
        recipe = recipe or find(session, models.RecipeRow, key)
        return recipe, recipe.revision
    recipe = find(session, models.RecipeRow, name)
    return recipe, _numbered(recipe, int(mark)) if mark.isdecimal() else _tagged(session, recipe, mark)


def record_at(session: Session, recipe: models.RecipeRow, number: int) -> RecipeRecord:
    """`recipe` as it was at revision `number`."""
    if number == recipe.revision:
        return records_now(session, [recipe])[0]
    of_number = (models.RevisionRow.recipe_id == recipe.id) & (models.RevisionRow.number == number)
    digest = session.scalar(select(models.RevisionRow.digest_after).where(of_number))
    return _record(recipe, number, entries_at(session, recipe, number), digest)


def records_now(session: Session, recipes: Sequence[models.RecipeRow]) -> list[RecipeRecord]:
    """All of `recipes` as they are."""
    newest = select(models.RecipeRow.id, models.RevisionRow.digest_after).join(
        models.RevisionRow,
        (models.RevisionRow.recipe_id == models.RecipeRow.id)
        & (models.RevisionRow.number == models.RecipeRow.revision),
    )
    entry = models.RecipePatchRow
    # Columns, not objects: a recipe may have thousands of patches, and a list has fifty recipes.
    lines = select(entry.recipe_id, entry.patch_id, entry.strength, entry.until)
    digests: dict[int, str | None] = {}
    entries: dict[int, dict[str, RecipeEntry]] = {recipe.id: {} for recipe in recipes}
    for some in chunks(entries):
        digests.update(
            (row.id, row.digest_after) for row in session.execute(newest.where(models.RecipeRow.id.in_(some)))
        )
        for recipe_id, patch, strength, until in session.execute(lines.where(entry.recipe_id.in_(some))):
            entries[recipe_id][patch] = RecipeEntry(patch, strength, until)
    return [_record(recipe, recipe.revision, entries[recipe.id], digests.get(recipe.id)) for recipe in recipes]


def _record(recipe: models.RecipeRow, number: int, entries: dict[str, RecipeEntry], digest: str | None) -> RecipeRecord:
    return RecipeRecord(
        name=recipe.name,
        base=recipe.base.name,
        revision=number,
        entries=tuple(entries[patch_id] for patch_id in sorted(entries)),
        digest=digest if number else recipe.base.fingerprint,
        tags=tuple((tag.tag, tag.revision) for tag in recipe.tags),
        created_at=recipe.created_at,
        deleted_at=recipe.deleted_at,
    )


def entries_now(recipe: models.RecipeRow) -> dict[str, RecipeEntry]:
    """The patches of `recipe`, by id."""
    return {row.patch_id: RecipeEntry(row.patch_id, row.strength, row.until) for row in recipe.patches}


def entries_at(session: Session, recipe: models.RecipeRow, number: int) -> dict[str, RecipeEntry]:
    """The patches of `recipe` at revision `number`: for each, the last change up to then."""
    changed, revision = models.RevisionPatchRow, models.RevisionRow
    until_then = (revision.recipe_id == recipe.id) & (revision.number <= number)
    of_revision = revision.id == changed.revision_id
    last = (
        select(changed.patch_id, func.max(revision.number).label("number"))
        .join(revision, of_revision)
        .where(until_then)
    )
    each = last.group_by(changed.patch_id).subquery()
    is_last = (each.c.patch_id == changed.patch_id) & (each.c.number == revision.number)
    entries: dict[str, RecipeEntry] = {}
    for row in session.scalars(select(changed).join(revision, of_revision).join(each, is_last).where(until_then)):
        if row.strength_after is not None:
            entries[row.patch_id] = RecipeEntry(row.patch_id, row.strength_after, row.until_after)
    return entries


def differences(session: Session, before: RecipeRecord, after: RecipeRecord) -> list[Difference]:
    """Every patch that differs between the two, by concept."""
    first, second = ({each.patch: each for each in record.entries} for record in (before, after))
    changed = [patch_id for patch_id in {**first, **second} if first.get(patch_id) != second.get(patch_id)]
    patches = patches_by_id(session, changed)
    changes = [Difference(each, patches[each].concept.name, first.get(each), second.get(each)) for each in changed]
    return sorted(changes, key=lambda each: (each.concept, each.patch))


def _numbered(recipe: models.RecipeRow, number: int) -> int:
    if number > recipe.revision:
        raise NotFound(f"recipe {recipe.name!r} has no revision {number}; its newest is {recipe.revision}")
    return number


def _tagged(session: Session, recipe: models.RecipeRow, mark: str) -> int:
    tag = session.get(models.RecipeTagRow, (recipe.id, checked_tag(mark)))
    if tag is None:
        known = ", ".join(repr(each.tag) for each in recipe.tags) or "none"
        raise NotFound(
            f"recipe {recipe.name!r} has no revision {mark!r}; name a number up to {recipe.revision}, or a tag ({known})"
        )
    return tag.revision


class HistoriesDiverged(OverpaintError):
    """Two recipes of one name whose histories diverged."""


MergeOutcome = Literal["new", "updated", "the same", "newer here"]


def compare_histories(
    name: str, ours: Sequence[object], fingerprint: str, theirs: Sequence[object], their_fingerprint: str
) -> Literal["updated", "the same", "newer here"]:
    """How the revisions `theirs` continue `ours` or the other way round, each with the fingerprint of its base.

    Raises HistoriesDiverged when neither continues the other.
    """
    common = min(len(ours), len(theirs))
    different = next((n for n in range(common) if ours[n] != theirs[n]), None)
    if different is not None or fingerprint != their_fingerprint:
        at = "the base" if different is None else f"revision {different + 1}"
        raise HistoriesDiverged(
            f"the recipe {name!r} is there already and has another history, from {at} on; neither was changed. "
            "Give one of them another name"
        )
    if len(ours) == len(theirs):
        return "the same"
    return "newer here" if len(ours) > common else "updated"


def revisions_of(session: Session, recipe: models.RecipeRow) -> tuple[Revision, ...]:
    """Every revision of a recipe, oldest first."""
    of_recipe = models.RevisionRow.recipe_id == recipe.id
    query = select(models.RevisionRow).where(of_recipe).order_by(models.RevisionRow.number)
    return tuple(map(Revision.of, session.scalars(query.options(selectinload(models.RevisionRow.changes)))))


def append_revisions(session: Session, recipe: models.RecipeRow, revisions: Iterable[Revision]) -> None:
    """Add revisions that continue a recipe's history, as they were made elsewhere, and their patches to the recipe."""
    entries: dict[str, RecipeEntry | None] = {}
    for each in revisions:
        row = models.RevisionRow(
            recipe_id=recipe.id,
            number=each.number,
            action=each.action,
            source=each.source,
            why=each.why,
            who=each.who,
            at=each.at,
            digest_before=each.digest_before,
            digest_after=each.digest_after,
            changes=[_change_row(change.patch, change.before, change.after) for change in each.changes],
        )
        session.add(row)
        queries.index_reason(session, row)
        recipe.revision = each.number
        entries.update({change.patch: change.after for change in each.changes})
    rows = _rows(session, recipe, entries)
    for patch_id, after in entries.items():
        if after is not None or patch_id in rows:
            _set_entry(session, recipe, patch_id, rows.get(patch_id), after)
    session.flush()


class StaleRevision(OverpaintError):
    """A recipe that changed after its own change was computed."""


@dataclass(frozen=True)
class Note:
    """What a revision records beside its changes: why, who, and the digests of the weights before and after."""

    why: str
    who: str
    digest_before: str | None = None
    digest_after: str | None = None


def refuse_stale(recipe: models.RecipeRow | RecipeRecord, seen: int | RecipeRecord | None) -> None:
    """Raise StaleRevision unless `recipe` is as it was when a change was made from it; None is any.

    Only a record tells a recipe from one that was deleted and made again under its name.
    """
    if isinstance(seen, RecipeRecord) and recipe.created_at != seen.created_at:
        raise StaleRevision(
            f"the recipe {recipe.name!r} was deleted and made again since this change was made from it; look at what it holds "
            "and try again"
        )
    revision = seen.revision if isinstance(seen, RecipeRecord) else seen
    if revision is not None and recipe.revision != revision:
        raise StaleRevision(
            f"the recipe {recipe.name!r} is at revision {recipe.revision} by now, and this change was made from {revision}; "
            "look at what changed and try again"
        )


LARGEST_STRENGTH = 1e6
"""No weights of half precision stay finite at such a strength, and no use of one is known."""


def today() -> date:
    """The day it is, in UTC: what expires on it has expired."""
    return models.now().date()


def check_entry(before: RecipeEntry | None, after: RecipeEntry) -> None:
    """Raise OverpaintError for a strength that is none, and for an expiry that is new and past; an old one may stay."""
    if abs(checked_number(after.strength, "a strength")) > LARGEST_STRENGTH:
        raise OverpaintError(
            f"a strength is at most {LARGEST_STRENGTH:,.0f}, and at least minus that; got {after.strength:g}"
        )
    if after.until is not None and type(after.until) is not date:  # a moment has no place in the database
        raise OverpaintError(f"a patch expires on a day, a `datetime.date`, or never; got {shown(after.until)}")
    is_new = before is None or before.until != after.until
    if is_new and after.until is not None and after.until < (now := today()):
        raise OverpaintError(
            f"a patch cannot expire on {after.until}, which is past: today is {now}, in UTC; name a day to come, or never"
        )


def check_changes(
    session: Session,
    name: str,
    base: models.BaseRow,
    before: Mapping[str, RecipeEntry],
    wanted: Mapping[str, RecipeEntry | None],
) -> list[Action]:
    """What setting patches as in `wanted` does to each of a recipe on `base` that holds `before`. Raises as `change` does."""
    patches = patches_by_id(session, wanted)
    actions: list[Action] = []
    for patch_id, after in wanted.items():
        if patch_id not in patches:
            raise NotFound(f"no patch has the id {patch_id}; give the full id, as `Registry.patch` returns it")
        there = before.get(patch_id)
        if after is not None:
            check_entry(there, after)
            if there is None:
                _refuse_other_base(name, base, patches[patch_id])
        _refuse_no_change(name, patches[patch_id], there, after)
        strengths = (None if entry is None else entry.strength for entry in (there, after))
        actions.append(action_of(*strengths))
    return actions


def change(session: Session, recipe: models.RecipeRow, wanted: Mapping[str, RecipeEntry | None], note: Note) -> int:
    """Set patches of `recipe` as in `wanted`, or remove those that are None; return the new revision's number.

    Raises NotFound for a patch that is not there or taking out what is not on the recipe, AlreadyExists when nothing would
    change for one of them, and OverpaintError when one was made for another base, for a strength that is not finite or far
    too large, and for a new expiry that is past.
    """
    before = {id: RecipeEntry(id, row.strength, row.until) for id, row in _rows(session, recipe, wanted).items()}
    actions = check_changes(session, recipe.name, recipe.base, before, wanted)
    # What a revision did to each patch follows from the patch's line; a mixed one is called by the first.
    return revise(session, recipe, wanted, actions[0], note)


def exchange(session: Session, recipe: models.RecipeRow, new: Mapping[str, str], note: Note) -> int:
    """Replace patches, keeping strength and expiry, in one revision; `new` maps old id to new id.

    Returns the revision's number. Raises NotFound for what is not there, AlreadyExists for a new patch that is on the recipe or
    would be twice, and OverpaintError for one that was made for another base.
    """
    rows = _rows(session, recipe, [*new, *new.values()])
    patches = patches_by_id(session, new.values())
    wanted: dict[str, RecipeEntry | None] = dict.fromkeys(new)
    for old, patch_id in new.items():
        if old not in rows or patch_id not in patches:
            raise NotFound(
                f"recipe {recipe.name!r} has no patch {old[:12]}, or there is no {patch_id[:12]} to replace it"
            )
        if patch_id in rows or patch_id in wanted:
            raise AlreadyExists(f"{_called(patches[patch_id])} would be twice on recipe {recipe.name!r}")
        _refuse_other_base(recipe.name, recipe.base, patches[patch_id])
        wanted[patch_id] = RecipeEntry(patch_id, rows[old].strength, rows[old].until)
    return revise(session, recipe, wanted, "add", note)


def revise(
    session: Session,
    recipe: models.RecipeRow,
    wanted: Mapping[str, RecipeEntry | None],
    action: Action,
    note: Note,
    source: str | None = None,
) -> int:
    """Set every patch of `wanted` (None: remove it) in one new revision of `recipe`; return the revision's number."""
    recipe.revision += 1
    revision = models.RevisionRow(
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
        before = None if row is None else RecipeEntry(patch_id, row.strength, row.until)
        revision.changes.append(_change_row(patch_id, before, after))
        _set_entry(session, recipe, patch_id, row, after)
    session.add(revision)
    queries.index_reason(session, revision)
    session.flush()
    return revision.number


def _rows(session: Session, recipe: models.RecipeRow, patch_ids: Iterable[str]) -> dict[str, models.RecipePatchRow]:
    query = select(models.RecipePatchRow).where(models.RecipePatchRow.recipe_id == recipe.id)
    pieces = (query.where(models.RecipePatchRow.patch_id.in_(some)) for some in chunks(patch_ids))
    return {row.patch_id: row for piece in pieces for row in session.scalars(piece)}


def _change_row(patch_id: str, before: RecipeEntry | None, after: RecipeEntry | None) -> models.RevisionPatchRow:
    return models.RevisionPatchRow(
        patch_id=patch_id,
        strength_before=before and before.strength,
        strength_after=after and after.strength,
        until_before=before and before.until,
        until_after=after and after.until,
    )


def _set_entry(
    session: Session,
    recipe: models.RecipeRow,
    patch_id: str,
    row: models.RecipePatchRow | None,
    after: RecipeEntry | None,
) -> None:
    if after is None:
        assert row is not None, "a patch is removed that is not there"
        session.delete(row)
    elif row is None:
        session.add(
            models.RecipePatchRow(recipe_id=recipe.id, patch_id=patch_id, strength=after.strength, until=after.until)
        )
    else:
        row.strength, row.until = after.strength, after.until


def _refuse_no_change(name: str, patch: models.PatchRow, before: RecipeEntry | None, after: RecipeEntry | None) -> None:
    if before is None and after is None:
        raise NotFound(f"recipe {name!r} does not contain {_called(patch)}, so it cannot be removed")
    if before is not None and before == after:
        day = f", expires {before.until}" if before.until else ""
        raise AlreadyExists(
            f"{_called(patch)} is already there: recipe {name!r} has it at strength {before.strength:g}{day}"
        )


def _refuse_other_base(name: str, base: models.BaseRow, patch: models.PatchRow) -> None:
    if patch.base.fingerprint != base.fingerprint:
        raise OverpaintError(
            f"{_called(patch)} was made for base {patch.base.name!r} ({patch.base.fingerprint}), "
            f"and recipe {name!r} has the base {base.name!r} ({base.fingerprint}); "
            f"solve {patch.concept.name!r} for {base.name!r}"
        )


def _called(patch: models.PatchRow) -> str:
    return f"patch {patch.id[:12]} ({patch.concept.name})"
