"""A recipe's record laid into a registry, where nothing that is there already is lost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from typing import Any, Literal, get_args

from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from overpaint.core.digests import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.core.names import checked_name, checked_note, checked_tag
from overpaint.registry import models, queries
from overpaint.registry.queries import added, find, lookup
from overpaint.registry.records import Action, RecipeEntry
from overpaint.registry.registry import Registry
from overpaint.registry.store import DIGEST
from overpaint.registry.store.patch_files import BadManifest, read_json

# A recipe with its whole history as one JSON record.
#
# Histories only grow. One that continues another may take its place; two that went different ways are refused, because
# neither may be thrown away.


FORMAT = 1
LIMIT = 64 << 20

Outcome = Literal["new", "updated", "the same", "newer here"]


class BadRecipeRecord(OverpaintError):
    """A recipe's record that contradicts itself."""


class HistoriesDiverged(OverpaintError):
    """Two recipes of one name whose histories went different ways."""


@dataclass(frozen=True)
class Record:
    """A recipe: its name, the fingerprint of its base, its revisions from 1 on, its tags; `raw` is all that as JSON."""

    raw: bytes
    name: str
    base: str
    fingerprint: str
    created_at: datetime
    revisions: tuple[Mapping[str, Any], ...]
    tags: tuple[Mapping[str, Any], ...]

    @property
    def digest(self) -> str:
        """sha256 of the JSON."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def patches(self) -> list[str]:
        """The ids of all patches that the history names, sorted."""
        return sorted({change["patch"] for revision in self.revisions for change in revision["changes"]})

    def laid(self) -> dict[str, RecipeEntry]:
        """What lies on the recipe in the end, by patch id."""
        found: dict[str, RecipeEntry] = {}
        for revision in self.revisions:
            for change in revision["changes"]:
                if change["strength_after"] is None:
                    found.pop(change["patch"], None)
                else:
                    found[change["patch"]] = RecipeEntry(
                        change["patch"], change["strength_after"], day(change["until_after"])
                    )
        return found


def record_of(registry: Registry, name: str) -> Record:
    """The record of a recipe. Raises NotFound."""
    with registry._database.reading() as session:
        recipe = find(session, models.RecipeRow, name)
        content = {
            "format": FORMAT,
            "name": recipe.name,
            "base": {"name": recipe.base.name, "layout": recipe.base.layout, "fingerprint": recipe.base.fingerprint},
            "created_at": recipe.created_at.isoformat(),
            "revisions": history(session, recipe),
            "tags": [
                {"tag": tag.tag, "revision": tag.revision, "who": tag.who, "at": tag.at.isoformat()}
                for tag in recipe.tags
            ],
        }
    return read_record(canonical_json(content))


def history(session: Session, recipe: models.RecipeRow) -> list[dict[str, Any]]:
    """The revisions of a recipe as records spell them."""
    query = (
        select(models.RevisionRow).where(models.RevisionRow.recipe_id == recipe.id).order_by(models.RevisionRow.number)
    )
    rows = session.scalars(query.options(selectinload(models.RevisionRow.changes)))
    return [
        {
            **{key: getattr(row, key) for key in ("number", "action", "source", "why", "who")},
            "at": row.at.isoformat(),
            "digest_before": row.digest_before,
            "digest_after": row.digest_after,
            "changes": [
                {
                    "patch": change.patch_id,
                    "strength_before": change.strength_before,
                    "strength_after": change.strength_after,
                    "until_before": change.until_before and change.until_before.isoformat(),
                    "until_after": change.until_after and change.until_after.isoformat(),
                }
                for change in row.changes
            ],
        }
        for row in rows
    ]


def read_record(raw: bytes) -> Record:
    """Read a record. Raises BadRecord for one that is not in its canonical spelling or does not make sense."""
    try:
        content = read_json(raw, "the recipe's record")
        if content.get("format") != FORMAT:
            raise BadRecipeRecord(
                f"a recipe of format {content.get('format')!r} is newer than this program; upgrade Overpaint"
            )
        if canonical_json(content) != raw:
            raise BadRecipeRecord("the recipe's record is not in its canonical spelling; take it from its source again")
        record = Record(
            raw=raw,
            name=checked_name(content["name"], "recipe"),
            base=checked_name(content["base"]["name"], "base"),
            fingerprint=checked_name(content["base"]["fingerprint"], "fingerprint"),
            created_at=moment(content["created_at"]),
            revisions=tuple(content["revisions"]),
            tags=tuple(content["tags"]),
        )
        _check_history(record)
        for tag in record.tags:
            checked_note(tag["who"], "the name of who did it")
            moment(tag["at"])
            if (
                tag["tag"] != checked_tag(tag["tag"])
                or type(tag["revision"]) is not int
                or not 0 <= tag["revision"] <= len(record.revisions)
            ):
                raise BadRecipeRecord(f"the recipe {record.name!r} has a tag {tag['tag']!r} that cannot be")
    except (BadManifest, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BadRecipeRecord(f"the recipe's record cannot be read ({error}); take it from its source again") from error
    return record


def _check_history(record: Record) -> None:
    """Every revision has its number, and begins with what the one before it left."""
    now: dict[str, tuple[float, str | None]] = {}
    for number, revision in enumerate(record.revisions, 1):
        if revision["number"] != number or revision["action"] not in get_args(Action):
            raise BadRecipeRecord(
                f"revision {number} of the recipe {record.name!r} is missing or does what no revision does"
            )
        moment(revision["at"])
        for key in ("why", "who", "source", "digest_before", "digest_after"):
            checked_note(revision[key] or "", f"the {key} of a revision")
        if len({change["patch"] for change in revision["changes"]}) != len(revision["changes"]):
            raise BadRecipeRecord(f"revision {number} of the recipe {record.name!r} changes one patch twice")
        for change in revision["changes"]:
            patch = change["patch"]
            before = _state(change["strength_before"], change["until_before"])
            after = _state(change["strength_after"], change["until_after"])
            if not DIGEST.fullmatch(patch) or now.get(patch) != before:
                raise BadRecipeRecord(
                    f"revision {number} of the recipe {record.name!r} does not continue what went before it"
                )
            now.pop(patch, None)
            if after is not None:
                now[patch] = after


def _state(strength: Any, until: Any) -> tuple[float, str | None] | None:
    if strength is None:
        return None
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise BadRecipeRecord(f"a strength is a finite number; the record has {strength!r}")
    day(until)
    return float(strength), until


def compared(
    ours: Sequence[Mapping[str, Any]], fingerprint: str, theirs: Record, name: str
) -> Literal["updated", "the same", "newer here"]:
    """What a record's history is to `ours`, on a base of this fingerprint. Raises Diverged when neither continues the other."""
    common = min(len(ours), len(theirs.revisions))
    different = next((n for n in range(common) if ours[n] != theirs.revisions[n]), None)
    if different is not None or fingerprint != theirs.fingerprint:
        at = "the base" if different is None else f"revision {different + 1}"
        raise HistoriesDiverged(
            f"the recipe {name!r} is there already and has another history, from {at} on; neither was changed. "
            "Give one of them another name"
        )
    if len(ours) == len(theirs.revisions):
        return "the same"
    return "newer here" if len(ours) > common else "updated"


def moment(text: str) -> datetime:
    """A moment as records spell it: ISO, in UTC. Raises BadRecord."""
    found = datetime.fromisoformat(text)
    if found.tzinfo is None or found.astimezone(timezone.utc).isoformat() != text:
        raise BadRecipeRecord(f"{text} is not a moment in UTC; take the record from its source again")
    return found


def day(text: str | None) -> date | None:
    """A day as records spell it, or None. Raises ValueError."""
    return None if text is None else date.fromisoformat(text)


def merge_recipe(registry: Registry, record: Record, base: str, name: str | None = None) -> Outcome:
    """Make the recipe of a record on the base of that name, or let the one that is there catch up with the record.

    `name` is another name for it here. Its patches must be in the registry. Raises Diverged when the recipe that is there
    has another history, NotFound for an unknown base.
    """
    with registry._database.writing() as session:
        wanted = find(session, models.BaseRow, base)
        recipe = lookup(session, models.RecipeRow, name or record.name)
        outcome: Outcome = "new"
        if recipe is None:
            made = checked_name(name or record.name, "recipe")
            recipe = added(session, models.RecipeRow(name=made, base=wanted, created_at=record.created_at))
        else:
            outcome = compared(history(session, recipe), recipe.base.fingerprint, record, recipe.name)
        if outcome in ("new", "updated"):
            _append(session, recipe, record)
        if outcome != "newer here":
            _tag(session, recipe, record)
        return outcome


def _append(session: Session, recipe: models.RecipeRow, record: Record) -> None:
    for revision in record.revisions[recipe.revision :]:
        row = models.RevisionRow(
            recipe_id=recipe.id,
            **{key: revision[key] for key in ("number", "action", "source", "why", "who")},
            at=moment(revision["at"]),
            digest_before=revision["digest_before"],
            digest_after=revision["digest_after"],
            changes=[
                models.RevisionPatchRow(
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
        queries.keep_reason(session, row)
    recipe.revision = len(record.revisions)
    for old in session.scalars(select(models.RecipePatchRow).where(models.RecipePatchRow.recipe_id == recipe.id)):
        session.delete(old)
    session.flush()
    for each in record.laid().values():
        row_now = models.RecipePatchRow(
            recipe_id=recipe.id, patch_id=each.patch, strength=each.strength, until=each.until
        )
        session.add(row_now)
    session.flush()


def _tag(session: Session, recipe: models.RecipeRow, record: Record) -> None:
    """Tags that are here already stay on their revisions."""
    for tag in record.tags:
        if session.get(models.RecipeTagRow, (recipe.id, tag["tag"])) is None:
            marks = {key: tag[key] for key in ("tag", "revision", "who")}
            session.add(models.RecipeTagRow(recipe_id=recipe.id, at=moment(tag["at"]), **marks))
    session.flush()
    session.refresh(recipe, ["tags"])
    queries.keep_recipe(session, recipe, [each.tag for each in recipe.tags])
