"""What suites measured of patches and recipes: runs with their numbers, only ever added."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session, selectinload

from overpaint.errors import OverpaintError
from overpaint.registry import models
from overpaint.registry.names import checked_json, checked_name, checked_note, checked_number
from overpaint.registry.past import find_revision
from overpaint.registry.queries import added, find_patch
from overpaint.registry.shelf import Shelf


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
    def of(cls, row: models.EvaluationResult) -> ResultRecord:
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
    def of(cls, row: models.Evaluation) -> EvaluationRecord:
        return cls(
            patch=row.patch_id,
            recipe=row.recipe.name if row.recipe else None,
            revision=row.revision,
            digest=row.digest,
            suite=row.suite,
            judge=row.judge,
            seed=row.seed,
            settings=json.loads(row.settings),
            versions=json.loads(row.versions),
            seconds=row.seconds,
            who=row.who,
            at=row.at,
            results=tuple(ResultRecord.of(each) for each in row.results),
        )


class Evaluations(Shelf):
    """Runs of suites. Nothing here is ever changed: a second run of a suite is a second row."""

    def add_evaluation(
        self,
        *,
        patch: str | None = None,
        recipe: str | None = None,
        digest: str,
        suite: str,
        judge: str,
        seed: int,
        settings: dict[str, Any],
        versions: dict[str, Any],
        seconds: float,
        who: str,
        results: Iterable[ResultRecord],
    ) -> EvaluationRecord:
        """Keep one run on a patch, or on a recipe as it is now or was at NAME@NUMBER.

        Raises NotFound for a patch or recipe that is not there, OverpaintError unless exactly one of them is given and
        every number is finite.
        """
        if (patch is None) == (recipe is None):
            raise OverpaintError("an evaluation is of one patch or of one recipe; name exactly one of them")
        row = models.Evaluation(
            digest=checked_name(digest, "digest"),
            suite=checked_name(suite, "suite"),
            judge=checked_name(judge, "judge"),
            seed=seed,
            settings=checked_json(settings, "the settings of an evaluation"),
            versions=checked_json(versions, "the versions of an evaluation"),
            seconds=checked_number(seconds, "the seconds of an evaluation"),
            who=checked_note(who, "the name of who did it"),
        )
        row.results = [_result(number, each) for number, each in enumerate(results)]
        with self._database.writing() as session:
            if patch is not None:
                row.patch_id = find_patch(session, patch).id
            else:
                found, row.revision = find_revision(session, recipe or "")
                row.recipe_id = found.id
            return EvaluationRecord.of(added(session, row))

    def evaluations(
        self, *, patch: str | None = None, recipe: str | None = None, latest: bool = False
    ) -> list[EvaluationRecord]:
        """The runs on a patch or on a recipe (as it is, or at NAME@NUMBER), oldest first; all of them without either.

        With `latest`, of each suite and judge the last one. Raises NotFound.
        """
        query = select(models.Evaluation).options(selectinload(models.Evaluation.results))
        query = query.order_by(models.Evaluation.at, models.Evaluation.id)
        with self._database.reading() as session:
            rows = session.scalars(_of(session, query, patch, recipe)).all()
            found = [EvaluationRecord.of(row) for row in rows]
        return list({(each.suite, each.judge): each for each in found}.values()) if latest else found

    def count_evaluations(self, *, patch: str | None = None, recipe: str | None = None) -> int:
        """How many runs there are. Raises NotFound."""
        with self._database.reading() as session:
            query = _of(session, select(func.count()).select_from(models.Evaluation), patch, recipe)
            return session.scalar(query) or 0


def _of(session: Session, query: Select[Any], patch: str | None, recipe: str | None) -> Select[Any]:
    if patch is not None:
        query = query.where(models.Evaluation.patch_id == find_patch(session, patch).id)
    if recipe is not None:
        row, number = find_revision(session, recipe)
        query = query.where(models.Evaluation.recipe_id == row.id, models.Evaluation.revision == number)
    return query


def _result(number: int, result: ResultRecord) -> models.EvaluationResult:
    what = f"{result.metric} of {result.subject}"
    bounds = (
        None if each is None else checked_number(each, f"a bound of the {what}") for each in (result.low, result.high)
    )
    low, high = bounds
    return models.EvaluationResult(
        number=number,
        subject=checked_name(result.subject, "subject of a result"),
        metric=checked_name(result.metric, "metric"),
        value=checked_number(result.value, f"the {what}"),
        low=low,
        high=high,
        n=result.n,
    )
