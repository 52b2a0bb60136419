"""What people switch by hand: the studio of pages, the widget of notebooks, a pipeline that carries a recipe for a while."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import overpaint
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry.history import StaleRevision
from overpaint.testing import tiny_base
from overpaint.workspace.evaluating import Studio
from overpaint.workspace.recipe import Recipe
from overpaint.workspace.workspace import Workspace

# ipywidgets, on which anywidget stands, asks an event loop of asyncio about its age when no kernel runs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ipywidgets.*")

PROMPT = "a photo of a cat"


@pytest.fixture(scope="module")
def recipe(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe with cat and dog on the tiny base, stronger than one would, since it has few pixels to change."""
    workspace = overpaint.open(tmp_path_factory.mktemp("interactive"))
    workspace.add_base("tiny", base_folder)
    recipe = workspace.create_recipe("safe")
    for name in ("cat", "dog"):
        recipe.add(workspace.solve(name, solver="uce"), 2.0)
    return recipe


@pytest.fixture
def workspace(recipe: Recipe) -> Workspace:
    return overpaint.open(recipe._opened.registry.folder)


def test_a_studio_draws_the_same_bytes_again_and_the_bases_when_all_is_off(
    workspace: Workspace, tmp_path: Path
) -> None:
    studio, strengths = Studio(workspace, tmp_path), dict(workspace.recipe("safe").record.patches)
    how: dict[str, Any] = {"steps": 2, "guidance": studio.guidance("tiny")}
    base, patched = studio.draw("tiny", {}, PROMPT, 0, **how), studio.draw("tiny", strengths, PROMPT, 0, **how)
    assert (base.weights, patched.weights) == (workspace.base("tiny").fingerprint, workspace.recipe("safe").digest())
    assert not np.array_equal(base.pixels, patched.pixels)
    off = studio.draw("tiny", dict.fromkeys(strengths, 0.0), PROMPT, 0, **how)
    assert off.file == base.file, "drawn once"
    afresh = Studio(workspace, tmp_path / "afresh").draw("tiny", strengths, PROMPT, 0, **how)
    assert np.array_equal(afresh.pixels, patched.pixels)
    with pytest.raises(OverpaintError, match="at least one step"):
        studio.draw("tiny", {}, PROMPT, 0, steps=0, guidance=1.0)
    for wrong in ({"seed": 2**64}, {"steps": 2.5}, {"guidance": float("nan")}, {"prompt": "\ud800"}):
        asked: dict[str, Any] = {"prompt": PROMPT, "seed": 0, "steps": 1, "guidance": 1.0, **wrong}
        with pytest.raises(OverpaintError, match=r"whole|finite"):
            studio.draw("tiny", {}, **asked)
    for strength in ("1", None, float("nan"), 10**400):
        with pytest.raises(OverpaintError, match="must be a finite number"):
            studio.draw("tiny", dict.fromkeys(strengths, strength), PROMPT, 0, **how)  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        studio.draw("other", {}, PROMPT, 0, steps=1, guidance=1.0)


def test_a_base_that_another_process_replaced_under_its_name_is_drawn_as_it_is_now(
    tmp_path: Path, base_folder: Path
) -> None:
    here, elsewhere = (overpaint.open(tmp_path / "registry") for _ in range(2))
    first = here.add_base("mine", base_folder).fingerprint
    studio = Studio(here, tmp_path / "pictures")
    draw = partial(studio.draw, "mine", prompt=PROMPT, seed=0, steps=1, guidance=4.0)
    assert draw({}).weights == first
    elsewhere.remove_base("mine")
    second = elsewhere.add_base("mine", tiny_base(tmp_path / "second", seed=1).path).fingerprint
    erased = elsewhere.solve("cat", base="mine", solver="uce")
    assert draw({}).weights == second
    elsewhere.create_recipe("new", base="mine").add(erased, 2.0)
    assert draw({erased.id: 2.0}).weights == elsewhere.recipe("new").digest()
    assert here.recipe("new").digest() == elsewhere.recipe("new").digest()


def test_callers_of_a_studio_in_several_threads_get_their_own_patches(workspace: Workspace, tmp_path: Path) -> None:
    studio, ids = Studio(workspace, tmp_path), [patch_id for patch_id, _ in workspace.recipe("safe").record.patches]
    wanted = [{}, {ids[0]: 2.0}, {ids[1]: 2.0}]
    drawn: list[tuple[int, bytes]] = []

    def ask(which: int) -> None:
        for seed in range(3):
            picture = studio.draw("tiny", wanted[which], PROMPT, seed, steps=1, guidance=4.0)
            drawn.append((which * 3 + seed, picture.pixels.tobytes()))

    threads = [threading.Thread(target=ask, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Studio(workspace, tmp_path / "alone")
    for number, pixels in drawn:
        again = alone.draw("tiny", wanted[number // 3], PROMPT, number % 3, steps=1, guidance=4.0)
        assert again.pixels.tobytes() == pixels
    assert len(drawn) == 9


def test_a_set_of_patches_is_one_revision_and_needs_the_revision_that_was_seen(workspace: Workspace) -> None:
    recipe = workspace.recipe("safe").copy("set")
    cat, dog = (patch.id for patch, _ in recipe.patches())
    seen = recipe.record.revision
    lines = recipe.set_patches({cat: 0.5}, revision=seen, why="policy")
    assert {(line.action, line.revision, line.why) for line in lines} == {
        ("strength", seen + 1, "policy"),
        ("remove", seen + 1, "policy"),
    }
    assert recipe.record.patches == ((cat, 0.5),)
    assert recipe.set_patches({"cat": 0.5}) == [], "nothing changes"
    with pytest.raises(StaleRevision, match="look at what changed"):
        recipe.set_patches({dog: 1.0}, revision=seen)
    assert recipe.record.digest == recipe.digest()


def test_a_handle_gives_the_base_back_when_it_closes(workspace: Workspace) -> None:
    recipe = workspace.recipe("safe")
    pipe = recipe.base.pipeline()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}

    def is_base() -> bool:
        return all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())

    with recipe.applied(pipe) as applied:
        assert applied.pipe is pipe
        assert not is_base()
    assert is_base()
    applied.close()
    with pytest.raises(ZeroDivisionError), recipe.applied(pipe):
        _ = 1 / 0
    assert is_base()
    copy = recipe.copy("followed-no-more")
    with copy.applied(pipe):
        pass
    copy.remove("cat")
    assert is_base(), "a closed handle's pipeline does not follow"


def test_a_pipeline_is_never_bare_where_a_recipe_was_asked_for(workspace: Workspace) -> None:
    """Neither in a block after an inner one, nor in a closed handle's, nor when a handle is closed once more."""
    recipe, other = workspace.recipe("safe"), workspace.recipe("safe").copy("other")
    pipe = recipe.base.pipeline()
    with recipe.applied(pipe) as handle:
        carried = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
        with pytest.raises(OverpaintError, match="carries a recipe already"):
            other.applied(pipe)
    with pytest.raises(OverpaintError, match="this handle is closed"), handle:
        pass
    recipe.apply(pipe)
    handle.close()
    assert all(torch.equal(value, carried[name]) for name, value in pipe.unet.state_dict().items())


def test_a_widget_draws_what_is_switched_and_saves_it_when_asked_to(workspace: Workspace) -> None:
    pytest.importorskip("anywidget", reason="widgets need anywidget: pip install 'overpaint[notebook]'")
    recipe = workspace.recipe("safe").copy("in-a-notebook")
    widget = recipe.widget(PROMPT, steps=2)
    (base, patched) = widget.rows[0]["pictures"]
    assert (base["column"], patched["column"]) == ("base", "in-a-notebook")
    assert base["source"] != patched["source"]
    widget.patches = [{**each, "on": False} for each in widget.patches]
    assert [each["source"] for each in widget.rows[0]["pictures"]] == [base["source"]] * 2
    assert len(recipe.patches()) == 2, "the recipe stays until it is saved"
    widget.patches = [{**each, "on": each["concept"] == "dog", "strength": 1.5} for each in widget.patches]
    widget.save(why="after looking")
    assert [(patch.concept, strength) for patch, strength in recipe.patches()] == [("dog", 1.5)]
    recipe.remove("dog")
    with pytest.raises(StaleRevision):
        widget.save()
    broken = [{**each, "id": "f" * 64, "on": True} for each in widget.patches]
    widget.patches = broken
    assert "f" * 12 in widget.problem
