"""Recipe files: a plan first, what is missing solved, one revision, nothing the second time; and back to a file."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

import overpaint
from overpaint.cli import main
from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import history
from overpaint.registry.history import StaleRevision
from overpaint.registry.records import RecipeEntry
from overpaint.workspace.concept_file import BadConceptFile
from overpaint.workspace.recipe import Recipe
from overpaint.workspace.recipe_file import read_recipe
from overpaint.workspace.workspace import Workspace

pytestmark = pytest.mark.slow

FILE = """
recipe: safe
base: tiny
why: what this service may not show
defaults: {solver: uce}
patches:
  - dog
  - name: cat
    synonyms: [kitten]
    strength: 0.5
    expires: 2999-01-31
    why: court order
"""


@pytest.fixture
def workspace(tmp_path: Path, base_folder: Path) -> Workspace:
    """A registry with the tiny base and nothing else."""
    workspace = overpaint.open(tmp_path / "registry")
    workspace.add_base("tiny", base_folder)
    return workspace


def file(tmp_path: Path, text: str = FILE) -> Path:
    """A file of that text."""
    path = tmp_path / "safe.yaml"
    path.write_text(text, "utf-8")
    return path


def held(workspace: Workspace, recipe: str = "safe") -> dict[str, tuple[float, date | None]]:
    """Strength and expiry by concept."""
    return {patch.concept: (entry.strength, entry.until) for patch, entry in workspace.registry.patches_on(recipe)}


def test_a_file_is_planned_then_applied_and_applying_it_again_changes_nothing(
    workspace: Workspace, tmp_path: Path
) -> None:
    path = file(tmp_path)
    plan = workspace.plan_recipe(path)
    assert (plan.is_new, plan.is_done) == (True, False)
    assert [(each.action, each.concept, each.record) for each in plan.entries] == [
        ("add", "dog", None),
        ("add", "cat", None),
    ]
    assert not workspace.recipes()
    assert not workspace.concepts()
    applied = workspace.apply_recipe(plan, who="Ada")
    assert {each.concept for each in applied.solved} == {"dog", "cat"}
    assert held(workspace) == {"dog": (1.0, None), "cat": (0.5, date(2999, 1, 31))}
    assert {(line.revision, line.who, line.why) for line in applied.lines} == {
        (1, "Ada", "what this service may not show; cat: court order")
    }
    workspace.solve("fox")
    again = workspace.apply_recipe(path)
    assert (again.lines, again.solved) == ([], []), "a concept that joined the registry changes nothing"
    assert workspace.plan_recipe(path).is_done

    path.write_text(FILE.replace("strength: 0.5", "strength: 0.75").replace("  - dog\n", "  - fox\n"), "utf-8")
    changed = workspace.apply_recipe(path, why="by hand")
    assert {each.concept: each.action for each in changed.lines} == {"dog": "remove", "cat": "strength", "fox": "add"}
    assert [each.concept for each in changed.solved] == ["fox"], "that of `separable` is not what the file asks for"
    assert held(workspace)["cat"] == (0.75, date(2999, 1, 31))
    path.write_text("recipe: safe\nbase: tiny\npatches: []\n", "utf-8")
    workspace.apply_recipe(path)
    assert workspace.recipe("safe").digest() == workspace.base("tiny").fingerprint


def test_a_recipe_that_is_written_to_a_file_comes_back_from_it_here_and_elsewhere(
    workspace: Workspace, tmp_path: Path, base_folder: Path
) -> None:
    workspace.apply_recipe(file(tmp_path))
    text = workspace.recipe("safe").as_file()
    path = file(tmp_path, text)
    assert workspace.plan_recipe(path).is_done
    path.write_text(text.replace("recipe: safe", "recipe: twin"), "utf-8")
    copied = workspace.apply_recipe(path)
    assert copied.solved == []
    assert workspace.recipe("twin").digest() == workspace.recipe("safe").digest()
    elsewhere = overpaint.open(tmp_path / "elsewhere")
    elsewhere.add_base("tiny", base_folder)
    elsewhere.apply_recipe(file(tmp_path, text))
    assert held(elsewhere) == held(workspace)
    assert elsewhere.recipe("safe").digest() == workspace.recipe("safe").digest(), (
        "the universe is the same two concepts"
    )


def test_every_mistake_is_named_with_its_place_and_nothing_is_stored(workspace: Workspace, tmp_path: Path) -> None:
    path = file(
        tmp_path,
        """
recipe: safe
bse: tiny
patches:
  - name: dog
    strength: strong
    expires: soon
  - strength: 2
  - name: cat
    solvr: uce
  - cat
""",
    )
    with pytest.raises(BadConceptFile) as caught:
        workspace.plan_recipe(path)
    text = str(caught.value)
    assert "has 6 mistakes, so nothing was stored" in text
    for place, mistake in {
        "line 3, column 1": "did you mean 'base'?",
        "line 6, column 15": "a strength is a number",
        "line 7, column 14": "YYYY-MM-DD, or never",
        "line 8, column 5": "names nothing",
        "line 10, column 5": "did you mean 'solver'?",
        "line 11, column 5": "is listed twice",
    }.items():
        assert any(place in line and mistake in line for line in text.splitlines()), (place, text)
    for broken, sentence in {
        "": "the file is empty",
        "[dog]": "must be a mapping",
        "recipe: safe": "there is no `patches`",
        "recipe: safe\npatches: dog": "patches must be a list",
        "recipe: safe\nbase: tiny\npatches: [&a dog]": "alias or an anchor",
        "recipe: [": "this is not YAML",
    }.items():
        with pytest.raises(BadConceptFile, match=sentence):
            workspace.plan_recipe(file(tmp_path, broken))
    with pytest.raises(NotFound, match="cannot be read"):
        workspace.plan_recipe(tmp_path / "missing.yaml")
    assert not workspace.recipes()
    assert not workspace.concepts()


def test_what_cannot_be_done_leaves_the_recipe_as_it_was(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, kind, sentence in (
        ("recipe: safe\nbase: tyni\npatches: [dog]", NotFound, "there is 'tiny'"),
        ("recipe: safe\nbase: tiny\npatches: [{patch: 3f9a12bc}]", NotFound, "3f9a12bc"),
    ):
        with pytest.raises(kind, match=sentence):
            workspace.plan_recipe(file(tmp_path, text))
    workspace.apply_recipe(file(tmp_path))
    id = workspace.registry.patch("dog").id
    with pytest.raises(OverpaintError, match="asks twice for the patch"):
        workspace.plan_recipe(
            file(tmp_path, f"recipe: safe\nbase: tiny\npatches: [{{patch: {id}}}, {{patch: {id[:9]}}}]")
        )

    from overpaint.solvers.closed_form.uce import UCE

    def refuse(*args: object) -> None:
        raise OverpaintError("no")

    monkeypatch.setattr(UCE, "solve", refuse)
    with pytest.raises(OverpaintError, match=r"the recipe is as it was.*\n  fox: no"):
        workspace.apply_recipe(file(tmp_path, FILE.replace("- dog", "- fox")))
    assert set(held(workspace)) == {"dog", "cat"}
    assert workspace.recipe("safe").record.revision == 1


def test_a_recipe_of_another_base_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    from overpaint.testing import tiny_base

    workspace.add_base("other", tiny_base(tmp_path / "other", seed=1).path)
    workspace.create_recipe("safe", base="other")
    with pytest.raises(AlreadyExists, match="on base 'other' and not on 'tiny'"):
        workspace.plan_recipe(file(tmp_path))


def test_the_command_shows_the_plan_and_its_exit_code_says_whether_something_is_to_do(
    workspace: Workspace, tmp_path: Path
) -> None:
    path = str(file(tmp_path))

    def run(*words: str, code: int = 0) -> Result:
        done = CliRunner().invoke(main, ["--registry", str(workspace.registry.folder), "recipe", *words])
        assert done.exit_code == code, done.output
        return done

    assert "solve and add" in run("apply", path, "--dry-run").stdout
    run("apply", path, "--check", code=1)
    assert not workspace.recipes()
    assert "2 solved, weights" in run("apply", path).stdout
    assert "nothing to do" in run("apply", path, "--check").stdout
    run("export", "safe", "--as-file", "-o", str(tmp_path / "back.yaml"))
    assert "nothing to do" in run("apply", str(tmp_path / "back.yaml")).stdout
    run("apply", str(tmp_path / "missing.yaml"), code=1)


def test_expired_patches_are_removed_when_asked_to(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as then:
        then.setattr(history, "today", lambda: date(2020, 1, 1))
        workspace.apply_recipe(file(tmp_path, FILE.replace("2999-01-31", "2020-01-31")))
    path = file(tmp_path, workspace.recipe("safe").as_file())
    assert workspace.plan_recipe(path).is_done, "what has expired may stay as it is"
    lines = workspace.remove_expired(date(2020, 1, 30))
    assert lines == []
    command = ["--registry", str(workspace.registry.folder), "recipe", "expired", "--remove", "--why", "licensed"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "cat" in shown.stdout
    assert set(held(workspace)) == {"dog"}
    assert workspace.recipe("safe").log()[-1].why == "licensed"
    assert workspace.remove_expired() == []


def test_a_plan_holds_for_the_revision_that_it_was_made_from(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.apply_recipe(file(tmp_path))
    plan = workspace.plan_recipe(file(tmp_path, FILE.replace("0.5", "0.9")))
    fox = workspace.solve("fox")
    workspace.recipe("safe").add(fox, why="takedown of this minute")
    with pytest.raises(StaleRevision, match=r"'safe' is at revision 2 by now, and this change was made from 1; look"):
        workspace.apply_recipe(plan)
    assert set(held(workspace)) == {"cat", "dog", "fox"}

    new = workspace.plan_recipe(file(tmp_path, "recipe: new\nbase: tiny\npatches: []"))
    workspace.create_recipe("new").add(fox)
    with pytest.raises(StaleRevision):
        workspace.apply_recipe(new)
    assert set(held(workspace, "new")) == {"fox"}
    gone = workspace.plan_recipe(file(tmp_path, "recipe: new\nbase: tiny\npatches: []"))
    workspace.recipe("new").delete()
    with pytest.raises(NotFound):
        workspace.apply_recipe(gone)

    def meanwhile(*args: object, **options: object) -> list[object]:
        workspace.recipe("safe").remove("dog")
        return []

    while_solving = workspace.plan_recipe(file(tmp_path, FILE.replace("0.5", "0.7")))
    monkeypatch.setattr(Workspace, "carry_out", meanwhile)
    with pytest.raises(StaleRevision):
        workspace.apply_recipe(while_solving)
    assert held(workspace)["cat"][0] == 0.5


def test_a_plan_is_not_for_another_recipe_that_was_made_under_the_name(workspace: Workspace, tmp_path: Path) -> None:
    workspace.apply_recipe(file(tmp_path))
    plan, seen = workspace.plan_recipe(file(tmp_path, FILE.replace("0.5", "0.9"))), workspace.recipe("safe").record
    workspace.recipe("safe").delete()
    again = workspace.create_recipe("safe")
    again.add(workspace.solve("fox"))
    assert again.record.revision == plan.revision
    for change in (lambda: workspace.apply_recipe(plan), lambda: again.hold([], revision=seen)):
        with pytest.raises(
            StaleRevision, match=r"'safe' was deleted and made again since this change was made from it"
        ):
            change()
    assert set(held(workspace)) == {"fox"}


def test_undo_takes_back_no_change_of_somebody_else_made_meanwhile(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.apply_recipe(file(tmp_path))
    recipe, fox, compose = workspace.recipe("safe"), workspace.solve("fox"), Recipe._digest_after

    def slow(self: Recipe, *args: Any) -> str | None:
        monkeypatch.undo()
        recipe.add(fox, why="takedown of this minute")
        return compose(self, *args)

    monkeypatch.setattr(Recipe, "_digest_after", slow)
    with pytest.raises(StaleRevision, match="'safe' is at revision 2 by now, and this change was made from 1"):
        recipe.undo()
    assert set(held(workspace)) == {"cat", "dog", "fox"}


def test_a_file_that_ends_before_its_patches_removes_none(workspace: Workspace, tmp_path: Path) -> None:
    workspace.apply_recipe(file(tmp_path))
    for cut in ("patches:\n", "patches: null\n", "patches: ~\n"):
        with pytest.raises(BadConceptFile, match=r"no patch is listed; write `patches: \[\]` to remove all"):
            workspace.plan_recipe(file(tmp_path, f"recipe: safe\nbase: tiny\n{cut}"))
    plan = workspace.plan_recipe(file(tmp_path, "recipe: safe\nbase: tiny\npatches: []\n"))
    assert {each.action for each in plan.entries} == {"remove"}


NAMES = (
    "null",
    "yes",
    "~",
    "1e-4",
    "a: b",
    "#x",
    "'q",
    "@x",
    "%p",
    "[z]",
    "cat",
    "CAT",
    "2027-01-31",
    "no\u0308 \U0001f431",
)


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Workspace:
    """A registry with a patch for every one of NAMES, and a second one for some."""
    workspace = overpaint.open(tmp_path_factory.mktemp("awkward"))
    workspace.add_base("tiny: base", base_folder)
    for name in NAMES:
        workspace.solve(Concept(name, "style", anchor="~ no", prompts=("a  photo of {}",)), solver="uce")
    for name in NAMES[:4]:
        workspace.solve(name, solver="uce", seed=7, ridge=1.0)
        workspace.edit_concept(name, synonyms=["0x1"])
    return workspace


@settings(max_examples=10, deadline=None)
@given(name=st.sampled_from(NAMES) | st.text(min_size=1, max_size=9), held=st.data())
def test_whatever_a_recipe_holds_its_file_asks_for_nothing_else(
    awkward: Workspace, name: str, held: st.DataObject
) -> None:
    days = st.none() | st.dates(date(2900, 1, 1), date(9999, 12, 31))
    ids = st.sampled_from([each.id for each in awkward.patches()])
    drawn = held.draw(st.dictionaries(ids, st.tuples(st.floats(-1e3, 1e3), days), max_size=6))
    try:
        recipe = awkward.create_recipe(name, exist_ok=True)
    except OverpaintError:
        return  # no name of a recipe
    recipe.hold([RecipeEntry(id, *entry) for id, entry in drawn.items()])
    path = awkward.registry.folder / "recipe.yaml"
    path.write_text(recipe.as_file(), "utf-8")
    plan = awkward.plan_recipe(path)
    assert (plan.recipe, plan.is_done, len(plan.entries)) == (recipe.record.name, True, len(drawn))
    assert awkward.apply_recipe(plan).lines == []


def test_two_patches_of_a_concept_and_concepts_that_differ_in_case_come_back_from_a_file(
    workspace: Workspace, tmp_path: Path, base_folder: Path
) -> None:
    recipe = workspace.create_recipe("safe")
    for concept, ridge in (("cat", 0.5), ("cat", 1.0), ("CAT", 0.5)):
        recipe.add(workspace.solve(concept, solver="uce", ridge=ridge), 0.5)
    path = file(tmp_path, recipe.as_file())
    assert workspace.plan_recipe(path).is_done
    elsewhere = overpaint.open(tmp_path / "elsewhere")
    elsewhere.add_base("tiny", base_folder)
    elsewhere.apply_recipe(path)
    assert [patch.concept for patch, _ in elsewhere.recipe("safe").patches()] == ["CAT", "cat", "cat"]
    twice = "recipe: safe\nbase: tiny\npatches: [{patch: 1234, name: cat}, {patch: 5678, name: cat}]"
    with pytest.raises(OverpaintError, match="asks twice for 'cat', solved in one way"):
        workspace.plan_recipe(file(tmp_path, twice))


def test_an_entry_whose_patch_erases_another_concept_is_a_mistake(workspace: Workspace, tmp_path: Path) -> None:
    dog = workspace.solve("dog", solver="uce")
    text = f"recipe: safe\nbase: tiny\npatches:\n  - {{patch: {dog.id}, name: cat}}"
    with pytest.raises(
        BadConceptFile, match=r"line 4, column 5: the patch .* erases 'dog', and this entry is named 'cat'"
    ):
        workspace.plan_recipe(file(tmp_path, text))


@pytest.mark.parametrize("strength", ["1_0", "١٢", ".nan", "inf", "0x1", "1e999", "1 0", "[1]", "true"])
def test_a_strength_is_a_decimal_number(workspace: Workspace, tmp_path: Path, strength: str) -> None:
    text = f"recipe: safe\nbase: tiny\npatches: [{{name: cat, strength: {strength}}}]"
    with pytest.raises(BadConceptFile, match=r"a strength (is a number, such as 0.5|must be a)"):
        workspace.plan_recipe(file(tmp_path, text))


@pytest.mark.parametrize(
    "day",
    ["20270131", "2027-W01-1", "2027-1-31", "2027-01-31T00:00:00Z", "٢٠٢٧-٠١-٣١", "2027-02-30", "Never", "2027\x07"],
)
def test_a_day_is_written_in_one_way(workspace: Workspace, tmp_path: Path, day: str) -> None:
    text = f'recipe: safe\nbase: tiny\npatches: [{{name: cat, expires: "{day}"}}]'
    with pytest.raises(BadConceptFile, match=r"YYYY-MM-DD, or never|cannot stand in a text"):
        workspace.plan_recipe(file(tmp_path, text))


def test_reasons_are_free_text(workspace: Workspace, tmp_path: Path) -> None:
    reason = "“line one”, 100%\n\tline two: " + "x" * 500
    text = "recipe: safe\nbase: tiny\nwhy: WHY\ndefaults: {solver: uce}\npatches: [{name: cat, why: WHY}]"
    text = text.replace("WHY", json.dumps(reason))
    lines = workspace.apply_recipe(file(tmp_path, text)).lines
    assert [line.why for line in lines] == [f"{reason}; cat: {reason}"]
    with pytest.raises(BadConceptFile, match="a reason cannot contain"):
        workspace.plan_recipe(file(tmp_path, text.replace("one", "one\\u0007")))
    with pytest.raises(OverpaintError, match="the reason for a change has at most"):
        workspace.plan_recipe(file(tmp_path, text.replace("x" * 500, "x" * 6000).replace("[{name: cat", "[{name: fox")))


def test_a_folder_of_pictures_is_named_as_it_is(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "cafe\u0301"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"png")
    images = 'recipe: safe\nbase: tiny\npatches: [{name: cat, solver: few_shot, images: "%s"}]'
    found = read_recipe(file(tmp_path, images % "cafe\u0301")).entries[0].request
    assert found is not None
    assert found.settings["images"] == str(folder)
    for wrong in ("~nobody-of-that-name/x", "a" * 300):
        with pytest.raises(BadConceptFile, match="has a mistake"):
            read_recipe(file(tmp_path, images % wrong))


@pytest.mark.parametrize("entry", ["patch: abcd", "name: cat"])
def test_a_setting_that_is_there_twice_is_a_mistake(tmp_path: Path, entry: str) -> None:
    text = f"recipe: safe\nbase: tiny\npatches: [{{{entry}, strength: 1, strength: 0.2}}]"
    with pytest.raises(BadConceptFile, match=r"a mistake.*\n.*'strength' is there twice"):
        read_recipe(file(tmp_path, text))


@pytest.mark.parametrize(
    ("recipe", "entry", "sentence"),
    [
        ("safe@1", "strength: 1", "which cannot be changed"),
        ("new", "strength: 1e308", "a strength is at most 1,000,000"),
        ("new", "why: a lost patch", "cannot be read"),
        ("new", "expires: 2020-01-01", r"column 5: a patch cannot expire on 2020-01-01, which is past: today is"),
    ],
)
def test_a_plan_refuses_what_applying_refuses(
    workspace: Workspace, tmp_path: Path, recipe: str, entry: str, sentence: str
) -> None:
    cat = workspace.solve("cat", solver="uce")
    workspace.create_recipe("safe").add(cat)
    if "lost" in entry:
        for blob in list(workspace.registry.blobs.blobs()):
            workspace.registry.blobs.discard(blob.digest)
    path = file(tmp_path, f"recipe: {recipe}\nbase: tiny\npatches:\n  - {{patch: {cat.id}, {entry}}}")
    command = ["--registry", str(workspace.registry.folder), "recipe", "apply", str(path)]
    shown = []
    for how in (["--dry-run"], ["--check"], []):
        done = CliRunner().invoke(main, [*command, *how])
        assert done.exit_code == 1
        assert re.search(sentence, done.stderr), done.output
        shown.append(done.stderr)
    assert len(set(shown)) == 1
    assert [each.name for each in workspace.recipes()] == ["safe"]
