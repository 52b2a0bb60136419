"""What the registry hands out: plain frozen values that outlive the session they were read in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

from overpaint.registry import models

Action = Literal["add", "remove", "strength"]


@dataclass(frozen=True)
class BaseRecord:
    """A base model, by the name it has in this registry."""

    name: str
    source: Path
    layout: str
    fingerprint: str
    added_at: datetime

    @classmethod
    def of(cls, row: models.Base) -> BaseRecord:
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

    @classmethod
    def of(cls, row: models.Patch) -> PatchRecord:
        return cls(
            id=row.id,
            concept=row.concept.name,
            base=row.base.name,
            solver=row.solver,
            kind=row.kind,
            settings=json.loads(row.settings),
            seed=row.seed,
            nbytes=row.nbytes,
            blob=row.blob,
            seconds=row.seconds,
            solved_at=row.solved_at,
        )


@dataclass(frozen=True)
class RecipeRecord:
    """A recipe: the name of its base, and (patch id, strength) sorted by patch id."""

    name: str
    base: str
    created_at: datetime
    patches: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, row: models.Recipe) -> RecipeRecord:
        laid = tuple((patch.patch_id, patch.strength) for patch in row.patches)
        return cls(row.name, row.base.name, row.created_at, laid)


@dataclass(frozen=True)
class HistoryRecord:
    """One change of a recipe: a strength of None means that the patch did not lie there."""

    recipe: str
    revision: int
    action: Action
    patch: str
    concept: str
    strength_before: float | None
    strength_after: float | None
    why: str
    who: str
    at: datetime
    digest_before: str | None
    digest_after: str | None

    @classmethod
    def of(cls, row: models.History) -> HistoryRecord:
        return cls(
            recipe=row.recipe.name,
            revision=row.revision,
            action=cast(Action, row.action),
            patch=row.patch_id,
            concept=row.patch.concept.name,
            strength_before=row.strength_before,
            strength_after=row.strength_after,
            why=row.why,
            who=row.who,
            at=row.at,
            digest_before=row.digest_before,
            digest_after=row.digest_after,
        )
