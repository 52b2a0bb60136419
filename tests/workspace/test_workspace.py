"""The main job through the public facade: solve, add, remove, build."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import overpaint
from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.testing import tiny_base
from overpaint.workspace.planning import Truncation
from overpaint.workspace.recipe import Recipe
from overpaint.workspace.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path, base_folder: Path) -> Workspace:
    workspace = overpaint.open(tmp_path / "registry")
    workspace.add_base("tiny", base_folder)
    return workspace


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights of a pipeline."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}/{key}": value.clone() for name, part in models.items() for key, value in part.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that are not the same, bit for bit."""
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_the_python_block_of_the_readme_runs_twice_and_gives_the_weights_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    block = readme.split("```python\n")[1].split("```")[0]
    steps, last = block[: block.index("recipe.remove")], block[block.index("recipe.remove") :]
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        names: dict[str, Any] = {}
        exec(steps, names)
        plain = weights(names["workspace"].base("emoji").pipeline())
        assert changed(weights(names["pipe"]), plain), "the pipeline carries the patch"
        exec(last, names)
        assert changed(weights(names["pipe"]), plain) == [], "every tensor is the base's again"


def test_restore_is_shown_by_digests(workspace: Workspace) -> None:
    recipe = workspace.create_recipe("safe", exist_ok=True)
    for name in ("cat", "dog"):
        recipe.add(workspace.solve(name, base="tiny"), why="takedown")
    recipe.remove("cat", why="licence")
    lines = recipe.log()
    assert [line.action for line in lines] == ["add", "add", "remove"]
    assert [line.why for line in lines] == ["takedown", "takedown", "licence"]
    assert lines[0].digest_before == workspace.base("tiny").fingerprint
    only_dog = workspace.create_recipe("only dog", base="tiny", exist_ok=True)
    only_dog.add("dog")
    assert only_dog.digest() == recipe.digest() == lines[-1].digest_after
    recipe.remove("dog")
    assert recipe.digest() == workspace.base("tiny").fingerprint


def test_solving_the_same_twice_stores_one_patch(workspace: Workspace) -> None:
    assert workspace.solve("cat", base="tiny").id == workspace.solve("cat", base="tiny").id
    assert len(workspace.patches()) == 1


def test_a_failed_solve_stores_nothing(workspace: Workspace) -> None:
    with pytest.raises(OverpaintError):
        workspace.solve("cat", base="tiny", solver="nothing")
    with pytest.raises(OverpaintError):
        workspace.solve("cat", base="tiny", settings={"rank": "-1"})
    assert workspace.patches() == []
    assert workspace.concepts() == []


def test_a_base_that_changed_since_it_was_added_is_noticed(
    workspace: Workspace, tmp_path: Path, base_folder: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base_folder, copy)
    workspace.add_base("copy", copy)
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    with pytest.raises(OverpaintError, match="changed since it was added"):
        overpaint.open(tmp_path / "registry").base("copy")


def test_names_are_free_text(workspace: Workspace) -> None:
    recipe = workspace.create_recipe("Montag, früh / spät'; DROP TABLE patches", base="tiny", exist_ok=True)
    recipe.add(workspace.solve("kä 'x' /", base="tiny"))
    again = workspace.recipe("Montag, früh / spät'; DROP TABLE patches")
    assert again.patches()[0][0].concept == "kä 'x' /"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "not a folder"),
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "not a diffusers index"),
        (
            lambda f: (f / "model_index.json").write_text(json.dumps({"_class_name": "AudioLDMPipeline"})),
            "AudioLDMPipeline",
        ),
        (lambda f: shutil.rmtree(f / "unet"), "there is no folder"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "has no diffusion_pytorch_model"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\x10" * 64), "cut short or damaged"),
    ],
)
def test_a_broken_base_is_refused_and_nothing_is_stored(
    tmp_path: Path, base_folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base_folder, copy)
    spoil(copy)
    workspace = overpaint.open(tmp_path / "registry")
    with pytest.raises(OverpaintError, match=message):
        workspace.add_base("copy", copy)
    assert workspace.bases() == []


def test_a_name_that_is_taken_or_unknown_is_refused(workspace: Workspace, base_folder: Path) -> None:
    with pytest.raises(AlreadyExists, match="tiny"):
        workspace.add_base("tiny", base_folder)
    workspace.add_concept("cat")
    with pytest.raises(AlreadyExists, match="cat"):
        workspace.add_concept("cat", kind="style")
    with pytest.raises(NotFound, match="tiny"):
        workspace.solve("cat", base="tinny")
    with pytest.raises(NotFound):
        workspace.recipe("nothing")


MISTAKES: dict[str, tuple[Callable[[Workspace], object], str]] = {
    "one synonym": (lambda w: w.add_concept("bird", synonyms="birdie"), r"are a list of texts, .*; got 'birdie'"),
    "a synonym of nothing": (
        lambda w: w.add_concept("bird", synonyms=[""]),
        r"a synonym .* needs a name; got an empty",
    ),
    "a synonym of nothing more": (
        lambda w: w.edit_concept("apple", synonyms=["", "fruit"]),
        r"needs a name; got an empty",
    ),
    "a synonym of nothing to solve": (
        lambda w: w.solve(Concept("bird", synonyms=("",)), base="tiny"),
        r"needs a name; got an empty",
    ),
    "one synonym more": (lambda w: w.edit_concept("apple", synonyms="fruit"), r"are a list of texts, .*; got 'fruit'"),
    "one prompt": (lambda w: w.add_concept("fish", prompts="a fish"), r"are a list of texts, .*; got 'a fish'"),
    "one prompt to preserve": (lambda w: w.preserve("tiny", "sea"), r"are a list of texts, .*; got 'sea'"),
    "a universe of one": (lambda w: w.solve_context("tiny", "sea"), r"are a list of texts, .*; got 'sea'"),
    "an anchor": (lambda w: w.add_concept("fish", anchor=5), r"are texts; got 5"),  # type: ignore[arg-type]
    "a name": (lambda w: w.recipe(5), r"the name of a recipe is a text; got 5"),  # type: ignore[arg-type]
    "a reason": (
        lambda w: w.create_recipe("r", base="tiny").copy("s", why=5),  # type: ignore[arg-type]
        r"is a text; got 5",
    ),
    "a day": (lambda w: w.due("2026-11-29"), r"a day is a datetime.date; got '2026-11-29'"),  # type: ignore[arg-type]
    "a limit": (lambda w: w.patches(limit=-5), r"the limit of a list is a whole number of at least 0; got -5"),
    "an offset": (lambda w: w.recipes(offset=-5), r"the offset of a list is a whole number of at least 0; got -5"),
    "a share": (lambda w: Truncation.parse(None), r"or a share of energy, .*; got 'None'"),  # type: ignore[arg-type]
    "a rank of nothing": (lambda w: Truncation.parse("0"), r"a rank of at least 1, .*; got 0$"),
    "a seed": (lambda w: w.create_recipe("r", base="tiny").evaluate(seed=-1), r"at least 0; got -1"),
    "a device": (lambda w: w.prepare("tiny", device=None), r"unknown device None"),  # type: ignore[arg-type]
    "a device's number": (lambda w: w.prepare("tiny", device=10**40), r"unknown device"),  # type: ignore[arg-type]
    "one concept to solve": (lambda w: w.solve_many("dog", base="tiny"), r"are a list of texts, .*; got 'dog'"),
    "one concept to plan": (lambda w: w.plan("dog", base="tiny"), r"are a list of texts, .*; got 'dog'"),
    "one patch to export": (
        lambda w: w.export_patches("dog", "x.safetensors"),
        r"the patches to export are a list of texts, .*; got 'dog'",
    ),
    "one patch to add": (lambda w: w.create_recipe("r", base="tiny").add_all("dog"), r"are a list of ids.*; got 'dog'"),
    "one patch to remove": (
        lambda w: w.create_recipe("r", base="tiny").remove_all("dog"),
        r"are a list of ids.*; got 'dog'",
    ),
    "no patch": (
        lambda w: w.create_recipe("r", base="tiny").add(None),  # type: ignore[arg-type]
        r"named by its id or concept.*; got None",
    ),
    "no entries": (
        lambda w: w.create_recipe("r", base="tiny").hold(["dog"]),  # type: ignore[list-item]
        r"entries are a list of recipe entries; got \['dog'\]",
    ),
    "one patch to tag": (lambda w: w.registry.tag("x", patches="dog", who="me"), r"are a list of texts.*; got 'dog'"),
    "a solver": (lambda w: w.solve("dog", base="tiny", solver=None), r"names of solvers .*; got"),  # type: ignore[arg-type]
    "a part of the vocabulary": (lambda w: w.prepare("tiny", vocabulary=-1), r"of at least 0; got -1"),
    "a solver to prepare for": (
        lambda w: w.prepare("tiny", solver="esd"),
        r"one of separable, separable_mlp; got 'esd'",
    ),
    "a cluster": (lambda w: w.solve_many(["dog"], base="tiny", on=3), r"got 3 as the place to run on; ray"),  # type: ignore[arg-type]
    "a place": (lambda w: w.browse("x" * 5000), r"name too long|cannot"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_python_is_one_sentence_and_changes_nothing(workspace: Workspace, mistake: str) -> None:
    call, message = MISTAKES[mistake]
    workspace.add_concept("apple", exist_ok=True)
    before = workspace.concepts()
    with pytest.raises(OverpaintError, match=message):
        call(workspace)
    assert workspace.concepts() == before


def test_a_new_recipe_needs_a_base_when_there_are_several(workspace: Workspace, tmp_path: Path) -> None:
    workspace.add_base("second", tiny_base(tmp_path / "second", seed=7).path)
    with pytest.raises(OverpaintError, match="on which base"):
        workspace.create_recipe("new")
    with pytest.raises(NotFound, match="new"):
        workspace.recipe("new")


def test_a_build_is_the_recipe(workspace: Workspace, tmp_path: Path) -> None:
    recipe = workspace.create_recipe("safe", exist_ok=True)
    recipe.add(workspace.solve("cat", base="tiny"))
    built = recipe.build(tmp_path / "out")
    assert Base.open(built.folder).fingerprint == recipe.digest() == built.digest
    assert "cat" in (built.folder / "README.md").read_text("utf-8")


def test_digests_are_remembered_between_openings(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(places: dict[str, object], containers: object, progress: object) -> dict[str, str]:
        calls.extend(places)
        return {}

    monkeypatch.setattr("overpaint.bases.base.digests_of", counted)
    overpaint.open(tmp_path / "registry").base("tiny")
    assert calls == []


def test_a_concurrent_change_is_taken_into_account(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests in the history are those of what the recipe really held."""
    recipe = workspace.create_recipe("safe", exist_ok=True)
    cat, dog = (workspace.solve(name, base="tiny") for name in ("cat", "dog"))
    real = recipe._composed
    once: list[int] = []

    def interrupted(strengths: dict[str, float]) -> str:
        if not once:
            once.append(1)
            workspace.recipe("safe").add(dog)
        return real(strengths)

    monkeypatch.setattr(recipe, "_composed", interrupted)
    line = recipe.add(cat)
    first, second = recipe.log()
    assert (first.concept, second.concept) == ("dog", "cat")
    assert line == second
    assert second.digest_before == first.digest_after


def test_what_a_script_does_twice_can_be_made_to_succeed(
    workspace: Workspace, base_folder: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        workspace.add_base("tiny", base_folder, exist_ok=True)
        workspace.add_concept("cat", synonyms=["kitty"], exist_ok=True)
        recipe = workspace.create_recipe("safe", exist_ok=True)
        recipe.add(workspace.solve("cat"), exist_ok=True)
    assert (len(workspace.bases()), len(workspace.concepts()), recipe.record.revision) == (1, 1, 1)
    with pytest.raises(AlreadyExists, match="another base"):
        workspace.add_base("tiny", tiny_base(tmp_path / "other", seed=7).path, exist_ok=True)
    with pytest.raises(AlreadyExists, match="cat"):
        workspace.add_concept("cat", kind="style", exist_ok=True)


def test_a_moved_base_is_found_again_and_only_that(workspace: Workspace, base_folder: Path, tmp_path: Path) -> None:
    patch = workspace.solve("cat", base="tiny")
    moved, other = shutil.copytree(base_folder, tmp_path / "moved"), tiny_base(tmp_path / "other", seed=7).path
    with pytest.raises(OverpaintError, match="not the base 'tiny'"):
        workspace.move_base("tiny", other)
    assert workspace.move_base("tiny", moved).source == moved
    assert overpaint.open(workspace.registry.folder).base("tiny").path == moved
    with pytest.raises(OverpaintError, match="needed by 1 patches"):
        workspace.remove_base("tiny")
    workspace.add_base("again", base_folder)
    workspace.remove_base("tiny")
    workspace.create_recipe("safe").add(patch.id)


def test_a_base_whose_folder_was_moved_is_added_again_under_its_name(
    workspace: Workspace, base_folder: Path, tmp_path: Path
) -> None:
    before = shutil.copytree(base_folder, tmp_path / "before")
    workspace.add_base("mine", before)
    patch = workspace.solve("cat", base="mine")
    with pytest.raises(AlreadyExists, match=f"files are at {before}; there is nothing to add"):
        workspace.add_base("mine", base_folder)
    after = before.rename(tmp_path / "after")
    again = overpaint.open(workspace.registry.folder)
    with pytest.raises(
        OverpaintError, match=f"no longer at {before}.* add them again .*`overpaint base add mine PATH`"
    ):
        again.base("mine")
    other = tiny_base(tmp_path / "other", seed=7)
    with pytest.raises(AlreadyExists, match="another base called 'mine'") as refused:
        again.add_base("mine", other.path, exist_ok=True)
    assert other.fingerprint[:12] in str(refused.value)
    assert again.registry.base("mine").fingerprint[:12] in str(refused.value)
    assert again.add_base("mine", after).source == after
    again.create_recipe("safe", base="mine").add(patch)
    last = shutil.copytree(after, tmp_path / "last")
    shutil.copytree(other.path, after, dirs_exist_ok=True)
    assert again.add_base("mine", last).source == last, "where it was there is another base now"
    assert [record.name for record in again.bases()] == ["tiny", "mine"]


def test_one_base_may_have_several_names(workspace: Workspace, base_folder: Path, tmp_path: Path) -> None:
    workspace.add_base("second", shutil.copytree(base_folder, tmp_path / "copy"))
    patch = workspace.solve("cat", base="tiny")
    workspace.create_recipe("safe", base="second").add(patch)
    assert workspace.recipe("safe").patches()[0][0].id == patch.id


def test_a_concept_can_be_described_otherwise_and_removed(workspace: Workspace) -> None:
    workspace.add_concept("cat", synonyms=["kitty"])
    assert workspace.edit_concept("cat", anchor="dog").synonyms == ("kitty",)
    assert workspace.concepts()[0].anchor == "dog"
    patch = workspace.solve("cat")
    with pytest.raises(OverpaintError, match="1 patch for it"):
        workspace.remove_concept("cat")
    recipe = workspace.create_recipe("safe")
    recipe.add(patch)
    recipe.remove(patch)
    with pytest.raises(OverpaintError, match="history of 'safe' needs it"):
        workspace.remove_patch("cat")
    other = workspace.solve("dog")
    assert workspace.remove_patch(other.id).concept == "dog"
    workspace.remove_concept("dog")
    assert [concept.name for concept in workspace.concepts()] == ["cat"]


def test_settings_of_a_solver_are_keywords_checked_by_name(workspace: Workspace) -> None:
    by_keyword = workspace.solve("cat", solver="uce", ridge=0.5)
    assert by_keyword.id == workspace.solve("cat", solver="uce", settings={"ridge": "0.5"}).id
    with pytest.raises(OverpaintError, match="ridge"):
        workspace.solve("cat", solver="uce", rigde=0.5)
    outcomes = workspace.solve_many(["cat", "dog"], solver="uce", ridge=0.5)
    assert [outcome.before for outcome in outcomes] == [False, False], "the universe is another one now"
    assert "ridge" in next(each for each in workspace.solvers() if each.name == "uce").settings


def test_public_objects_have_a_useful_repr(workspace: Workspace) -> None:
    solved = workspace.solve("cat")
    recipe = workspace.create_recipe("<b>safe")
    recipe.add(solved)
    assert "cat on tiny" in repr(solved)
    assert "erases cat" in repr(recipe)
    patch = workspace.patch(solved.id)
    assert repr(patch) == f"<Patch {patch.id[:12]}: cat by separable, {patch.nbytes:,} bytes>"
    assert f"<td>{patch.nbytes:,}</td>" in patch._repr_html_()
    assert f"<td>{solved.nbytes:,}</td>" in solved._repr_html_()
    assert "<td>cat</td>" in recipe._repr_html_()
    assert "1 patches, 1 recipes" in repr(workspace)
    assert "&lt;b&gt;safe" in recipe._repr_html_()
    assert "<b>" not in workspace._repr_html_()


def test_the_signatures_of_the_public_objects_are_whole_and_stay() -> None:
    pinned = json.loads((Path(__file__).parent / "signatures.json").read_text("utf-8"))
    assert signatures() == pinned, "the API is a promise: add parameters at the end, and write them down here"
    for name, text in pinned.items():
        assert "**" not in text or name in BAGS, f"{name} hides its parameters: {text}"
        assert "*args" not in text


BAGS = ("Workspace.solve", "Workspace.solve_many", "Workspace.plan")
"""Settings of a solver, which are checked by name."""


def signatures() -> dict[str, str]:
    """Every public method of what `overpaint.open` returns and of its recipes, with its signature."""
    return {
        f"{kind.__name__}.{name}": re.sub(
            r"<function (\S+) at \w+>", r"\1", str(inspect.signature(getattr(kind, name)))
        )
        for kind in (Workspace, Recipe)
        for name in sorted(dir(kind))
        if not name.startswith("_") and callable(getattr(kind, name))
    }
