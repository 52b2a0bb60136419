"""The report of a recipe: whole, true to the numbers that were kept, readable by everybody, measured in a real browser."""

from __future__ import annotations

import csv
import html
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from overpaint.cli import main
from overpaint.commands.evaluating import result_rows
from overpaint.core.errors import AlreadyExists, OverpaintError
from overpaint.evaluation.context import SHARE
from overpaint.evaluation.crosstalk import MOVED, PREDICTED, CrosstalkSuite
from overpaint.evaluation.metrics import UNDECIDED, Measurement
from overpaint.evaluation.report_page import (
    Chart,
    HeatMap,
    Line,
    Numbers,
    Report,
    Section,
    as_text,
    percent,
    plain,
    render,
)
from overpaint.evaluation.suites import SUITES, Suite, is_attack, suite_class
from overpaint.registry.records import ResultRecord
from overpaint.registry.registry import Registry
from overpaint.workspace.evaluating import Evaluated
from overpaint.workspace.report import model_card, summary
from overpaint.workspace.workspace import Workspace

from .pages import chromium, measured
from .test_report_page import Outline


@pytest.fixture(scope="module")
def files(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """The files of one report, the page first."""
    return workspace.recipe("safe").report(tmp_path_factory.mktemp("page") / "safe.html", device="cpu").files


def test_an_evaluation_shows_its_numbers_in_a_notebook(workspace: Workspace) -> None:
    record = workspace.recipe("safe").evaluations()[0]
    done = Evaluated(record, ())
    assert repr(done).startswith(f"<Evaluated recipe safe@{record.revision}: {record.suite} by {record.judge}, seed 0")
    assert f"<td>{record.results[0].metric}</td><td>{record.results[0].value:.4g}</td>" in done._repr_html_()


@pytest.fixture(scope="module")
def page(files: Sequence[Path]) -> str:
    return files[0].read_text("utf-8")


def test_the_page_answers_each_question_in_order(page: str) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "In short",
        "What is erased",
        "What is kept",
        "What restores",
        "Many concepts at once",
        "Cross-talk",
        "Can it be brought back?",
        "What it costs",
        "What this does not show",
        "Provenance",
        "How to reproduce",
    ]


class Planted(Suite):
    """A suite that somebody adds: one file, one row in the table."""

    is_attack = True
    heading = "Planted"


def test_a_new_suite_is_in_the_report_and_counts_as_an_attack_where_it_is_one(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_attack("planted")
    monkeypatch.setitem(SUITES, "planted", (f"{__name__}:Planted", "a test"))
    assert is_attack("planted")
    found = workspace.recipe("safe").evaluations()[0]
    planted = replace(found, suite="planted", results=(ResultRecord("cat", "planted metric", 0.5, None, None, 6),))
    monkeypatch.setattr(Registry, "evaluations", lambda self, **asked: [found, planted])
    page = workspace.recipe("safe").report(tmp_path / "r.html", device="cpu").files[0].read_text("utf-8")
    assert "<h2>Planted</h2>" in page
    assert "planted metric" in page


def test_the_numbers_of_every_suite_are_somewhere_in_the_report() -> None:
    without = [name for name in SUITES if not suite_class(name).heading]
    assert without == ["quick", "grid", "generality", "scenes", "scenes_by_name", "cost"], "give the suite a heading"


def test_the_page_is_whole_by_itself(page: str) -> None:
    outline = Outline(page)
    assert not outline.open
    assert not re.search(r"https?://|url\(|<link|@import|<script", page)
    alts = [image["alt"] or "" for image in outline.all("img")]
    assert len(alts) >= 6 * 12 + 24
    assert all("seed" in alt and "prompt" in alt for alt in alts)


def test_the_page_says_what_was_measured(page: str) -> None:
    assert "0.0% (0.0% to 39.0%, n=6), cat" in page
    assert "How often is what was erased still drawn?" in page
    assert re.search(r">0 of \d+ tensors differ<", page)
    assert '<td class="pale" style="--depth:0%">0.00</td>' in page
    assert "SRS-ME" in page
    assert "overpaint evaluate safe --suite grid --set" in page


def test_provenance_names_base_weights_patches_judge_and_versions(workspace: Workspace, page: str) -> None:
    assert workspace.base("tiny").fingerprint in page
    assert workspace.recipe("safe").digest() in page
    assert all(record.id in page for record in workspace.patches())
    assert "judge reader; seed 0; device cpu, guidance 3.0, steps 1" in page


def test_every_number_is_in_a_file_beside_the_page(workspace: Workspace, files: Sequence[Path]) -> None:
    kept = [result for record in workspace.recipe("safe").evaluations() for result in record.results]
    by_suffix = {path.suffix: path for path in files if path.suffix in (".json", ".csv")}
    with by_suffix[".csv"].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [result.value for result in kept]
    runs = json.loads(by_suffix[".json"].read_text("utf-8"))
    assert [r["value"] for run in runs for r in run["results"]] == [result.value for result in kept]


def test_figures_are_pictures(files: Sequence[Path]) -> None:
    pngs = [path for path in files if path.suffix == ".png"]
    assert {path.name for path in pngs} == {
        "safe-crosstalk-measured.png",
        "safe-crosstalk-predicted.png",
        "safe-scale.png",
    }
    for path in pngs:
        with Image.open(path) as picture:
            assert min(picture.size) > 300


def test_a_report_is_not_written_over_another(workspace: Workspace, files: Sequence[Path], tmp_path: Path) -> None:
    before = files[0].read_bytes()
    with pytest.raises(AlreadyExists, match="already there"):
        workspace.recipe("safe").report(files[0])
    assert files[0].read_bytes() == before
    (tmp_path / "new.csv").write_text("mine")
    with pytest.raises(AlreadyExists, match=r"new\.csv is already there"):
        workspace.recipe("safe").report(tmp_path / "new.html")
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]
    with pytest.raises(OverpaintError, match="make it first"):
        workspace.recipe("safe").report(tmp_path / "nowhere" / "new.html")


def test_a_recipe_that_was_not_evaluated_is_refused_with_the_command_to_type(
    workspace: Workspace, tmp_path: Path
) -> None:
    workspace.create_recipe("other", base="tiny", exist_ok=True).add("cat")
    found = CliRunner().invoke(
        main, ["--registry", str(workspace.registry.folder), "report", "other", "-o", str(tmp_path / "r.html")]
    )
    assert found.exit_code == 1
    assert "run `overpaint evaluate other` first" in " ".join(found.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_only_the_figures_are_missing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = workspace.recipe("safe").report(tmp_path / "r.html", device="cpu")
    assert [path.suffix for path in done.files] == [".html", ".json", ".csv"]
    assert repr(done) == f"<Reported {tmp_path / 'r.html'} and 2 files beside it>"
    assert f"<td>{tmp_path / 'r.csv'}</td>" in done._repr_html_()
    assert done.notices == ("no PNG figures: figures need matplotlib: pip install 'overpaint[figures]'",)


# In a browser


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_the_layout_holds_in_a_browser(files: Sequence[Path], tmp_path: Path, width: int, dark: bool) -> None:
    found = measured(files[0], tmp_path, width=width, dark=dark)
    assert found["dark"] is dark
    assert found["wide"] <= found["width"], "the page scrolls sideways"
    assert all(loaded and size > 40 and alt for loaded, size, alt in found["images"])
    assert len(found["charts"]) == 1
    assert found["charts"][0][2] - found["charts"][0][0] > 250
    assert found["outside"] == [], "words of the chart that are cut off"
    assert found["faint"] == [], "text with less contrast than 4.5 to 1"
    assert found["heats"] == 3
    bottoms = [box[3] for box in found["sections"]]
    assert all(box[1] >= above - 1 for box, above in zip(found["sections"][1:], bottoms[:-1], strict=True))


def test_the_page_prints(files: Sequence[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.pdf"
    chromium(tmp_path, f"--print-to-pdf={out}", "--no-pdf-header-footer", files[0].as_uri())
    content = out.read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 3


# Graphics and spelling


def test_a_chart_shows_its_numbers_and_intervals() -> None:
    chart = Chart((Line("a & b", ((1, 0.5, 0.25, 0.75), (4, 1.0, None, None))),), "Caption.", "N", "H")
    drawn = render(Report("t", "", (Section("s", charts=(chart,)),)))
    assert 'aria-label="Caption. H over N. a &amp; b: 0.50 at 1, 1.00 at 4"' in drawn
    assert drawn.count('class="whisker') == 1
    with pytest.raises(OverpaintError, match="no points"):
        Chart((), "empty", "x", "y")


def test_a_heat_map_has_a_number_in_every_cell_but_the_empty_ones() -> None:
    drawn = render(Report("t", "", (Section("s", heats=(HeatMap(("a",), ("x", "y"), ((0.5, None),), "c"),)),)))
    assert "--depth:50%" in drawn
    assert "<td></td>" in drawn
    with pytest.raises(OverpaintError, match="do not fit its 2 columns"):
        HeatMap(("a",), ("x", "y"), ((0.5,),), "c")


def test_numbers_are_formatted_by_what_they_measure() -> None:
    assert as_text(Measurement("x", "accuracy", 0.5, 8, 0.25, 0.75)) == "50.0% (25.0% to 75.0%, n=8)"
    assert as_text(Measurement("x", "PSNR, dB", 31.2345, 8)) == "31.23"
    assert as_text(None) == "—"
    assert (percent(1.0), plain(12345.0), plain(0.000123456)) == ("100.0%", "12,345", "0.0001235")


def test_names_that_stay_as_they_were_stored_are_shown_in_plain_words() -> None:
    numbers = Numbers([Measurement("restored: concepts taken off", "seconds to lay on", 0.5, 5)])
    table = numbers.table(numbers.subjects(), numbers.metrics(), "caption", strip="restored: ")
    assert table.columns == ("", "seconds to add")
    assert table.rows[0][0] == "concepts of the removed patches"
    record: Any = SimpleNamespace(results=(ResultRecord("a", "seconds to take off", 0.123456, None, None, 5),))
    assert result_rows(record, exact=False)[0][1:3] == ["seconds to remove", 0.1235]
    assert result_rows(record, exact=True)[0][1:3] == ["seconds to take off", 0.123456]


@pytest.mark.parametrize(
    ("agreement", "predicted", "output"),
    [
        (0.9, 0.5, ""),
        (0.2, 0.06, "The largest predicted effect is 6.0% of what a patch does to its own concept: so small a change"),
        (0.2, 0.5, "and not what the model makes of it"),
    ],
)
def test_ranks_that_do_not_agree_are_explained(agreement: float, predicted: float, output: str) -> None:
    results = (
        Measurement("a -> b", MOVED, 0.1, 6),
        Measurement("a -> b", PREDICTED, predicted, 6),
        Measurement("all pairs", f"rank correlation of prediction and {MOVED}", agreement, 2),
    )
    text = CrosstalkSuite.section(Numbers(results)).text
    assert f"{agreement:.2f} over 2 pairs" in text
    assert output in text
    assert ("largest predicted" in text) == bool(output)


def test_a_report_gives_no_verdict_on_too_few_pictures() -> None:
    rows = [
        Measurement("erased: cat", "accuracy", 0.0, 10, 0.0, 0.28),
        Measurement("kept: other objects", SHARE, 1.0, 9, 0.7, 1.0),
    ]
    table = summary({"quick": Numbers(rows)}).table
    assert table is not None
    assert [row[-1] for row in table.rows] == [UNDECIDED, UNDECIDED]


def test_names_never_break_a_model_card() -> None:
    nasty = "a|b <script>`x` *y*\n| forged | row | 1 | `id` |\n# heading \"'"
    patch: Any = SimpleNamespace(concept=nasty, solver="separable", id="d" * 64)
    card = model_card(nasty, nasty, "f" * 64, [(patch, 1.0)])
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in rows] == [5, 5, 5]
    assert not re.search(r"<|\*|^# heading", card, re.MULTILINE)
    assert html.unescape(rows[-1].split("|")[1].strip()) == " ".join(nasty.split())
