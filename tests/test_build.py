"""A built checkpoint: what diffusers loads is the composition, and nothing leaks."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from overpaint.bases.base import Base
from overpaint.errors import AlreadyExists, OverpaintError
from overpaint.patches import build as module
from overpaint.patches.build import build
from overpaint.patches.compose import Term, compose, composition_digest
from overpaint.patches.delta import TextMap


@pytest.fixture
def terms() -> list[Term]:
    return [Term("a", TextMap("text_encoder", torch.full((64, 1), 0.1), torch.full((64, 1), 0.2)))]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_plain_diffusers_loads_the_composition(base: Base, terms: list[Term], tmp_path: Path) -> None:
    built = build(base, terms, tmp_path / "safe", card="# card", record={"recipe": "r"})
    again = Base.open(built.folder)
    wanted = compose(base, terms)
    assert all(torch.equal(again.tensor(name), tensor) for name, tensor in wanted.items())
    assert again.fingerprint == built.digest == composition_digest(base, wanted)
    pipe: Any = StableDiffusionPipeline.from_pretrained(built.folder)
    name = base.readers()[0]
    module_name = name.removeprefix("unet/")
    assert torch.equal(dict(pipe.unet.named_parameters())[module_name].detach(), wanted[name].float())


def test_two_builds_have_identical_bytes(base: Base, terms: list[Term], tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(base, terms, tmp_path / name, card="# card")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_header_says_what_is_in_it(base: Base, terms: list[Term], tmp_path: Path) -> None:
    built = build(base, terms, tmp_path / "safe", record={"recipe": "monday"})
    with safe_open(built.folder / "unet/diffusion_pytorch_model.safetensors", framework="pt") as reader:
        assert "monday" in reader.metadata()["overpaint"]
        assert built.digest in reader.metadata()["overpaint"]


def test_second_copies_of_patched_weights_are_left_out(base_folder: Path, terms: list[Term], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(base_folder, source)
    twins = [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.bin",
        "unet/flax_model.msgpack",
        "whole-model.ckpt",
    ]
    for twin in twins:
        shutil.copyfile(base_folder / "unet/diffusion_pytorch_model.safetensors", source / twin)
    told: list[str] = []
    built = build(Base.open(source), terms, tmp_path / "safe", notice=told.append)
    assert sorted(built.left_out) == sorted(twins)
    assert len(told) == len(twins)
    assert not any((built.folder / twin).exists() for twin in twins)


def test_an_output_that_is_there_is_not_touched(base: Base, terms: list[Term], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("precious")
    with pytest.raises(AlreadyExists, match="already there"):
        build(base, terms, tmp_path / "mine")
    assert files(tmp_path / "mine") == {"file": b"precious"}


def test_a_full_disk_leaves_nothing_behind(
    base: Base, terms: list[Term], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_stream", full)
    with pytest.raises(OverpaintError, match="No space left"):
        build(base, terms, tmp_path / "safe")
    assert list(tmp_path.iterdir()) == []


def test_modes_follow_the_umask(base: Base, terms: list[Term], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        built = build(base, terms, tmp_path / "safe")
    finally:
        os.umask(before)
    assert built.folder.stat().st_mode & 0o777 == 0o750
    assert (built.folder / "unet/diffusion_pytorch_model.safetensors").stat().st_mode & 0o777 == 0o640


def test_building_nothing_gives_the_base(base: Base, tmp_path: Path) -> None:
    built = build(base, [], tmp_path / "same")
    assert Base.open(built.folder).fingerprint == base.fingerprint
