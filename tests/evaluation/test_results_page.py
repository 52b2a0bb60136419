"""The published comparison is written from what was kept: every suite a table, the papers' numbers beside it."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.cells import NO_END
from benchmarks.evaluation import SIX, _lay, _shop
from benchmarks.results_page import results_page
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.prompts import EmojiPrompts
from overpaint.evaluation.report_page import published
from overpaint.registry.records import EvaluationRecord
from overpaint.workspace.workspace import Workspace


@pytest.fixture(scope="module")
def records(workspace: Workspace) -> list[EvaluationRecord]:
    return workspace.recipe("safe").evaluations()


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
    assert "- solver `spm`: in no suite yet" in page


def test_cross_talk_is_also_ranked_over_all_recipes(records: list[EvaluationRecord]) -> None:
    page = results_page(records, {})
    section = page.partition("## Cross-talk")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\w ]+) \| (\d+) \|", section, re.MULTILINE)
    assert rows[-1][0] == "all of them"
    assert int(rows[-1][1]) == sum(int(count) for _, count in rows[:-1])


def test_the_papers_numbers_stand_beside_ours(records: list[EvaluationRecord]) -> None:
    page = results_page(records, {})
    for suite in ("grid", "generality", "scenes_by_name", "scale"):
        (table,) = published(suite)
        assert table.caption in page
        assert all("| " + " | ".join(row) + " |" in page for row in table.rows)


def test_the_benchmark_asks_for_concepts_that_the_embedded_base_knows() -> None:
    from benchmarks import evaluation

    prompt_set = EmojiPrompts()
    for name in evaluation.TWELVE:
        assert name in prompt_set.names("style" if name in evaluation.STYLES else "object")
    assert len(set(evaluation.TWELVE)) == 12
    assert evaluation.TWELVE[:6] == evaluation.SIX


def test_the_benchmark_sets_what_suites_have() -> None:
    from benchmarks import evaluation
    from overpaint.evaluation.suites import SUITES, configured

    assert set(evaluation.SUITES) | {"scale"} == set(SUITES)
    for suite, settings in evaluation.FEWER.items():
        assert configured(suite, settings) != configured(suite, {})


def test_every_solver_goes_through_every_suite() -> None:
    from benchmarks.evaluation import SUITES, wanted
    from overpaint.solvers import SOLVERS

    every = (*SUITES, "scale")
    for solver in SOLVERS:
        assert set(SUITES) <= set(wanted(solver, "6", every))
    assert [solver for solver in SOLVERS if "scale" in wanted(solver, "6", every)] == ["separable"]
    for recipe in ("12", "styles"):
        assert wanted("separable", recipe, every) == wanted("sepme", recipe, every) == ["scenes", "scenes_by_name"]
        assert wanted("esd", recipe, every) == []
    assert wanted("sepme", "named-styles", every) == ["scenes_by_name"]
    assert wanted("separable", "named-styles", every) == []
    assert wanted("esd", "6", ["quick"]) == ["quick"]
    assert wanted("separable:harden=2", "6", every) == ["quick", "probes"]


@pytest.mark.parametrize("n", [40, 100])
def test_every_cell_has_as_many_pictures_as_asked(n: int) -> None:
    from benchmarks.evaluation import SIX, STYLES, per_cell
    from overpaint.evaluation.suites import configured

    objects = sum(name not in STYLES for name in SIX)
    for suite, settings in per_cell(n).items():
        configured(suite, settings)
    assert int(per_cell(n)["probes"]["pictures"]) * objects >= n
    assert int(per_cell(n)["scenes"]["pictures"]) * 2 >= n / 2


def test_what_was_refused_is_on_the_page_of_another_run(tmp_path: Path) -> None:
    from benchmarks.evaluation import _keep_reasons, _refused

    _keep_reasons(tmp_path, "mace-6", ["grid: too few", "probes: none"])
    _keep_reasons(tmp_path, "esd-6", ["no luck"])
    assert _refused(tmp_path) == {"esd-6": "no luck", "mace-6": "grid: too few; probes: none"}
    _keep_reasons(tmp_path, "esd-6", [])
    assert _refused(tmp_path) == {"mace-6": "grid: too few; probes: none"}


def test_results_of_another_day_give_way_to_todays(
    records: list[EvaluationRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import evaluation

    monkeypatch.setattr(evaluation, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evaluation, "PAGE", tmp_path / "results.md")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old-6-quick.json").write_text("{}")
    evaluation._write(records, {})
    written = {file.stem for file in (tmp_path / "results").iterdir()}
    assert written == {f"{record.recipe}-{record.suite}" for record in records}
    assert "## Provenance" in (tmp_path / "results.md").read_text("utf-8")


def test_a_patch_is_asked_for_with_todays_settings_among_those_told_of(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import evaluation

    asked: list[tuple[list[str], dict[str, Any]]] = []
    outcome = SimpleNamespace(record=SimpleNamespace(id="solved"), error="")

    def solve_many(names: list[str], **given: Any) -> list[Any]:
        asked.append((names, given))
        return [outcome]

    monkeypatch.setattr(workspace, "solve_many", solve_many)
    assert evaluation._solved(workspace, ["cat"], "separable:harden=2", "cpu", ("cat", "dog"), "") == ["solved"]
    assert evaluation._solved(workspace, ["cat"], "esd+decoupled", "cpu", ("cat",), "") == ["solved"]
    (names, hard), (_, apart) = asked
    assert (names, hard["solver"], hard["settings"]["harden"], hard["decoupled"]) == (["cat"], "separable", 2, "")
    assert hard["universe"] == ("cat", "dog")
    assert (apart["solver"], apart["decoupled"]) == ("esd", "ridge")
    outcome.record, outcome.error = None, "no room"
    with pytest.raises(OverpaintError, match="no room"):
        evaluation._solved(workspace, ["cat"], "sepme", "cpu", ("cat",), "")


def test_figures_of_another_judge_are_said_to_be_older(records: list[EvaluationRecord]) -> None:
    assert "earlier embedded base" in results_page(records, {}, "another judge")
    assert "earlier embedded base" not in results_page(records, {}, records[0].judge)


def test_a_recipe_has_the_patches_of_todays_settings_however_often_it_is_asked_for(tmp_path: Path) -> None:
    names = (SIX[1], SIX[0])
    workspace = _shop(tmp_path / "shop")
    asked = Namespace(on="", device="cpu")
    laid: list[dict[str, str]] = []
    revisions = []
    for solver in ("separable", "separable:share=0", "separable:share=0"):
        _lay(workspace, "six", solver, names, asked, NO_END)
        recipe = workspace.recipe("six")
        laid.append({record.concept: record.id for record, _ in recipe.patches()})
        revisions.append(recipe.record.revision)
    assert [set(each) for each in laid] == [set(names)] * 3
    assert not set(laid[0].values()) & set(laid[1].values()), "other settings, other patches"
    assert laid[1] == laid[2]
    assert revisions[0] < revisions[1] == revisions[2]
