"""A model saved alone is imported whole: from one file, from shards, in a variant; a part is never taken for the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from overpaint.bases.base import Base
from overpaint.core.errors import OverpaintError
from overpaint.patches.compose import Term, compose
from overpaint.patches.formats.importing import import_weights

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def edited(base: Base) -> Any:
    """The base's U-Net with every key projection changed."""
    unet: Any = UNet2DConditionModel.from_pretrained(base.path, subfolder="unet")
    with torch.no_grad():
        for module in unet.modules():
            if hasattr(module, "to_k"):
                module.to_k.weight.add_(0.05)
    return unet


@pytest.mark.parametrize("named", ["", INDEX])
def test_shards_are_imported_as_the_one_file_is(base: Base, tmp_path: Path, edited: Any, named: str) -> None:
    edited.save_pretrained(tmp_path / "whole")
    edited.save_pretrained(tmp_path / "sharded", max_shard_size="150KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, sharded = (
        dict(compose(base, [Term("", import_weights(base, path).delta)]))
        for path in (tmp_path / "whole", tmp_path / "sharded" / named)
    )
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_one_shard_is_refused(base: Base, tmp_path: Path, edited: Any) -> None:
    edited.save_pretrained(tmp_path, max_shard_size="150KB")
    first = min(tmp_path.glob("*-00001-*"))
    with pytest.raises(OverpaintError, match="folder"):
        import_weights(base, first)


@pytest.mark.parametrize("named", ["", "diffusion_pytorch_model.fp16.safetensors"])
def test_a_variant_is_imported(base: Base, tmp_path: Path, edited: Any, named: str) -> None:
    edited.half().save_pretrained(tmp_path / "unet", variant="fp16")
    changed = import_weights(base, tmp_path / "unet" / named).changed
    assert {name.rsplit(".", 2)[-2] for name in changed} == {"to_k"}


def test_a_missing_shard_is_said(base: Base, tmp_path: Path, edited: Any) -> None:
    edited.save_pretrained(tmp_path, max_shard_size="150KB")
    max(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(OverpaintError, match=r"diffusion_pytorch_model-\d+-of-\d+"):
        import_weights(base, tmp_path)
