"""A recipe with its whole history as one JSON record, and merging it into a registry.

Histories only grow. One that continues another may take its place; two that went different ways are refused, because
neither may be thrown away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, timezone
from typing import Any, get_args

from overpaint.core.encoding import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.core.names import checked_name, checked_note, checked_number, checked_tag, sought_name
from overpaint.registry.history import MergeOutcome
from overpaint.registry.records import Action, PatchChange, RecipeEntry, Revision, TagRecord
from overpaint.registry.registry import Registry
from overpaint.registry.store import DIGEST, BadManifest, read_json

FORMAT = 1
LIMIT = 64 << 20


class BadRecipeRecord(OverpaintError):
    """A recipe's record that contradicts itself."""


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


def record_of(registry: Registry, name: str) -> Record:
    """The record of a recipe. Raises NotFound."""
    recipe = registry.history(name)
    content = {
        "format": FORMAT,
        "name": recipe.name,
        "base": {"name": recipe.base.name, "layout": recipe.base.layout, "fingerprint": recipe.base.fingerprint},
        "created_at": recipe.created_at.isoformat(),
        "revisions": [_revision_json(each) for each in recipe.revisions],
        "tags": [
            {"tag": tag.tag, "revision": tag.revision, "who": tag.who, "at": tag.at.isoformat()} for tag in recipe.tags
        ],
    }
    return read_record(canonical_json(content))


def _revision_json(revision: Revision) -> dict[str, Any]:
    changes = [
        {
            "patch": change.patch,
            "strength_before": change.before and change.before.strength,
            "strength_after": change.after and change.after.strength,
            "until_before": change.before and change.before.until and change.before.until.isoformat(),
            "until_after": change.after and change.after.until and change.after.until.isoformat(),
        }
        for change in revision.changes
    ]
    plain = ("number", "action", "source", "why", "who", "digest_before", "digest_after")
    return {**{key: getattr(revision, key) for key in plain}, "at": revision.at.isoformat(), "changes": changes}


def _revision(content: Mapping[str, Any]) -> Revision:
    changes = tuple(
        PatchChange(change["patch"], *(_entry(change, when) for when in ("before", "after")))
        for change in content["changes"]
    )
    plain = ("number", "action", "source", "why", "who", "digest_before", "digest_after")
    return Revision(**{key: content[key] for key in plain}, at=moment(content["at"]), changes=changes)


def _entry(change: Mapping[str, Any], when: str) -> RecipeEntry | None:
    strength = change[f"strength_{when}"]
    return None if strength is None else RecipeEntry(change["patch"], strength, day(change[f"until_{when}"]))


def read_record(raw: bytes) -> Record:
    """Read a record. Raises BadRecipeRecord for one that is not in its canonical form or does not make sense."""
    try:
        content = read_json(raw, "the recipe's record")
        if content.get("format") != FORMAT:
            raise BadRecipeRecord(
                f"a recipe of format {content.get('format')!r} is newer than this program; upgrade Overpaint"
            )
        if canonical_json(content) != raw:
            raise BadRecipeRecord("the recipe's record is not in its canonical form; take it from its source again")
        record = Record(
            raw=raw,
            name=sought_name(content["name"], "recipe"),
            base=sought_name(content["base"]["name"], "base"),
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
    try:
        number = checked_number(strength, "a strength of the record")
    except OverpaintError as error:
        raise BadRecipeRecord(str(error)) from None
    day(until)
    return number, until


def moment(text: str) -> datetime:
    """A moment as records have it: ISO, in UTC. Raises BadRecipeRecord."""
    found = datetime.fromisoformat(text)
    if found.tzinfo is None or found.astimezone(timezone.utc).isoformat() != text:
        raise BadRecipeRecord(f"{text} is not a moment in UTC; take the record from its source again")
    return found


def day(text: str | None) -> date | None:
    """A day as records have it, or None. Raises ValueError."""
    return None if text is None else date.fromisoformat(text)


def merge_recipe(registry: Registry, record: Record, base: str, name: str | None = None) -> MergeOutcome:
    """Make the recipe of a record on the base of that name, or let the one that is there catch up with the record.

    `name` is another name for it here. Its patches must be in the registry. Raises HistoriesDiverged when the recipe
    that is there has another history, NotFound for an unknown base.
    """
    revisions = [_revision(each) for each in record.revisions]
    called = name or record.name
    tags = [
        TagRecord(each["tag"], "recipe", called, each["revision"], each["who"], moment(each["at"]))
        for each in record.tags
    ]
    return registry.merge_history(called, base, revisions, tags, record.created_at)
