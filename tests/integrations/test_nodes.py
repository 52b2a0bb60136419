"""The nodes for ComfyUI against the contract of its API: a model computes with the weights that a recipe composes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import overpaint
from overpaint.bases.base import Base
from overpaint.core.errors import OverpaintError
from overpaint.patches.compose import compose
from overpaint.patches.formats.dialects import split
from overpaint.patches.formats.exporting import FORMATS
from overpaint.workspace.recipe import Recipe
from overpaint.workspace.workspace import Workspace
from tests.bases.tiny_transformers import tiny_transformer
from tests.bases.tiny_xl import tiny_xl_base
from tests.integrations import comfy_contract
from tests.integrations.comfy_contract import Clip, ModelPatcher

NODES = Path(__file__).parents[2] / "integrations" / "comfyui"
LAYOUTS = ("stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """The package as ComfyUI loads it: by its folder, under a name of its own, beside `comfy`."""
    found = importlib.util.spec_from_file_location("custom_nodes_overpaint", NODES / "__init__.py")
    assert found is not None
    assert found.loader is not None
    package = importlib.util.module_from_spec(found)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in comfy_contract.modules():
            patch.setitem(sys.modules, name, module)
        patch.setitem(sys.modules, "custom_nodes_overpaint", package)
        found.loader.exec_module(package)
        yield package
        sys.modules.pop("custom_nodes_overpaint.nodes")


@pytest.fixture(scope="module")
def recipe_on(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Recipe]:
    """A recipe that erases cat, and dog at half strength, on the tiny base of a layout."""

    @cache
    def made(layout: str) -> Recipe:
        folder = tmp_path_factory.mktemp("comfyui")
        source = base_folder if layout == "stable-diffusion" else folder / "base"
        if layout == "stable-diffusion-xl":
            tiny_xl_base(source)
        elif layout != "stable-diffusion":
            tiny_transformer(layout).save_pretrained(source)
        workspace = overpaint.open(folder / "registry")
        workspace.add_base("tiny", source)
        recipe = workspace.create_recipe("safe")
        recipe.add(workspace.solve("cat"), why="a test")
        recipe.add(workspace.solve("dog"), 0.5)
        return recipe

    return made


def in_comfyui(base: Base, dtype: torch.dtype = torch.float16) -> tuple[ModelPatcher, Clip, dict[str, str]]:
    """A base as ComfyUI holds it, and its name there for each canonical name. Its names are its own; what a file finds counts."""
    format = "kohya" if "unet" in base.layout.components else "diffusers"
    spelled = FORMATS[format].module_names(base)
    theirs = {name: f"diffusion_model.{name.replace('/', '.')}" for name in base.names}
    parts: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    keys: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for name in base.names:
        is_encoder = name.startswith("text_encoder")
        parts[is_encoder][theirs[name]] = base.tensor(name).to(dtype)
        if name.endswith(".weight") and split(name)[0] in spelled:
            keys[is_encoder][spelled[split(name)[0]]] = theirs[name]
    model, clip = (ModelPatcher(comfy_contract.model(parts[which], keys[which])) for which in (False, True))
    return model, Clip(clip), theirs


def run(nodes: Any, model: Any, clip: Any, held: Recipe, **inputs: Any) -> tuple[Any, Any, str]:
    node = nodes.NODE_CLASS_MAPPINGS["ApplyOverpaintRecipe"]()
    registry = str(held._opened.registry.folder)
    given = {"registry": registry, "recipe": held.name, "revision": "", "strength": 1.0, "other_base": "refuse"}
    found: tuple[Any, Any, str] = node.applied(model, clip=clip, **{**given, **inputs})
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_computes_with_what_the_recipe_composes(
    nodes: Any, recipe_on: Callable[[str], Recipe], layout: str
) -> None:
    recipe = recipe_on(layout)
    base = recipe.base
    dtype = base.tensor(base.projections()[0]).dtype
    model, clip, theirs = in_comfyui(base, dtype)
    before = model.weights()
    patched, patched_clip, text = run(nodes, model, clip, recipe)
    composed = compose(base, recipe.terms())
    assert composed
    weights = {**patched.weights(), **patched_clip.patcher.weights()}
    for name, value in composed.items():
        assert torch.allclose(weights[theirs[name]].to(dtype).float(), value.float(), rtol=2e-3, atol=2e-4), name
    untouched = set(theirs.values()) - {theirs[name] for name in composed}
    loaded = {**before, **clip.patcher.weights()}
    assert all(torch.equal(weights[name], loaded[name]) for name in untouched)
    assert all(torch.equal(value, before[name]) for name, value in model.weights().items()), (
        "a clone carries the patches"
    )
    assert recipe.digest() in text
    assert f"{len(composed)} of {len(composed)} weights are the base's" in text
    assert "recipe safe@2 on tiny" in text


def test_keys_that_match_only_in_part_are_refused(nodes: Any, recipe_on: Callable[[str], Recipe]) -> None:
    recipe = recipe_on("stable-diffusion")
    model, clip, _ = in_comfyui(recipe.base)
    lost = next(key for key in model.model.keys if "attn2_to_k" in key)
    del model.model.keys[lost]
    with pytest.raises(OverpaintError, match=f"1 of .* keys have no place in this model, first {lost}"):
        run(nodes, model, clip, recipe)
    assert not model.patches


def test_another_base_is_refused_unless_one_says_otherwise(nodes: Any, recipe_on: Callable[[str], Recipe]) -> None:
    recipe = recipe_on("stable-diffusion")
    model, clip, theirs = in_comfyui(recipe.base)
    name = recipe.base.projections()[0]
    weights = {**model.model.state_dict(), theirs[name]: recipe.base.tensor(name) + 1}
    model.model = comfy_contract.model(weights, model.model.keys)
    with pytest.raises(OverpaintError, match="not the base of the patches: 1 of"):
        run(nodes, model, clip, recipe)
    patched, _, text = run(nodes, model, clip, recipe, other_base="apply")
    assert patched.patches
    assert "of no recorded digest" in text
    model.model = comfy_contract.model({**weights, theirs[name]: weights[theirs[name]][:1]}, model.model.keys)
    with pytest.raises(OverpaintError, match="this model's has"):
        run(nodes, model, clip, recipe, other_base="apply")


def test_a_file_a_list_a_revision_and_a_strength(
    nodes: Any, recipe_on: Callable[[str], Recipe], tmp_path: Path
) -> None:
    recipe = recipe_on("stable-diffusion")
    model, clip, _ = in_comfyui(recipe.base)
    whole = run(nodes, model, clip, recipe)[0].weights()
    file = recipe.export(tmp_path / "safe.safetensors", for_="comfyui").path
    from_file, _, text = run(nodes, model, None, recipe, recipe=str(file), registry="")
    assert all(torch.equal(value, whole[name]) for name, value in from_file.weights().items())
    assert "file safe.safetensors: cat 1, dog 0.5" in text
    registry = str(recipe._opened.registry.folder)
    listed, words = nodes.NODE_CLASS_MAPPINGS["OverpaintPatches"]().listed(registry, "cat 1\ndog 0.5\n", "")
    assert words.startswith("cat 1 (")
    from_list = run(nodes, model, clip, recipe, patches=listed)[0]
    assert all(torch.equal(value, whole[name]) for name, value in from_list.weights().items())
    cat_alone, _, text = run(nodes, model, clip, recipe, revision="1")
    assert "recipe safe@1" in text
    half = run(nodes, model, clip, recipe, strength=0.5)[0].weights()
    base = model.weights()
    changed = [name for name in base if not torch.equal(whole[name], base[name])]
    assert changed
    for name in changed:
        assert torch.allclose(half[name] - base[name], (whole[name] - base[name]) / 2, atol=1e-6)
        assert not torch.equal(cat_alone.weights()[name], whole[name])
    assert run(nodes, model, clip, recipe, strength=0.0)[0] is model
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(OverpaintError, match="cannot be read as a safetensors file"):
        run(nodes, model, clip, recipe, recipe=str(tmp_path / "other.safetensors"))
    with pytest.raises(OverpaintError, match="no recipe"):
        run(nodes, model, clip, recipe, recipe="sefe")


def test_a_takedown_reaches_the_next_prompt(nodes: Any, recipe_on: Callable[[str], Recipe]) -> None:
    recipe = recipe_on("stable-diffusion").copy("watched")
    node = nodes.NODE_CLASS_MAPPINGS["ApplyOverpaintRecipe"]
    inputs = {"registry": str(recipe._opened.registry.folder), "recipe": "watched", "revision": ""}
    before = node.IS_CHANGED(**inputs, strength=1.0, other_base="refuse")
    assert before == node.IS_CHANGED(**inputs, strength=1.0, other_base="refuse")
    Workspace.open(inputs["registry"]).recipe("watched").remove("dog")
    assert before != node.IS_CHANGED(**inputs, strength=1.0, other_base="refuse")
    Workspace.open(inputs["registry"]).recipe("watched").remove("cat")
    model, clip, _ = in_comfyui(recipe.base)
    assert run(nodes, model, clip, recipe)[0] is model, "an empty recipe is the base"
