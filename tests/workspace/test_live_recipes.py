"""Pipelines follow the recipe that was applied to them, and a recipe can be restored whatever else is broken."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import overpaint
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.patches.compose import compose
from overpaint.workspace.opened import CannotFollow, LostPatch
from overpaint.workspace.recipe import Recipe
from overpaint.workspace.workspace import Workspace


@pytest.fixture
def recipe(workspace: Workspace) -> Recipe:
    """An empty recipe."""
    return workspace.create_recipe("safe")


def carries(pipe: Any, recipe: Recipe) -> bool:
    """Whether every tensor of the U-Net is what the recipe composes, and the base's where it changes nothing."""
    base, values = recipe.base, {f"unet/{name}": value for name, value in pipe.unet.state_dict().items()}
    expected = dict(compose(base, recipe.terms()))
    key = base.fingerprint
    if key not in PLAIN:
        PLAIN[key] = {name: base.tensor(name).float() for name in values}
    return all(torch.equal(value, expected.get(name, PLAIN[key][name]).float()) for name, value in values.items())


PLAIN: dict[str, dict[str, torch.Tensor]] = {}
"""The U-Nets of bases by fingerprint, read once."""


def test_a_pipeline_follows_every_change_of_its_recipe(recipe: Recipe) -> None:
    pipe, second = recipe.pipeline(device="cpu"), recipe.base.pipeline()
    assert recipe.apply(second) is second
    changes: list[Callable[[], object]] = [
        lambda: recipe.add("cat"),
        lambda: recipe.add_all(["dog", "fox"], 0.5),
        recipe.undo,
        lambda: recipe.checkout(0),
    ]
    for change in changes:
        change()
        assert carries(pipe, recipe)
        assert carries(second, recipe)


def test_two_objects_for_one_recipe_drive_the_same_pipeline(workspace: Workspace, recipe: Recipe) -> None:
    pipe = workspace.recipe("safe").pipeline(device="cpu")
    workspace.recipe("safe").add("cat")
    assert carries(pipe, recipe)


def test_refresh_takes_what_another_process_changed(workspace: Workspace, recipe: Recipe) -> None:
    pipe = recipe.pipeline(device="cpu")
    overpaint.open(workspace.registry.folder).recipe("safe").add("cat")
    assert not carries(pipe, recipe)
    recipe.refresh()
    assert carries(pipe, recipe)


def test_a_revision_is_applied_as_it_was_and_follows_nothing(workspace: Workspace, recipe: Recipe) -> None:
    recipe.add("cat")
    then = workspace.recipe("safe@1")
    pipe = then.pipeline(device="cpu")
    recipe.remove("cat")
    assert carries(pipe, then)


def test_a_pipeline_that_cannot_follow_stops_the_change_and_nothing_is_half_done(recipe: Recipe) -> None:
    first, second = recipe.pipeline(device="cpu"), recipe.pipeline(device="cpu")
    recipe.add("cat")
    weight = next(p for name, p in second.unet.named_parameters() if name.endswith("attn2.to_k.weight"))
    with torch.no_grad():
        weight.copy_(weight + 1)
    changes: list[Callable[[], object]] = [lambda: recipe.add("dog"), lambda: recipe.remove("cat")]
    for change in changes:
        with pytest.raises(CannotFollow, match="the recipe stays as it was"):
            change()
        assert [line.concept for line in recipe.log()] == ["cat"]
        assert carries(first, recipe)
    recipe.release(second)
    recipe.remove("cat")
    assert carries(first, recipe)


def test_a_change_that_the_registry_refuses_leaves_pipelines_as_they_were(recipe: Recipe) -> None:
    recipe.add("cat")
    pipe = recipe.pipeline(device="cpu")
    with pytest.raises(AlreadyExists):
        recipe.add("cat")
    with pytest.raises(AlreadyExists):
        recipe.add_all(["dog", "cat"])
    assert recipe.add("cat", exist_ok=True).revision == 1
    assert recipe.add_all(["cat"], exist_ok=True) == []
    assert [record.concept for record, _ in recipe.patches()] == ["cat"]
    assert carries(pipe, recipe)


def test_a_pipeline_can_change_its_recipe_but_not_its_base(
    workspace: Workspace, recipe: Recipe, tmp_path: Path
) -> None:
    other = workspace.create_recipe("other")
    other.add("dog")
    pipe = recipe.pipeline(device="cpu")
    other.apply(pipe)
    recipe.add("cat")
    assert carries(pipe, other)
    from overpaint.testing import tiny_base

    workspace.add_base("third", tiny_base(tmp_path / "third", seed=7).path)
    with pytest.raises(CannotFollow, match="load another pipeline"):
        workspace.create_recipe("elsewhere", base="third").apply(pipe)


def test_an_unreferenced_pipeline_is_freed(recipe: Recipe) -> None:
    pipe = recipe.pipeline(device="cpu")
    alive = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert alive() is None
    recipe.add("cat")


def test_several_patches_are_one_revision_that_is_undone_at_once(recipe: Recipe) -> None:
    lines = recipe.add_all(["cat", "dog"], why="takedown")
    assert {(line.revision, line.action, line.why) for line in lines} == {(1, "add", "takedown")}
    assert {line.digest_after for line in lines} == {recipe.digest()}
    mixed = recipe.add_all(["cat", "fox"], 0.5)
    assert {(line.concept, line.action) for line in mixed} == {("cat", "strength"), ("fox", "add")}
    recipe.undo()
    assert recipe.digest() == lines[0].digest_after
    with pytest.raises(NotFound):
        recipe.remove_all(["cat", "fox"])
    assert [record.concept for record, _ in recipe.patches()] == ["cat", "dog"]
    with pytest.raises(NotFound, match="nothing to undo"):
        overpaint.open(recipe._opened.registry.folder).create_recipe("new").undo()


def lose(workspace: Workspace, concept: str) -> Workspace:
    """Take the bytes of a concept's patch away; the registry, opened anew."""
    record = workspace.registry.patch(concept)
    for blob in {record.id, record.blob}:
        for path in (workspace.registry.folder / "blobs").rglob(f"*{blob[2:]}"):
            path.unlink()
    again = overpaint.open(workspace.registry.folder)
    with pytest.raises(LostPatch, match=concept):
        again.patch(concept)
    return again


def test_a_lost_blob_does_not_stand_in_the_way_of_restoring(workspace: Workspace, recipe: Recipe) -> None:
    recipe.add("cat")
    cat_alone = recipe.digest()
    recipe.add_all(["dog", "fox"])
    again = lose(workspace, "cat").recipe("safe")
    line = again.remove("fox")
    assert line.digest_after is None, "nobody ever composed cat and dog"
    assert again.remove("dog").digest_after == cat_alone, "which is on record"
    assert again.checkout(0)[0].digest_after == again.record.digest == again._opened.registry.base("tiny").fingerprint
    with pytest.raises(LostPatch, match="'cat'"):
        again.checkout(1)
    with pytest.raises(LostPatch, match="'cat'"):
        again.undo()
    again.add("dog")
    again.remove("dog")
    assert again.digest() == again.base.fingerprint


@pytest.mark.parametrize("gone", ["cat", "dog"])
def test_the_patch_whose_blob_is_lost_can_itself_be_removed(workspace: Workspace, recipe: Recipe, gone: str) -> None:
    recipe.add("dog")
    digests = {"cat": recipe.digest()}
    recipe.add("cat")
    again = lose(workspace, gone).recipe("safe")
    line = again.remove(gone)
    assert line.digest_before == recipe.log()[1].digest_after
    assert line.digest_after == (digests[gone] if gone in digests else again.digest())


def test_a_live_pipeline_is_restored_without_the_lost_bytes(workspace: Workspace, recipe: Recipe) -> None:
    recipe.add_all(["cat", "dog"])
    pipe = recipe.pipeline(device="cpu")
    lose(workspace, "cat")
    workspace._patches.clear()
    recipe.remove("dog")
    recipe.remove("cat")
    assert carries(pipe, recipe)


def test_adding_and_removing_compose_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*given: Any) -> Any:
        calls.append(1)
        return compose(*given)

    monkeypatch.setattr("overpaint.patches.compose.compose", counted)
    recipe.add_all(["cat", "dog"])
    assert len(calls) == 1
    recipe.remove("cat")
    assert len(calls) == 2
    recipe.remove("dog")
    assert len(calls) == 2, "the empty recipe is the base, whose digest is known"


def test_a_base_whose_files_are_gone_can_be_restored_too(
    workspace: Workspace, recipe: Recipe, base_folder: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(base_folder, tmp_path / "copy")
    workspace.add_base("copy", moved)
    recipe = workspace.create_recipe("on the copy", base="copy")
    recipe.add(workspace.registry.patch("cat"))
    shutil.rmtree(moved)
    again = overpaint.open(workspace.registry.folder).recipe("on the copy")
    assert again.remove("cat").digest_after == workspace.registry.base("copy").fingerprint
    with pytest.raises(OverpaintError):
        again.add("cat")
