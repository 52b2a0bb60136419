"""Bases of a few hundred weights, and pipelines of them, for laws that have to hold over thousands of changes."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.patches.compose import Term
from overpaint.patches.delta import DELTAS, WORDS, Delta, Dense, LowRank, Sum, TextMap, Xor

WIDTH = 8
KINDS = (*(delta.kind for delta in DELTAS), "sum")
STEMS = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}


class Attention(nn.Module):
    """Keys and values of the text; no queries, so that it is quick."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(WIDTH, size, bias=False)
        self.to_v = nn.Linear(WIDTH, size, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        read: Tensor = self.to_k(text) * self.to_v(text)
        return read.sum(-1)


class Block(nn.Module):
    """What gives attention its name in a U-Net."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.attn2 = Attention(size)

    def forward(self, text: Tensor) -> Tensor:
        found: Tensor = self.attn2(text)
        return found


class UNet(nn.Module):
    """Two attention blocks and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = Block(6), Block(5)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, text: Tensor) -> Tensor:
        found: Tensor = self.down(text) + self.up(text) + self.conv(text.new_ones(1, 3, 3, 3)).sum()
        return found


def small_pipeline(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """What an overlay needs of a pipeline: its models."""
    torch.manual_seed(seed)
    encoder = nn.ModuleDict({"text_model": nn.ModuleDict({"fc": nn.Linear(WIDTH, 3)})})
    return SimpleNamespace(unet=UNet().to(dtype), text_encoder=encoder.to(dtype), vae=nn.Linear(2, 2).to(dtype))


def small_base(folder: Path, dtype: torch.dtype, seed: int = 0) -> Base:
    """The base of `small_pipeline`, on disk."""
    pipe = small_pipeline(dtype, seed)
    for component, stem in STEMS.items():
        (folder / component).mkdir(parents=True)
        safetensors.torch.save_file(getattr(pipe, component).state_dict(), folder / component / f"{stem}.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return Base.open(folder)


def weights(pipe: Any) -> dict[str, Tensor]:
    """Copies of all weights of a pipeline by canonical name."""
    return {
        f"{component}/{name}": p.detach().clone()
        for component in STEMS
        for name, p in getattr(pipe, component).named_parameters()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, dtypes and values."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def some_delta(
    base: Base, kind: str, seed: int, rank: int = 1, dtype: torch.dtype = torch.float32, names: list[str] | None = None
) -> Delta:
    """A random delta of a kind on some tensors of a small base (by default attention, convolution and text encoder)."""
    rng = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=rng) * 0.3).to(dtype)

    if kind == "text-map":
        return TextMap("text_encoder", values(WIDTH, rank), values(WIDTH, rank))
    if kind == "sum":
        parts = [some_delta(base, part, seed + i, rank, dtype, names) for i, part in enumerate(KINDS[:-1])]
        return Sum(tuple(parts))
    found = names or [n for n in base.names if not n.startswith("vae/")]
    shapes = {name: base.places[name].shape for name in found}
    if kind == "low-rank":
        matrices = {n: (s[0], torch.Size(s[1:]).numel()) for n, s in shapes.items() if len(s) > 1}
        return LowRank({n: (values(out, rank), values(rank, inner)) for n, (out, inner) in matrices.items()})
    if kind == "dense":
        return Dense({name: values(*shape) for name, shape in shapes.items()})
    assert kind == "xor", f"this function makes no delta of the kind {kind}"
    word = WORDS[base.tensor(found[0]).element_size()]
    # Low bits of the fraction, so that no value becomes infinite.
    return Xor(
        {
            name: (torch.arange(0, torch.Size(shape).numel(), 2, dtype=torch.int32), mask)
            for name, shape in shapes.items()
            if (mask := torch.randint(1, 8, ((torch.Size(shape).numel() + 1) // 2,), generator=rng, dtype=word)).numel()
        }
    )


def some_terms(base: Base, seed: int, count: int = 6, names: list[str] | None = None) -> list[Term]:
    """Deltas of every kind in turn, in every dtype, with ids out of order and strengths of both signs."""
    rng = random.Random(seed)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return [
        Term(
            f"{rng.randrange(16**8):08x}-{i}",
            some_delta(base, KINDS[i % len(KINDS)], seed + i, rng.randint(1, 3), rng.choice(dtypes), names),
            rng.choice((1.0, -1.0, 0.5, rng.uniform(-2, 2))),
        )
        for i in range(count)
    ]
