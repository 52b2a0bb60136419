"""Nothing leaks: a built checkpoint has no second copy of a weight that a patch changed, under whatever name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.safetensors_file import SafetensorsFile
from overpaint.patches.build import Built, build
from overpaint.patches.compose import Term
from overpaint.patches.delta import LowRank, TextMap
from tests.checkpoints import averages, extras, rename_weights, shard, single_file

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def terms() -> list[Term]:
    """A change to the U-Net alone."""
    return [Term("a", TextMap("text_encoder", torch.full((64, 1), 0.1), torch.full((64, 1), 0.2)))]


@pytest.fixture
def source(base_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base_folder, tmp_path / "source")


def contains(path: Path, needle: bytes) -> bool:
    return any(needle in file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file())


def old_values(base: Base, terms: list[Term]) -> list[bytes]:
    """The bytes of the weights that the terms change, as the base has them."""
    names = [name for term in terms for name in term.delta.targets(base)]
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in base.tensors(names).values()]


def test_what_a_patch_changed_is_in_no_file_any_more(
    base: Base, source: Path, terms: list[Term], tmp_path: Path
) -> None:
    """The plainest form of the law, checked byte by byte over everything that was built."""
    opened = Base.open(source)
    one = single_file(base, tmp_path / "one.safetensors", {**extras(base), **averages(base)})
    for made in (build(opened, terms, tmp_path / "folder"), build(one, terms, tmp_path / "file.safetensors")):
        for value in old_values(base, terms):
            assert contains(source, value)
            assert not contains(made.path, value)


@pytest.mark.parametrize(
    "twin",
    [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.bin",
        "unet/diffusion_flax_model.msgpack",
        "unet/model.onnx",
        "unet/tf_model.h5",
        "unet/old/backup.weights",
        "whole-model.ckpt",
        "onnx/unet/weights.pb",
    ],
)
def test_a_second_copy_is_left_out_with_notice(source: Path, terms: list[Term], tmp_path: Path, twin: str) -> None:
    (source / twin).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / UNET, source / twin)
    reports: list[str] = []
    built = build(Base.open(source), terms, tmp_path / "safe", notice=reports.append)
    assert built.left_out == (twin,)
    assert [twin in text for text in reports] == [True]
    assert not (built.path / twin).exists()


def test_a_twin_is_left_out_whichever_of_the_two_is_in_use(source: Path, terms: list[Term], tmp_path: Path) -> None:
    """Where plain files are missing, the variant is the base; the pickle beside it is the copy."""
    rename_weights(source, "fp16")
    (source / "unet/diffusion_pytorch_model.bin").write_bytes(b"PK\0")
    built = build(Base.open(source), terms, tmp_path / "safe")
    assert built.left_out == ("unet/diffusion_pytorch_model.bin",)
    assert (built.path / "unet/diffusion_pytorch_model.fp16.safetensors").exists()


def test_shards_of_a_twin_go_with_their_index(source: Path, terms: list[Term], tmp_path: Path) -> None:
    shutil.copyfile(source / UNET, source / "unet/diffusion_pytorch_model.fp16.safetensors")
    shard(source, "unet", 2, ".fp16")
    built = build(Base.open(source), terms, tmp_path / "safe")
    assert sorted(path.name for path in (built.path / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert len(built.left_out) == 3


def test_the_index_in_use_stays(source: Path, terms: list[Term], tmp_path: Path) -> None:
    shard(source, "unet", 2)
    built = build(Base.open(source), terms, tmp_path / "safe")
    assert built.left_out == ()
    assert (built.path / "unet/diffusion_pytorch_model.safetensors.index.json").exists()


def test_components_that_no_patch_changes_keep_all_their_files(source: Path, terms: list[Term], tmp_path: Path) -> None:
    kept = [
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.bin",
    ]
    (source / "safety_checker").mkdir()
    for name in kept:
        shutil.copyfile(source / "vae/diffusion_pytorch_model.safetensors", source / name)
    built = build(Base.open(source), terms, tmp_path / "safe")
    assert built.left_out == ()
    for name in kept:
        assert (built.path / name).read_bytes() == (source / name).read_bytes()


def test_a_strange_file_is_known_by_its_values(base: Base, source: Path, terms: list[Term], tmp_path: Path) -> None:
    """A whole checkpoint at the top of a folder holds the U-Net under other names; a small adapter does not."""
    single_file(base, source / "v1-pruned.safetensors")
    rounded = {f"some.{i}": tensor.to(torch.bfloat16) for i, tensor in enumerate(load_file(source / UNET).values())}
    (source / "backup").mkdir()
    save_file(rounded, source / "backup/weights.safetensors")
    save_file({"lora.down": torch.randn(4, 64), "lora.up": torch.randn(8, 64)}, source / "adapter.safetensors")
    (source / "cut.safetensors").write_bytes(b"\1" * 100)
    built = build(Base.open(source), terms, tmp_path / "safe")
    assert set(built.left_out) == {"v1-pruned.safetensors", "backup/weights.safetensors", "cut.safetensors"}
    assert (built.path / "adapter.safetensors").exists()


def test_texts_and_pictures_stay_and_hidden_folders_do_not(source: Path, terms: list[Term], tmp_path: Path) -> None:
    for name, content in {
        "LICENSE": b"MIT",
        "unet/notes.md": b"hello",
        "grid.png": b"\x89PNG\0",
        "paper.pdf": b"%PDF-1.7\0",
        "tokenizer/spiece.model": b"\0\1",
        ".cache/blob": b"\0",
        "unet/.ipynb_checkpoints/model": b"text",
    }.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    built = build(Base.open(source), terms, tmp_path / "safe")
    assert built.left_out == ()
    assert all(
        (built.path / name).exists() for name in ("LICENSE", "unet/notes.md", "grid.png", "tokenizer/spiece.model")
    )
    assert not any(part.startswith(".") for path in built.path.rglob("*") for part in path.parts[-1:])


def rebuilt(base: Base, terms: list[Term], tmp_path: Path, extra: dict[str, Tensor]) -> tuple[Built, list[str]]:
    reports: list[str] = []
    one = single_file(base, tmp_path / "one.safetensors", {**extras(base), **extra})
    return build(one, terms, tmp_path / "safe.safetensors", notice=reports.append), reports


def test_moving_averages_in_a_single_file_are_left_out(base: Base, terms: list[Term], tmp_path: Path) -> None:
    extra = {**averages(base), "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    built, reports = rebuilt(base, terms, tmp_path, extra)
    again = SafetensorsFile.open(built.path)
    assert set(built.left_out) == set(extra)
    assert not any(key.startswith("model_ema.") for key in again.entries)
    assert set(extras(base)) <= set(again.entries)
    assert len(reports) == 1
    assert f"{len(extra)} tensors" in reports[0]
    assert Base.open(built.path).fingerprint == built.digest


def test_moving_averages_stay_when_only_the_text_encoder_changes(base: Base, tmp_path: Path) -> None:
    name = "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight"
    out, width = base.tensor(name).shape
    change = Term("a", LowRank({name: (torch.ones(out, 1), torch.ones(1, width))}))
    built, reports = rebuilt(base, [change], tmp_path, averages(base))
    assert (built.left_out, reports) == ((), [])
    assert set(averages(base)) <= set(SafetensorsFile.open(built.path).entries)


@pytest.mark.parametrize("change", ["same", "rounded", "averaged", "convolution"])
def test_a_copy_under_a_name_nobody_knows_is_left_out(
    base: Base, terms: list[Term], tmp_path: Path, change: str
) -> None:
    weight = base.tensor(base.projections()[0])
    copy = {
        "same": weight,
        "rounded": weight.to(torch.bfloat16),
        "averaged": weight + 0.05 * weight.std() * torch.randn_like(weight),
        "convolution": weight[:, :, None, None],
    }[change]
    built, reports = rebuilt(
        base, terms, tmp_path, {"teacher.k": copy.contiguous(), "stranger": torch.randn_like(weight)}
    )
    assert built.left_out == ("teacher.k",)
    assert base.projections()[0] in reports[0]
    assert "stranger" in SafetensorsFile.open(built.path).entries


@pytest.mark.parametrize("name", ["unet/x.pdf", "unet/x.model", "x.png", "unet/tokenizer.model"])
def test_weights_renamed_to_something_harmless_are_left_out(
    source: Path, terms: list[Term], tmp_path: Path, name: str
) -> None:
    shutil.copyfile(source / UNET, source / name)
    assert build(Base.open(source), terms, tmp_path / "safe").left_out == (name,)


@pytest.mark.parametrize("changed", [True, False])
def test_what_is_no_part_of_a_base_is_left_out(source: Path, terms: list[Term], tmp_path: Path, changed: bool) -> None:
    """A pipe, which would never end, a link to a file elsewhere, and a secret beside the weights."""
    (tmp_path / "private.txt").write_text("private")
    (source / "notes.txt").symlink_to(tmp_path / "private.txt")
    (source / "unet/secret.env").write_text("TOKEN=1")
    os.mkfifo(source / "pipe.txt")
    reports: list[str] = []
    built = build(Base.open(source), terms if changed else [], tmp_path / "safe", notice=reports.append)
    assert set(built.left_out) == {"notes.txt", "unet/secret.env", "pipe.txt"}
    assert len(reports) == 3
    assert not any(built.path.joinpath(name).exists() for name in built.left_out)


@pytest.mark.parametrize("changed", [True, False])
def test_links_to_what_a_pipeline_is_loaded_from_are_built_as_files(
    source: Path, terms: list[Term], tmp_path: Path, changed: bool
) -> None:
    """Somebody keeps configurations, a tokenizer and the weights in one place for several bases."""
    shared = tmp_path / "shared"
    for name in ("model_index.json", "vae/config.json", "tokenizer/tokenizer.json", "scheduler", UNET):
        (shared / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(shared / name)
        (source / name).symlink_to(shared / name)
    built = build(Base.open(source), terms if changed else [], tmp_path / "safe")
    assert built.left_out == ()
    assert {p.relative_to(source) for p in source.rglob("*")} | {Path("scheduler/scheduler_config.json")} == {
        p.relative_to(built.path) for p in built.path.rglob("*")
    }
    assert not any(path.is_symlink() for path in built.path.rglob("*"))


def test_a_link_to_a_folder_that_is_no_component_is_not_followed(source: Path, tmp_path: Path) -> None:
    """It may lead to a whole disk."""
    (tmp_path / "home/letters").mkdir(parents=True)
    (tmp_path / "home/letters/private.txt").write_text("private")
    (source / "home").symlink_to(tmp_path / "home")
    (source / "unet/home").symlink_to(tmp_path / "home")
    (source / "again").symlink_to(source / "tokenizer")
    (source / "unet/circle").symlink_to(source / "unet")
    built = build(Base.open(source), [], tmp_path / "safe")
    assert set(built.left_out) == {"home", "unet/home"}
    assert (built.path / "again/tokenizer.json").read_bytes() == (built.path / "tokenizer/tokenizer.json").read_bytes()
    assert not any("private" in path.name for path in built.path.rglob("*"))


def test_without_a_change_nothing_is_left_out(base: Base, source: Path, tmp_path: Path) -> None:
    shutil.copyfile(source / UNET, source / "unet/diffusion_pytorch_model.fp16.safetensors")
    (source / "model.ckpt").write_bytes(b"\0")
    (source / "unet/x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b"}}))
    assert build(Base.open(source), [], tmp_path / "same").left_out == ()
    assert rebuilt(base, [], tmp_path, averages(base))[0].left_out == ()
