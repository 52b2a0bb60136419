"""Which files are a model's weights: a folder, an index or one file gives all; a part is never taken for the whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from overpaint.bases.base import Base
from overpaint.bases.checkpoint import BrokenBase, LoneShard, weight_files
from overpaint.patches.inspect import inspect
from tests.checkpoints import rename_weights, shard

STEM = "diffusion_pytorch_model"


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base_folder, tmp_path / "base")


def test_a_folder_an_index_and_a_file_name_the_same_weights(folder: Path) -> None:
    unet = folder / "unet"
    whole = unet / f"{STEM}.safetensors"
    assert weight_files(unet, STEM) == weight_files(whole, STEM) == ("", [whole])
    shards = shard(folder, "unet", 3)
    assert weight_files(unet, STEM) == weight_files(unet / f"{STEM}.safetensors.index.json", STEM) == ("", shards)


def test_a_variant_is_read_where_there_is_nothing_else(folder: Path) -> None:
    rename_weights(folder, "fp16", ["unet"])
    unet = folder / "unet"
    assert weight_files(unet, STEM) == ("fp16", [unet / f"{STEM}.fp16.safetensors"])
    shards = shard(folder, "unet", 2, ".fp16")
    index = unet / f"{STEM}.safetensors.index.fp16.json"
    assert weight_files(unet, STEM) == weight_files(index, STEM) == ("fp16", shards)


def test_the_variant_that_all_components_have_is_read(folder: Path, tmp_path: Path) -> None:
    """As diffusers loads them: one variant for the pipeline, plain weights where a component has no other."""
    plain = shutil.copytree(folder / "unet", tmp_path / "plain")
    rename_weights(folder, "fp16", ["unet", "text_encoder", "vae"])
    shutil.copytree(plain, folder / "unet", dirs_exist_ok=True)
    weights = load_file(folder / f"unet/{STEM}.fp16.safetensors")
    save_file({key: value * 2 for key, value in weights.items()}, folder / f"unet/{STEM}.fp16.safetensors")
    base = Base.open(folder)
    assert base.variant == "fp16"
    name = next(name for name in base.names if name.startswith("unet/conv_in"))
    assert torch.equal(base.tensor(name), weights[name.removeprefix("unet/")] * 2)
    assert torch.equal(base.pipeline().unet.state_dict()[name.removeprefix("unet/")], base.tensor(name).float())


@pytest.mark.parametrize("name", [None, "renamed.safetensors"])
def test_one_shard_alone_is_refused(folder: Path, name: str | None) -> None:
    """By its name, or because the index beside it lists it under another."""
    first = shard(folder, "unet", 2)[0]
    if name:
        index = folder / f"unet/{STEM}.safetensors.index.json"
        index.write_text(index.read_text().replace(first.name, name))
        first = first.rename(first.with_name(name))
    with pytest.raises(LoneShard, match=r"one of 2 shards.*name its folder"):
        weight_files(first, STEM)
    with pytest.raises(LoneShard, match="one of 2 shards"):
        Base.open(first)


def test_one_shard_may_be_inspected(folder: Path) -> None:
    assert inspect(shard(folder, "unet", 2)[0]).what == "safetensors file"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}', "[" * 100_000])
def test_a_damaged_index_is_one_sentence(folder: Path, text: str) -> None:
    shard(folder, "unet", 2)
    index = folder / f"unet/{STEM}.safetensors.index.json"
    index.write_text(text)
    for source in (index, folder / "unet"):
        with pytest.raises(BrokenBase, match="is not an index of shards"):
            weight_files(source, STEM)


def test_another_json_file_is_no_index(folder: Path) -> None:
    with pytest.raises(BrokenBase, match="is no index of shards"):
        weight_files(folder / "unet/config.json", STEM)
