"""Runs of suites are kept as they were found, with the patch or the revision that they are about."""

from __future__ import annotations

import math
from typing import Any

import pytest

from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.registry.records import EvaluationRecord, ResultRecord

from .contents import add_patch, lay

RESULTS = (
    ResultRecord("Äpfel", "accuracy", 0.1 + 0.2, 0.25, 0.5, 20),
    ResultRecord("whole", "order spread", 0.0, None, None, 6),
)


def keep(registry: Registry, **other: Any) -> EvaluationRecord:
    usual: dict[str, Any] = {
        "digest": "d" * 64,
        "suite": "quick",
        "judge": "cnn 0123",
        "seed": 7,
        "settings": {"steps": 20},
        "versions": {"torch": "2"},
        "seconds": 1.5,
        "who": "tester",
        "results": RESULTS,
    }
    return registry.add_evaluation(**{**usual, **other})


def test_stored_evaluations_come_back_number_for_number(either: Registry) -> None:
    one = add_patch(either, "one")
    kept = keep(either, patch=one.id)
    assert either.evaluations(patch=one.id) == [kept]
    assert kept.results == RESULTS
    assert (kept.patch, kept.recipe, kept.revision, kept.seed) == (one.id, None, None, 7)
    assert (kept.settings, kept.versions, kept.seconds, kept.who) == ({"steps": 20}, {"torch": "2"}, 1.5, "tester")


def test_a_recipes_results_stay_with_the_revision_they_are_about(either: Registry) -> None:
    for label in ("one", "two"):
        add_patch(either, label)
    either.create_recipe("safe", "small")
    lay(either, "safe", either.patches()[0].id, 1.0)
    first = keep(either, recipe="safe")
    lay(either, "safe", either.patches()[1].id, 1.0)
    assert either.evaluations(recipe="safe") == []
    second = keep(either, recipe="safe", suite="grid")
    assert (first.revision, second.revision) == (1, 2)
    assert either.evaluations(recipe="safe@1") == [first]
    assert either.evaluations(recipe="safe") == [second]
    assert either.evaluations() == [first, second]


def test_the_latest_of_each_suite_and_judge_can_be_asked_for(registry: Registry) -> None:
    one = add_patch(registry, "one")
    for suite in ("quick", "grid", "quick"):
        last = keep(registry, patch=one.id, suite=suite)
    found = registry.evaluations(patch=one.id, latest=True)
    assert {each.suite for each in found} == {"quick", "grid"}
    assert last in found
    assert len(registry.evaluations(patch=one.id)) == 3


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_none_is_refused_and_nothing_is_stored(registry: Registry, number: float) -> None:
    one = add_patch(registry, "one")
    with pytest.raises(OverpaintError, match="psnr of cat must be a finite number"):
        keep(registry, patch=one.id, results=[*RESULTS, ResultRecord("cat", "psnr", number, None, None, 1)])
    assert registry.evaluations() == []


def test_an_evaluation_is_of_one_thing_that_is_there(registry: Registry) -> None:
    one = add_patch(registry, "one")
    registry.create_recipe("safe", "small")
    for both in ({}, {"patch": one.id, "recipe": "safe"}):
        with pytest.raises(OverpaintError, match="name exactly one"):
            keep(registry, **both)
    with pytest.raises(NotFound, match="no recipe answers to 'saef' \\(did you mean 'safe'"):
        keep(registry, recipe="saef")
    with pytest.raises(NotFound):
        registry.evaluations(patch="0123456789")
