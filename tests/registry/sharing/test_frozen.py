"""What version 0.1 pushed and exported is taken as ever, and composes to the digests that 0.1 recorded."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from overpaint.registry.sharing.layout import OciLayout
from overpaint.registry.store import open_files
from overpaint.workspace.workspace import Workspace

FROZEN = Path(__file__).parent / "frozen"
"""Written by commit e19bbe3 for `frozen_base`, and signed: a pushed folder, packed, and an exported file."""
RECORDED = json.loads((FROZEN / "recorded.json").read_text())
SHAPES = {
    "unet/diffusion_pytorch_model": {
        "down.attn2.to_k.weight": (6, 8),
        "down.attn2.to_v.weight": (6, 8),
        "up.attn2.to_k.weight": (5, 8),
        "up.attn2.to_v.weight": (5, 8),
        "conv.weight": (4, 3, 3, 3),
        "conv.bias": (4,),
    },
    "text_encoder/model": {"text_model.fc.weight": (3, 8), "text_model.fc.bias": (3,)},
    "vae/diffusion_pytorch_model": {"weight": (2, 2), "bias": (2,)},
}


def frozen_base(folder: Path) -> Path:
    """A base whose weights are counted, not drawn, so that it is the same everywhere and for ever."""
    count = 0
    for file, tensors in SHAPES.items():
        (folder / file).parent.mkdir(parents=True)
        values = {}
        for name, shape in tensors.items():
            size = math.prod(shape)
            numbers = torch.arange(count, count + size) * 7919 % 2003 - 1001
            values[name], count = (numbers / 1000).reshape(shape).half(), count + size
        safetensors.torch.save_file(values, folder / f"{file}.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace.open(tmp_path / "registry")
    workspace.add_base("small", frozen_base(tmp_path / "base"))
    assert workspace.base("small").fingerprint == RECORDED["base"]
    return workspace


def unpacked(folder: Path) -> Path:
    with tarfile.open(FROZEN / "pushed.tar.gz") as archive:
        for member in archive.getmembers():
            target = folder / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            file = archive.extractfile(member)
            assert file is not None
            target.write_bytes(file.read())
    return folder


def from_folder(workspace: Workspace, tmp_path: Path) -> object:
    return workspace.pull(unpacked(tmp_path / "place"), trust=[FROZEN / "alice.pub"])


def from_file(workspace: Workspace, tmp_path: Path) -> object:
    return workspace.import_file(FROZEN / "exported.overpaint", trust=[FROZEN / "alice.pub"])


@pytest.mark.parametrize("take", [from_folder, from_file])
def test_what_0_1_shared_is_whole_and_composes_to_the_recorded_digests(
    workspace: Workspace, tmp_path: Path, take: Callable[[Workspace, Path], object]
) -> None:
    take(workspace, tmp_path)
    assert {each.concept: each.id for each in workspace.patches()} == RECORDED["patches"]
    assert workspace.verify().problems == ()
    for revision, digest in enumerate(RECORDED["digests"], 1):
        assert workspace.recipe(f"safe@{revision}").digest() == digest
    assert workspace.recipe("safe@final").digest() == RECORDED["digests"][-1]
    assert workspace.recipe("safe@0").digest() == RECORDED["base"]


def test_a_place_of_0_1_takes_what_is_pushed_today(workspace: Workspace, tmp_path: Path) -> None:
    from_file(workspace, tmp_path)
    place = unpacked(tmp_path / "place")
    before = {each.digest for each in OciLayout(open_files(place)).entries()}
    sent = workspace.push(place)
    assert (sent.written, set(sent.patches)) == (0, set(RECORDED["patches"].values()))
    assert {each.digest for each in OciLayout(open_files(place)).entries()} == before
