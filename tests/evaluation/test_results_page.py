"""The published comparison is written from what was kept: every suite a table, the papers' numbers beside it."""

from __future__ import annotations

import re

import pytest

from benchmarks.results_page import results_page
from overpaint.evaluation.worlds import EmojiWorld
from overpaint.registry.evaluations import EvaluationRecord
from overpaint.reporting.numbers import published
from overpaint.workshop import Workshop


@pytest.fixture(scope="module")
def records(shop: Workshop) -> list[EvaluationRecord]:
    return shop.known_recipe("safe").evaluations()


def test_every_suite_has_a_table_of_whole_rows(records: list[EvaluationRecord]) -> None:
    page = results_page(records, {"esd-6": "no luck"})
    for heading in (
        "Erased, kept, restored",
        "UnlearnCanvas",
        "MACE",
        "SRS-ME",
        "More and more",
        "Cross-talk",
        "brought back",
    ):
        assert re.search(f"## .*{heading}", page), heading
    for table in re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert "| safe | 0.0% | 0.0% | 100.0% (100.0% to 100.0%, n=10) |" in page
    assert "| separable, plain sum | 100.0% (90.0% to 100.0%, n=64) |" in page
    assert "- esd-6: no luck" in page


def test_the_papers_numbers_stand_beside_ours(records: list[EvaluationRecord]) -> None:
    page = results_page(records, {})
    for suite in ("grid", "generality", "scenes", "scale"):
        (table,) = published(suite)
        assert table.caption in page
        assert all("| " + " | ".join(row) + " |" in page for row in table.rows)


def test_the_benchmark_asks_for_concepts_that_the_embedded_base_knows() -> None:
    from benchmarks import evaluation

    world = EmojiWorld()
    for name in evaluation.TWELVE:
        assert name in world.names("style" if name in evaluation.STYLES else "object")
    assert len(set(evaluation.TWELVE)) == 12
    assert evaluation.TWELVE[:6] == evaluation.SIX


def test_the_benchmark_sets_what_solvers_have() -> None:
    from benchmarks import evaluation
    from overpaint.solvers import solver_class
    from overpaint.solvers.problem import configure

    for solver, settings in evaluation.SETTINGS.items():
        configure(solver_class(solver), settings)
