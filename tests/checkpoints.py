"""Bases in other forms than a plain folder, made from one: a single file with all that such files carry, shards, variants."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.checkpoints import as_single_file, single_file_keys
from overpaint.bases.base import Base

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


def extras(base: Base) -> dict[str, Tensor]:
    """What a published single file holds beside the models: schedules and a buffer."""
    length = base.tensor("text_encoder/text_model.embeddings.position_embedding.weight").shape[0]
    return {
        "alphas_cumprod": torch.linspace(0.99, 0.01, 1000),
        "betas": torch.linspace(0.01, 0.99, 1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(length)[None],
    }


def averages(base: Base) -> dict[str, Tensor]:
    """The moving averages of the U-Net that some single files hold: nearly the same values under flattened names."""
    keys = single_file_keys(base.names)
    return {
        "model_ema." + "".join(keys[name].split(".")[1:]): base.tensor(name) * 1.001
        for name in base.names
        if name.startswith("unet/")
    }


def single_file(base: Base, file: Path, extra: Mapping[str, Tensor] | None = None) -> Base:
    """The same weights in one file, opened."""
    as_single_file(file, base.tensors(base.names), extras(base) if extra is None else extra)
    return Base.open(file)


def shard(folder: Path, component: str, count: int, variant: str = "") -> list[Path]:
    """Split a component's weight file into shards with an index; returns the shards."""
    stem = WEIGHTS[component]
    whole = folder / component / f"{stem}{variant}.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    files, weight_map = [], {}
    for number in range(count):
        part = {key: tensors[key] for key in sorted(tensors)[number::count]}
        file = folder / component / f"{stem}{variant}-{number + 1:05}-of-{count:05}.safetensors"
        save_file(part, file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file.name))
        files.append(file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / component / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))
    return files


def rename_weights(folder: Path, variant: str, components: Iterable[str] = WEIGHTS) -> None:
    """Give weight files the name of a variant: `model.safetensors` becomes `model.fp16.safetensors`."""
    for component in components:
        stem = WEIGHTS[component.removesuffix("_2")]
        (folder / component / f"{stem}.safetensors").rename(folder / component / f"{stem}.{variant}.safetensors")
