"""`overpaint evaluate` as a user meets it: numbers that stay with what they are about, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from overpaint.cli import main

HOOK = ("--judge", "hook:tests.evaluation.scripted:one_class", "--steps", "1", "--set", "erased=2")


@pytest.fixture(scope="module")
def registry(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a patch for the cat on the recipe safe."""
    folder = tmp_path_factory.mktemp("evaluate") / "registry"
    for words in (
        ("init",),
        ("base", "add", "tiny", str(base_folder)),
        ("concept", "add", "cat"),
        ("solve", "cat", "--base", "tiny"),
        ("patch", "add", "cat", "--recipe", "safe"),
    ):
        run(folder, *words)
    return folder


def run(registry: Path, *words: str, code: int = 0) -> Result:
    found = CliRunner().invoke(main, ["--registry", str(registry), *words], catch_exceptions=False)
    assert found.exit_code == code, found.output
    return found


def test_numbers_are_printed_stored_and_shown_with_the_recipe(registry: Path) -> None:
    rows = json.loads(run(registry, "evaluate", "safe", *HOOK, "--json").stdout)
    assert {"about": "erased: cat", "metric": "accuracy", "value": 1.0}.items() <= rows[1].items()
    assert rows[1]["n"] == 2
    assert rows[1]["low"] < rows[1]["high"] == 1
    shown = run(registry, "recipe", "show", "safe").stdout
    assert "quick of recipe safe@1 by cats, seed 0" in shown
    assert "erased: cat" in shown
    assert json.loads(run(registry, "recipe", "show", "safe", "--json").stdout)["patches"][0]["concept"] == "cat"


def test_a_patch_alone_can_be_evaluated(registry: Path) -> None:
    run(registry, "evaluate", "cat", *HOOK)
    assert "quick of patch" in run(registry, "patch", "show", "cat").stdout
    rows = json.loads(run(registry, "patch", "show", "cat", "--json").stdout)
    assert {"what": "quick: restored: weights: tensors that differ in any bit", "value": 0.0} in rows


def test_a_second_run_draws_nothing_and_finds_the_same(registry: Path) -> None:
    first = run(registry, "evaluate", "safe", *HOOK, "--json").stdout
    pictures = {p: p.stat().st_mtime_ns for p in (registry / "cache" / "pictures").rglob("*.png")}
    assert pictures
    assert run(registry, "evaluate", "safe", *HOOK, "--json").stdout == first
    assert {p: p.stat().st_mtime_ns for p in (registry / "cache" / "pictures").rglob("*.png")} == pictures


def test_a_damaged_picture_is_reported(registry: Path) -> None:
    run(registry, "evaluate", "safe", *HOOK)
    place = next((registry / "cache" / "pictures").rglob("*.png"))
    place.write_bytes(b"damaged")
    assert f"drawn again: {place}" in run(registry, "evaluate", "safe", *HOOK).stderr.replace("\n", "")


def test_suites_are_listed(registry: Path) -> None:
    suites = json.loads(run(registry, "evaluate", "--list", "--json").stdout)
    assert {row["suite"] for row in suites} >= {"quick", "grid", "generality", "scenes", "scale", "crosstalk", "cost"}


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (("evaluate", "unsafe", *HOOK), "no patch answers to 'unsafe'"),
        (("evaluate", "safe", "--suite", "quik"), "did you mean 'quick'?"),
        (("evaluate", "safe"), "no judge in"),
        (("evaluate", "safe@9", *HOOK), "revision"),
        (("evaluate", "safe", *HOOK, "--set", "erased=no"), "erased='no' is not a int"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_sentence(registry: Path, words: tuple[str, ...], output: str) -> None:
    before = run(registry, "recipe", "show", "safe").stdout
    found = run(registry, *words, code=1)
    assert output in " ".join(found.stderr.split())
    assert "Traceback" not in found.output
    assert run(registry, "recipe", "show", "safe").stdout == before


def test_a_name_is_needed(registry: Path) -> None:
    assert "name a recipe or a patch" in run(registry, "evaluate", code=2).stderr
