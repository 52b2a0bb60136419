"""Denoisers that read a picture beside the noise: told by their shapes, in whatever container, and used like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import overpaint
from overpaint.bases.base import Base, Unchangeable
from overpaint.bases.layout import UnknownLayout
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.images import Sampler, generate
from overpaint.patches.build import build
from overpaint.patches.compose import Term
from overpaint.patches.live import Overlay
from tests.bases.containers import MAKERS, converted
from tests.bases.test_converting import a_change

CLASSES = {
    ("1.x", 8): "StableDiffusionInstructPix2PixPipeline",
    ("1.x", 9): "StableDiffusionInpaintPipeline",
    ("2.x", 9): "StableDiffusionInpaintPipeline",
    ("XL", 8): "StableDiffusionXLInstructPix2PixPipeline",
    ("XL", 9): "StableDiffusionXLInpaintPipeline",
}


def with_channels(architecture: str, channels: int, folder: Path, kind: str = "") -> Path:
    """A tiny random model whose U-Net reads so many channels; its index names `kind`, or the class of plain models."""
    pipe: Any = MAKERS[architecture]()
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": channels})
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    if kind:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    return folder


@pytest.mark.parametrize(("architecture", "channels"), CLASSES)
def test_a_picture_that_is_edited_is_asked_for_in_every_container(
    tmp_path: Path, architecture: str, channels: int
) -> None:
    """Drawing with a blank one; what is built in either form is of the same class, and loads with diffusers alone."""
    kind = CLASSES[architecture, channels]
    folder = with_channels(architecture, channels, tmp_path / "one", kind)
    one = converted(folder, "single file", tmp_path / "one")
    bases = [Base.open(folder), Base.open(one)]
    assert bases[0].fingerprint == bases[1].fingerprint
    for base in bases:
        assert base.pipeline_class == kind
        pipe = base.pipeline()
        assert type(pipe).__name__ == kind
        term = a_change(base)
        with Overlay(pipe, base).applied([term]):
            pictures = generate(pipe, ["a cat", "a dog"], [0, 1], Sampler(steps=1))
        assert len(pictures) == 2
    built = build(bases[1], [term], tmp_path / "folder", form="diffusers")
    back = build(Base.open(built.path), list[Term](), tmp_path / "back.safetensors", form="single-file")
    assert type(DiffusionPipeline.from_pretrained(built.path)).__name__ == kind
    assert Base.open(back.path).fingerprint == built.digest


def test_a_pipeline_takes_the_picture_it_is_given(tmp_path: Path) -> None:
    base = Base.open(with_channels("1.x", 9, tmp_path / "one"))
    picture, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    pipe: Any = base.pipeline()
    assert len(pipe("a cat", image=picture, mask_image=mask, num_inference_steps=1).images) == 1


def test_an_index_that_calls_it_plain_is_mended_in_what_is_built(tmp_path: Path) -> None:
    base = Base.open(with_channels("1.x", 9, tmp_path / "one"))
    assert base.index["_class_name"] == "StableDiffusionPipeline"
    built = build(base, [], tmp_path / "built")
    assert type(DiffusionPipeline.from_pretrained(built.path)).__name__ == CLASSES["1.x", 9]


@pytest.mark.parametrize("container", ["folder", "shards", "single file", "pickle"])
def test_other_channels_get_one_answer_in_every_container(
    base_folder: Path, tmp_path: Path, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that read a depth map have five."""
    folder = shutil.copytree(base_folder, tmp_path / "one")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, [0, 1, 2, 3, 0]].contiguous()
    save_file(tensors, file)
    with monkeypatch.context() as patch:
        patch.setattr(Base, "pipeline_class", "any, so that the containers can be made")
        path = converted(folder, container, tmp_path / "two")
    with pytest.raises(UnknownLayout, match=r"unet/conv_in\.weight .* reads 5 channels; known are: 4 .* 8 .* 9 "):
        Base.open(path)


def test_a_configuration_of_other_channels_is_named(tmp_path: Path) -> None:
    one = converted(with_channels("1.x", 9, tmp_path / "nine"), "single file", tmp_path / "one")
    with_channels("1.x", 4, tmp_path / "one")
    with pytest.raises(UnknownLayout, match=r"one is no configuration of one\.safetensors.*of 9 input channels"):
        Base.open(one).pipeline()


def test_a_concept_is_erased_from_an_inpainting_model_and_restored(tmp_path: Path) -> None:
    workspace = overpaint.open(tmp_path / "registry")
    workspace.add_base("inpaint", with_channels("1.x", 9, tmp_path / "one"))
    workspace.solve("cat", base="inpaint", vocabulary=5)
    recipe = workspace.create_recipe("safe", base="inpaint")
    recipe.add("cat")
    assert recipe.build(tmp_path / "built").digest != workspace.base("inpaint").fingerprint
    recipe.remove("cat")
    assert recipe.build(tmp_path / "restored").digest == workspace.base("inpaint").fingerprint
    with pytest.raises(OverpaintError, match=r"this base also reads a picture .StableDiffusionInpaintPipeline"):
        workspace.solve("cat", base="inpaint", solver="esd", steps=1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_a_quantised_base_is_refused_before_anything_is_solved_for_it(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = with_channels("1.x", 4, tmp_path / "one")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
    shutil.copytree(folder, tmp_path / "two")
    workspace = overpaint.open(tmp_path / "registry")
    for source in (folder, converted(folder, "single file", tmp_path / "file")):
        with pytest.raises(Unchangeable, match=r"too coarse for the change of a patch; use the float16 or bfloat16"):
            workspace.add_base("small", source)
    assert workspace.bases() == []


def test_codes_that_are_stored_as_numbers_are_known_by_what_is_beside_them(tmp_path: Path) -> None:
    """As bitsandbytes stores four bits where it is told to keep them as bfloat16."""
    folder = with_channels("1.x", 4, tmp_path / "one")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    layer = next(key for key in weights if key.endswith("attn2.to_k.weight"))
    packed = torch.zeros(weights[layer].numel() // 4, 1, dtype=torch.bfloat16)
    save_file(
        {**weights, layer: packed, f"{layer}.quant_map": torch.zeros(16), f"{layer}.absmax": torch.zeros(4)}, file
    )
    with pytest.raises(Unchangeable, match=r"attn2\.to_k\.weight of the base at .* is four-bit codes, whose steps"):
        overpaint.open(tmp_path / "registry").add_base("small", folder)
