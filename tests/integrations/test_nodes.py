"""The nodes for ComfyUI against the contract of its API: a model computes with the weights that a recipe composes."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import overpaint
from overpaint.bases.base import Base
from overpaint.core.errors import OverpaintError
from overpaint.patches.compose import compose
from overpaint.patches.formats.dialects import split
from overpaint.patches.formats.exporting import FORMATS, KEY
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
    assert f"weights as the registry recorded them: {recipe.digest()}" in text
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
    data = file.read_bytes()
    arrays = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert f"file safe.safetensors (sha256 {arrays}): cat 1, dog 0.5" in text
    assert "weights: of no recorded digest" in text, "of the weights that come of it the file says nothing"
    (tmp_path / "altered.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"altered.safetensors is not what its header says"):
        run(nodes, model, clip, recipe, recipe=str(tmp_path / "altered.safetensors"))
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


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        (None, "was not exported by Overpaint"),
        ("{", "does not say which patches"),
        ("null", "does not say which patches"),
        ("{}", "does not say which patches"),
        ('{"patches":"x"}', "does not say which patches"),
        ('{"patches":[{"concept":"cat","strength":"x"}]}', "does not say which patches"),
        ('{"patches":[{"concept":"cat","strength":NaN}]}', "does not say which patches"),
        ('{"patches":[{"concept":1,"strength":1},{"concept":"a","strength":1}]}', "keys have no place"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    nodes: Any, recipe_on: Callable[[str], Recipe], tmp_path: Path, about: str | None, sentence: str
) -> None:
    recipe = recipe_on("stable-diffusion")
    model, clip, _ = in_comfyui(recipe.base)
    file = tmp_path / "x.safetensors"
    save_file({"a.lora_up.weight": torch.zeros(1)}, file, metadata=None if about is None else {KEY: about})
    with pytest.raises(ValueError, match=sentence) as caught:
        run(nodes, model, clip, recipe, recipe=str(file))
    assert isinstance(caught.value, OverpaintError)


def test_a_file_of_which_comfyui_reads_a_part_only_is_refused(
    nodes: Any, recipe_on: Callable[[str], Recipe], tmp_path: Path
) -> None:
    recipe = recipe_on("stable-diffusion")
    model, clip, _ = in_comfyui(recipe.base)
    arrays = load_file(recipe.export(tmp_path / "safe.safetensors", for_="comfyui").path)
    lost = next(key for key in arrays if key.endswith(".lora_down.weight"))
    about = {KEY: '{"patches":[]}'}
    save_file({key: value for key, value in arrays.items() if key != lost}, tmp_path / "part.safetensors", about)
    with pytest.raises(ValueError, match="a part of the change of"):
        run(nodes, model, clip, recipe, recipe=str(tmp_path / "part.safetensors"))
    module = lost.removesuffix(".lora_down.weight")
    norm = {f"{module}.w_norm": arrays[lost].new_zeros(model.model.state_dict()[model.model.keys[module]].shape)}
    kept = {key: value for key, value in arrays.items() if not key.startswith(f"{module}.")}
    save_file({**kept, **norm}, tmp_path / "unread.safetensors", about)
    with pytest.raises(ValueError, match="does not understand the change of 1 weights"):
        run(nodes, model, clip, recipe, recipe=str(tmp_path / "unread.safetensors"))
    assert not model.patches


def test_what_is_not_there_stops_no_queue(nodes: Any, recipe_on: Callable[[str], Recipe], tmp_path: Path) -> None:
    recipe = recipe_on("stable-diffusion")
    model, clip, _ = in_comfyui(recipe.base)
    registry = str(recipe._opened.registry.folder)
    apply, patches = (nodes.NODE_CLASS_MAPPINGS[name] for name in ("ApplyOverpaintRecipe", "OverpaintPatches"))
    for missing in (str(tmp_path / "missing.safetensors"), "~nobody-of-that-name/x.safetensors", "nothing", ""):
        assert apply.IS_CHANGED(registry, missing, "")
        with pytest.raises(OverpaintError):
            run(nodes, model, clip, recipe, recipe=missing)
    assert "no patch" in patches.IS_CHANGED(registry, "nothing", "")
    with pytest.raises(OverpaintError, match="finite"):
        run(nodes, model, clip, recipe, strength=float("nan"))


def test_a_line_is_a_name_that_may_end_in_a_number_or_a_name_and_a_strength(
    nodes: Any, base_folder: Path, tmp_path: Path
) -> None:
    workspace = overpaint.open(tmp_path / "registry")
    workspace.add_base("tiny", base_folder)
    boeing = workspace.solve("boeing", solver="uce")

    def listed(lines: str) -> Any:
        return (
            nodes.NODE_CLASS_MAPPINGS["OverpaintPatches"]()
            .listed(str(workspace.registry.folder), lines, "")[0]
            .strengths
        )

    with pytest.raises(ValueError, match=r"'boeing 747' asks for 'boeing' at 747; no patch is for a concept"):
        listed("boeing 747")
    plane = workspace.solve("boeing 747", solver="uce")
    assert listed("boeing 747") == {plane.id: 1.0}
    assert listed("boeing\t0.5\n\n  boeing 747   -2e-1 ") == {boeing.id: 0.5, plane.id: -0.2}
    assert listed(f"{plane.id[:12]} 2") == {plane.id: 2.0}
    for twice in ("boeing 1\nboeing 0.5", f"boeing\n{boeing.id}"):
        with pytest.raises(ValueError, match=r"\(boeing\) is listed twice; keep one"):
            listed(twice)
    for unknown in ("boeing nan", "boeing inf", "boeing 1_0", "boeing 0x1", "boeing x", "x 1"):
        with pytest.raises(OverpaintError, match=r"no patch answers to|has no patch"):
            listed(unknown)
