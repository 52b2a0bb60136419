"""The autoencoder: 64 x 64 pictures to 8 x 8 x 8 latents.

Loss: absolute and squared error on the pixels and on their horizontal and vertical differences (edges are what a
drawing is made of; this stands in for a perceptual loss), plus a small Kullback-Leibler term as in latent diffusion.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from overpaint.bases.emoji.training.loop import Run, sheet, train
from overpaint.bases.emoji.training.pictures import HELD_OUT_SEED, TRAINING_SEED, as_input, pool

KL_WEIGHT = 1e-5
LATENT_CHANNELS = 8
"""With four, colours inside a drawing came out wrong after equal training: 192 numbers to 4 is too much to ask."""


def architecture() -> AutoencoderKL:
    """One million parameters, down-factor 8."""
    channels = (16, 32, 64, 64)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute plus squared difference of pixels and of their neighbours' differences."""
    total = torch.zeros((), device=a.device)
    for left, right in ((a, b), (a.diff(dim=2), b.diff(dim=2)), (a.diff(dim=3), b.diff(dim=3))):
        total = total + (left - right).abs().mean() + (left - right).square().mean()
    return total


def run(spec: Run) -> None:
    """Train, measure the latents' spread, save to `out/vae`."""
    torch.manual_seed(spec.seed)
    vae: Any = architecture()
    vae.to(spec.device)
    pictures, _ = pool(spec.data, 6, TRAINING_SEED)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(pictures), (spec.batch,), generator=generator)
        x = as_input(pictures[chosen]).to(spec.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(spec.device)
        z = posterior.mean + posterior.std * noise
        loss: Tensor = distance(vae.decode(z).sample, x) + KL_WEIGHT * posterior.kl().mean()
        return loss

    train("vae", vae, loss_of, spec)
    held_out, _ = pool(spec.data, 1, HELD_OUT_SEED)
    shown = as_input(held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:256]])
    with torch.no_grad():
        latents = vae.encode(shown.to(spec.device)).latent_dist.mean
        back = vae.decode(latents).sample.cpu()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    print(f"vae held-out mean absolute error {((back - shown).abs().mean() * 127.5):.2f} of 255")
    sheet([p for pair in zip(shown[:48], back[:48], strict=True) for p in pair], 16, spec.work / "vae.png")
    vae.half().save_pretrained(spec.out / "vae", safe_serialization=True)
