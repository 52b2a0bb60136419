"""Diffusion transformers and Kolors: diffusers loads what is written, tools' names are read, what none would load is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from overpaint.bases.base import Base
from overpaint.bases.layout import layouts
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import TextMap
from overpaint.patches.formats.dialects import READERS
from overpaint.patches.formats.exporting import About, NotExportable, export
from overpaint.patches.formats.importing import import_weights
from tests.bases.tiny_transformers import tiny_transformer
from tests.patches.formats.models import text_maps

FLUX = {"context": "context_embedder", "pooled": "time_text_embed.text_embedder.linear_1"}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The tiny base of a layout, saved once."""

    @cache
    def base(layout: str) -> Base:
        folder = tmp_path_factory.mktemp("bases") / layout
        tiny_transformer(layout).save_pretrained(folder)
        return Base.open(folder)

    return base


def terms(base: Base) -> list[Term]:
    first, *others = text_maps(base)
    return [Term("a", sum(others, start=first))] if others else [Term("a", first)]


@pytest.mark.parametrize("layout", ["flux", "stable-diffusion-3", "kolors"])
def test_diffusers_loads_and_fuses_a_patch_of_text_inputs(
    opened: Callable[[str], Base], tmp_path: Path, layout: str
) -> None:
    base = opened(layout)
    exported = export(base, terms(base), tmp_path / "x.safetensors", None, About("safe"), for_="diffusers")
    assert exported.format == "diffusers"
    assert exported.whole_for == list(base.layout.read_by)
    denoiser = "unet" if layout == "kolors" else "transformer"
    pipe: Any = base.pipeline()
    pipe.load_lora_weights(str(exported.path))
    pipe.fuse_lora(components=[denoiser])
    pipe.unload_lora_weights()
    composed = compose(base, terms(base))
    fused = getattr(pipe, denoiser).state_dict()
    assert sorted(composed) == base.projections()
    assert len(composed) == 2
    for name, value in composed.items():
        assert (fused[name.removeprefix(f"{denoiser}/")] - value).abs().max() < 2.4e-7
    again = compose(base, [Term("b", import_weights(base, exported.path).delta)])
    assert all((again[name] - composed[name]).abs().max() < 2.4e-7 for name in composed)


def test_what_no_tool_would_load_is_refused_by_its_name(opened: Callable[[str], Base], tmp_path: Path) -> None:
    base, file = opened("kolors"), tmp_path / "x.safetensors"
    for tool in ("kohya", "comfyui", "a1111"):
        with pytest.raises(NotExportable, match=r"loads? no LoRA that is written here for kolors; build a checkpoint"):
            export(base, terms(base), file, None, About("safe"), for_=tool)
    base = opened("flux")
    for format, tool, why in (
        ("kohya", None, "no reader of this format has a name for it"),
        ("kohya", "diffusers", "diffusers cannot load a kohya file of flux; export as diffusers"),
        (None, "a1111", "A1111 loads no LoRA that is written here for flux; build a checkpoint"),
        ("diffusers", "kohya", "kohya's scripts cannot load a diffusers file of flux; build a checkpoint"),
    ):
        with pytest.raises(NotExportable, match=why):
            export(base, terms(base), file, format, About("safe"), for_=tool)
    assert not file.exists()


def spelled(module: str) -> dict[str, str]:
    """FLUX's text inputs as tools begin their names."""
    native = {"context": "txt_in", "pooled": "vector_in.in_layer"}[module]
    diffusers_name = FLUX[module]
    return {
        "PEFT": f"transformer.{diffusers_name}",
        "OneTrainer": f"lora_transformer_{diffusers_name.replace('.', '_')}",
        "kohya": f"lora_unet_{native.replace('.', '_')}",
        "ComfyUI": f"diffusion_model.{native}",
    }


@pytest.mark.parametrize("tool", ["PEFT", "OneTrainer", "kohya", "ComfyUI"])
def test_every_tools_names_of_flux_are_read(opened: Callable[[str], Base], tmp_path: Path, tool: str) -> None:
    base, tensors = opened("flux"), {}
    down, up = ("lora_A", "lora_B") if tool == "PEFT" else ("lora_down", "lora_up")
    for module, name in FLUX.items():
        out, width = base.places[f"transformer/{name}.weight"].shape
        tensors[f"{spelled(module)[tool]}.{down}.weight"] = torch.ones(2, width)
        tensors[f"{spelled(module)[tool]}.{up}.weight"] = torch.ones(out, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    imported = import_weights(base, tmp_path / "x.safetensors")
    assert set(imported.changed) == {f"transformer/{name}.weight" for name in FLUX.values()}
    assert imported.proof.differing == 0


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_uces_edited_weights_of_flux_are_read(opened: Callable[[str], Base], tmp_path: Path, prefix: str) -> None:
    base = opened("flux")
    composed = compose(base, terms(base))
    save_file(
        {name.replace("transformer/", prefix): value for name, value in composed.items()}, tmp_path / "uce.safetensors"
    )
    imported = import_weights(base, tmp_path / "uce.safetensors")
    assert imported.edits.meaning == "weights"
    again = compose(base, [Term("b", imported.delta)])
    assert all(torch.equal(again[name], composed[name]) for name in composed)


def test_diffusers_has_a_loader_for_every_layout_that_it_is_said_to_load() -> None:
    for layout in layouts():
        can = any(hasattr(getattr(diffusers, each, None), "load_lora_weights") for each in layout.pipelines)
        if layout.is_caught:
            assert can == ("diffusers" in layout.read_by), layout.name
        assert set(layout.read_by) <= set(READERS)


def test_the_header_of_a_transformer_says_which_one(opened: Callable[[str], Base], tmp_path: Path) -> None:
    from safetensors import safe_open

    base = opened("flux")
    exported = export(base, terms(base), tmp_path / "x.safetensors", None, About("safe"))
    with safe_open(exported.path, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "flux-1-dev/lora"
        assert file.metadata()["ss_base_model_version"] == "flux1"
    assert all(key.startswith("transformer.") for key in load_file(exported.path))
    assert isinstance(terms(base)[0].delta.parts[0], TextMap)
