"""A pipeline draws, and what is built of it loads, whatever optional components its folder lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.errors import OverpaintError
from overpaint.patches.build import build
from overpaint.patches.compose import Term
from overpaint.patches.inspect import inspect
from tests.bases.test_converting import a_change

OPTIONAL: dict[str, list[Any]] = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
}


def configurations_alone(folder: Path) -> None:
    """As of a base from the Hub, of which the weights of optional components are not downloaded."""
    for name in ("safety_checker", "image_encoder"):
        CLIPConfig().save_pretrained(folder / name)
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")


def pointers(folder: Path) -> None:
    """As after a clone without Git LFS."""
    configurations_alone(folder)
    for name in ("safety_checker/model.safetensors", "image_encoder/pytorch_model.bin"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")


def damaged(folder: Path) -> None:
    configurations_alone(folder)
    (folder / "safety_checker/model.safetensors").write_bytes(b"\0" * 100)
    (folder / "image_encoder/model.safetensors").touch()
    (folder / "feature_extractor/preprocessor_config.json").write_text('{"crop_size": ')


LACKING: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "their weights": (configurations_alone, ["image_encoder", "safety_checker"]),
    "their folders": (lambda folder: None, sorted(OPTIONAL)),
    "all but pointers": (pointers, ["image_encoder", "safety_checker"]),
    "whole files": (damaged, sorted(OPTIONAL)),
}


@pytest.fixture(params=LACKING)
def lacking(request: pytest.FixtureRequest, base_folder: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder whose index names all optional components, and those that are not there."""
    folder = shutil.copytree(base_folder, tmp_path / "lacking")
    index = json.loads((folder / "model_index.json").read_text())
    index.update(OPTIONAL, requires_safety_checker=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    make, absent = LACKING[request.param]
    make(folder)
    return folder, absent


def test_it_draws(lacking: tuple[Path, list[str]]) -> None:
    base = Base.open(lacking[0])
    assert base.absent_components == lacking[1]
    pipe = base.pipeline()
    assert pipe.safety_checker is None
    assert (pipe.feature_extractor is None) == ("feature_extractor" in lacking[1])
    assert len(pipe("a cat", num_inference_steps=1, output_type="np").images) == 1


def test_a_build_loads_with_diffusers_alone(lacking: tuple[Path, list[str]], tmp_path: Path) -> None:
    """A folder of a folder, and a folder of the single file that was made of it."""
    folder, absent = lacking
    base, reports = Base.open(folder), list[str]()
    one = build(base, [], tmp_path / "one.safetensors", form="single-file").path
    shutil.copytree(folder, tmp_path / "one", ignore=shutil.ignore_patterns("*.safetensors"))
    for number, (source, terms) in enumerate([(base, [a_change(base)]), (base, list[Term]()), (Base.open(one), [])]):
        built = build(source, terms, tmp_path / str(number), form="diffusers", notice=reports.append)
        assert set(absent) <= set(built.left_out)
        assert not any((built.path / name).exists() for name in absent)
        pipe: Any = DiffusionPipeline.from_pretrained(built.path, dtype=torch.float32)
        assert pipe.safety_checker is None
        assert len(pipe("a cat", num_inference_steps=1, output_type="np").images) == 1
        assert inspect(built.path).problems == (() if terms else inspect(source.path).problems)
    assert all(any(name in text for text in reports) for name in absent)


def test_what_is_there_stays(base_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "whole")
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = OPTIONAL["feature_extractor"]
    text = json.dumps(index)
    (folder / "model_index.json").write_text(text)
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    built = build(Base.open(folder), [], tmp_path / "built")
    assert (built.path / "model_index.json").read_text() == text
    assert (built.path / "feature_extractor/preprocessor_config.json").is_file()
    assert built.left_out == ()


def test_a_weight_that_is_missing_is_named_and_not_drawn_at_random(base_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "broken")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_out.bias"]
    save_file(weights, file)
    with pytest.raises(BrokenBase, match=r"lacks unet/conv_out\.bias, of 1 weights"):
        Base.open(folder).pipeline()


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer/tokenizer.json", "scheduler", "unet/config.json"])
def test_what_is_needed_is_named(base_folder: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "broken")
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    base = Base.open(folder)
    with pytest.raises(BrokenBase, match=r"broken.*again"):
        base.pipeline()
    if "tokenizer" in name:
        with pytest.raises(BrokenBase, match="has no vocabulary"):
            TextEncoder.of(base)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer/tokenizer.json", '{"a":'),
        ("text_encoder/config.json", '{"a":'),
        ("text_encoder/config.json", '{"hidden_size": "x"}'),
        ("text_encoder/config.json", '{"hidden_size": 32, "num_attention_heads": 4}'),
    ],
)
def test_a_damaged_configuration_of_the_text_encoder_is_one_sentence(
    base_folder: Path, tmp_path: Path, name: str, text: str
) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "broken")
    (folder / name).write_text(text)
    for use in (TextEncoder.of, Base.pipeline):
        with pytest.raises(BrokenBase, match="get it") as caught:
            use(Base.open(folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["~nobody_at_all/x", "x" * 5000, "a\0b", "\ud800", "org/" + "x" * 3000])
def test_what_cannot_be_a_path_is_one_sentence(source: str, tmp_path: Path, base: Base) -> None:
    for use in (Base.open, inspect, lambda out: build(base, [], out)):
        with pytest.raises(OverpaintError) as caught:
            use(source)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{}", '{"_class_name": 3}', "[" * 9999, "\0", '{"_class_name": "Sta'])
def test_a_damaged_index_is_named(base_folder: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "broken")
    (folder / "model_index.json").write_text(text)
    with pytest.raises(OverpaintError, match="not a diffusers index"):
        Base.open(folder)
