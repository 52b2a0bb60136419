"""Tiny random models of every architecture, and patches that lie on everything a format has a place for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.patches.compose import Term
from overpaint.patches.delta import Dense, LowRank, TextMap
from tests.bases.containers import MAKERS

ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def model_folder(architecture: str, folder: Path, dtype: torch.dtype) -> Path:
    """A tiny random model as a diffusers folder."""
    MAKERS[architecture]().to(dtype=dtype).save_pretrained(folder)
    return folder


def noise(shape: Iterable[int], seed: int, size: float = 0.05) -> Tensor:
    """Random values."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * size


def text_maps(base: Base, directions: int = 3, seed: int = 0) -> list[TextMap]:
    """A text map for every text input of a base."""
    found = []
    for number, text_input in enumerate(base.text_inputs):
        columns = base.columns(text_input, base.projections(text_input)[0])
        shape = (columns.stop - columns.start, directions)
        found.append(
            TextMap(text_input, noise(shape, seed + 2 * number, 0.2), noise(shape, seed + 2 * number + 1, 0.2))
        )
    return found


def layers(base: Base) -> list[str]:
    """The weights that a LoRA may change: linear layers and convolutions of the U-Net and the text encoders."""
    return [
        name
        for name in base.names
        if name.endswith(".weight")
        and len(base.places[name].shape) > 1
        and (name.startswith("unet/") or name.split(".")[-2] in ENCODER_LAYERS)
        and not name.startswith("vae/")
    ]


def low_rank(base: Base, names: Iterable[str], directions: int = 2, seed: int = 50) -> LowRank:
    """Thin factors on some weights."""
    factors = {}
    for number, name in enumerate(names):
        out, *rest = base.places[name].shape
        up, down = (
            noise((out, directions), seed + 2 * number),
            noise((directions, math.prod(rest)), seed + 2 * number + 1),
        )
        factors[name] = up, down
    return LowRank(factors)


def dense(base: Base, names: Iterable[str], seed: int = 90) -> Dense:
    """Full differences on some tensors."""
    return Dense({name: noise(base.places[name].shape, seed + i, 0.01) for i, name in enumerate(names)})


def some_terms(base: Base) -> list[Term]:
    """Three patches: text maps of every text input; thin factors of layers of U-Net and text encoders; and both again."""
    every = [name for name in layers(base) if name.startswith("unet/") or ".layers.0." in name or ".layers.1." in name]
    first, *others = text_maps(base)
    whole = sum((text_map for text_map in others), start=first)
    return [
        Term("aa", whole, 1.0),
        Term("bb", low_rank(base, every), 0.5),
        Term("cc", low_rank(base, every[::3], 1, seed=700), -1.25),
    ]
