"""Recipe files: a plan first, what is missing solved, one revision, nothing the second time; and back to a file."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import overpaint
from overpaint.cli import main
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.workspace.concept_file import BadConceptFile
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
        "line 3, column 1": "did you mean base?",
        "line 6, column 15": "a strength is a number",
        "line 7, column 14": "YYYY-MM-DD, or never",
        "line 8, column 5": "names nothing",
        "line 10, column 5": "did you mean solver?",
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


def test_expired_patches_are_removed_when_asked_to(workspace: Workspace, tmp_path: Path) -> None:
    workspace.apply_recipe(file(tmp_path, FILE.replace("2999-01-31", "2020-01-31")))
    lines = workspace.remove_expired(date(2020, 1, 30))
    assert lines == []
    command = ["--registry", str(workspace.registry.folder), "recipe", "expired", "--remove", "--why", "licensed"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "cat" in shown.stdout
    assert set(held(workspace)) == {"dog"}
    assert workspace.recipe("safe").log()[-1].why == "licensed"
    assert workspace.remove_expired() == []
