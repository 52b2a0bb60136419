"""What the registry hands out: plain frozen values that outlive the session they were read in."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal, cast

from overpaint.registry import models

Action = Literal["add", "remove", "strength", "until", "checkout", "copy", "delete", "undelete"]


@dataclass(frozen=True)
class BaseRecord:
    """A base model, by the name it has in this registry."""

    name: str
    source: Path
    layout: str
    fingerprint: str
    added_at: datetime

    @classmethod
    def of(cls, row: models.BaseRow) -> BaseRecord:
        return cls(row.name, Path(row.source), row.layout, row.fingerprint, row.added_at)


@dataclass(frozen=True)
class PatchRecord:
    """A stored patch: `id` is the digest of its manifest, `blob` that of its bytes, `concept` and `base` are names."""

    id: str
    concept: str
    base: str
    solver: str
    kind: str
    settings: dict[str, Any] = field(hash=False)
    seed: int
    nbytes: int
    blob: str
    seconds: float
    solved_at: datetime
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, row: models.PatchRow) -> PatchRecord:
        return cls(
            id=row.id,
            concept=row.concept.name,
            base=row.base.name,
            solver=row.solver,
            kind=row.kind,
            settings=models.stored_json(row.settings, f"settings of patch {row.id}"),
            seed=row.seed,
            nbytes=row.nbytes,
            blob=row.blob,
            seconds=row.seconds,
            solved_at=row.solved_at,
            tags=tuple(tag.tag for tag in row.tags),
        )


@dataclass(frozen=True)
class RecipeEntry:
    """One patch of a recipe: its strength, and the day from which it has expired; None for never."""

    patch: str
    strength: float
    until: date | None = None

    def has_expired(self, on: date) -> bool:
        """Whether it no longer holds on a day: from the day `until` on."""
        return self.until is not None and self.until <= on


@dataclass(frozen=True)
class RecipeRecord:
    """A recipe at one of its revisions: the name of its base, and its patches, sorted by patch id.

    `digest` is that of the composed weights as the history has it, None where none was recorded. Tags come with the
    revision that the recipe had when it was tagged.
    """

    name: str
    base: str
    revision: int
    entries: tuple[RecipeEntry, ...]
    digest: str | None
    tags: tuple[tuple[str, int], ...]
    created_at: datetime
    deleted_at: datetime | None = None

    @property
    def patches(self) -> tuple[tuple[str, float], ...]:
        """(patch id, strength), sorted by patch id."""
        return tuple((each.patch, each.strength) for each in self.entries)


@dataclass(frozen=True)
class HistoryRecord:
    """What one revision of a recipe did to one patch; both strengths None, and no patch, where it touched none.

    `source` is the recipe@revision that a checkout or a copy was made from.
    """

    recipe: str
    revision: int
    action: Action
    source: str | None
    patch: str | None
    concept: str | None
    strength_before: float | None
    strength_after: float | None
    until_before: date | None
    until_after: date | None
    why: str
    who: str
    at: datetime
    digest_before: str | None
    digest_after: str | None

    @classmethod
    def of(cls, row: models.RevisionRow, change: models.RevisionPatchRow | None) -> HistoryRecord:
        line = change or models.RevisionPatchRow()
        return cls(
            recipe=row.recipe.name,
            revision=row.number,
            action=_action(row, line),
            source=row.source,
            patch=line.patch_id,
            concept=change.patch.concept.name if change else None,
            strength_before=line.strength_before,
            strength_after=line.strength_after,
            until_before=line.until_before,
            until_after=line.until_after,
            why=row.why,
            who=row.who,
            at=row.at,
            digest_before=row.digest_before,
            digest_after=row.digest_after,
        )


def _action(row: models.RevisionRow, line: models.RevisionPatchRow) -> Action:
    """What a revision did to one patch: one that changes several may add some, remove others and change the rest."""
    if row.action not in ("add", "remove", "strength", "until") or line.patch_id is None:
        return cast(Action, row.action)
    return action_of(line.strength_before, line.strength_after)


def action_of(before: float | None, after: float | None) -> Action:
    """What takes a patch from one strength to another (None: not there) is called; with equal ones, its expiry changed."""
    if before is None:
        return "add"
    if after is None:
        return "remove"
    return "until" if before == after else "strength"


@dataclass(frozen=True)
class PatchChange:
    """What a revision did to one patch: its entry before and after, None where the recipe did not hold it."""

    patch: str
    before: RecipeEntry | None
    after: RecipeEntry | None

    @classmethod
    def of(cls, row: models.RevisionPatchRow) -> PatchChange:
        before, after = (
            None if strength is None else RecipeEntry(row.patch_id, strength, until)
            for strength, until in ((row.strength_before, row.until_before), (row.strength_after, row.until_after))
        )
        return cls(row.patch_id, before, after)


@dataclass(frozen=True)
class Revision:
    """One revision of a recipe, with all that it changed."""

    number: int
    action: Action
    source: str | None
    why: str
    who: str
    at: datetime
    digest_before: str | None
    digest_after: str | None
    changes: tuple[PatchChange, ...]

    @classmethod
    def of(cls, row: models.RevisionRow) -> Revision:
        return cls(
            number=row.number,
            action=cast(Action, row.action),
            source=row.source,
            why=row.why,
            who=row.who,
            at=row.at,
            digest_before=row.digest_before,
            digest_after=row.digest_after,
            changes=tuple(map(PatchChange.of, row.changes)),
        )


@dataclass(frozen=True)
class RecipeHistory:
    """A recipe with its revisions from 1 on, and its tags."""

    name: str
    base: BaseRecord
    created_at: datetime
    revisions: tuple[Revision, ...]
    tags: tuple[TagRecord, ...]


@dataclass(frozen=True)
class Difference:
    """One patch that differs between two recipes, or between two revisions of one."""

    patch: str
    concept: str
    before: RecipeEntry | None
    after: RecipeEntry | None


@dataclass(frozen=True)
class ExpiredEntry:
    """A patch that has expired and is still on a recipe."""

    recipe: str
    concept: str
    patch: str
    until: date


@dataclass(frozen=True)
class TagRecord:
    """A tag on a patch or on a recipe; `name` is the patch's id or the recipe's name, `revision` the recipe's."""

    tag: str
    on: Literal["patch", "recipe"]
    name: str
    revision: int | None
    who: str
    at: datetime


@dataclass(frozen=True)
class SearchResult:
    """A page of what a search found, newest first."""

    patches: tuple[PatchRecord, ...]
    recipes: tuple[RecipeRecord, ...]


@dataclass(frozen=True)
class ResultRecord:
    """One number: what it is about, what was measured, over `n` things; 95% bounds where there are any."""

    subject: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, row: models.EvaluationResultRow) -> ResultRecord:
        return cls(row.subject, row.metric, row.value, row.low, row.high, row.n)


@dataclass(frozen=True)
class EvaluationRecord:
    """One run of one suite: on a patch (its id), or on a recipe (its name) at a revision.

    `digest` is that of the weights that were judged, `seed` the number that all seeds of the run follow from.
    """

    patch: str | None
    recipe: str | None
    revision: int | None
    digest: str
    suite: str
    judge: str
    seed: int
    settings: dict[str, Any] = field(hash=False)
    versions: dict[str, Any] = field(hash=False)
    seconds: float
    who: str
    at: datetime
    results: tuple[ResultRecord, ...]

    @classmethod
    def of(cls, row: models.EvaluationRow) -> EvaluationRecord:
        return cls(
            patch=row.patch_id,
            recipe=row.recipe.name if row.recipe else None,
            revision=row.revision,
            digest=row.digest,
            suite=row.suite,
            judge=row.judge,
            seed=row.seed,
            settings=models.stored_json(row.settings, "the settings of an evaluation"),
            versions=models.stored_json(row.versions, "versions of an evaluation"),
            seconds=row.seconds,
            who=row.who,
            at=row.at,
            results=tuple(ResultRecord.of(each) for each in row.results),
        )


@dataclass(frozen=True)
class PreservedPromptRecord:
    """A prompt to preserve, who asked for that, and when."""

    prompt: str
    who: str
    at: datetime
