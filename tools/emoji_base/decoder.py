"""Sharpen the autoencoder's decoder alone: latents, and what learned to draw them, stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tools.emoji_base import autoencoder
from tools.emoji_base.artwork import NARROW
from tools.emoji_base.loop import Place, Schedule, train
from tools.emoji_base.pictures import as_input, pool

NOISE = 0.1
"""Spread of the noise added to latents, as a share of theirs: a drawn latent is never quite an encoded one."""


def run(place: Place, schedule: Schedule) -> None:
    """Train the decoder on the latents of the pool that the bases learn from; save to `out/vae`."""
    torch.manual_seed(place.seed)
    vae: Any = autoencoder.load(place)
    pictures, _ = pool(place, autoencoder.VARIATIONS, placement=NARROW)
    latents = autoencoder.encoded(vae, pictures).to(place.device)
    spread = latents.std((0, 2, 3), keepdim=True)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(pictures), (schedule.batch,), generator=generator)
        noise = torch.randn((schedule.batch, *latents.shape[1:]), generator=generator).to(place.device)
        share = NOISE * torch.rand(schedule.batch, 1, 1, 1, generator=generator).to(place.device)
        found = vae.decode(latents[chosen] + share * spread * noise).sample
        return autoencoder.distance(found, as_input(pictures[chosen]).to(place.device))

    train("vae-decoder", vae, loss_of, place, schedule)
    print(f"held-out mean absolute error {autoencoder.held_out_error(vae, place):.3f} of 255", flush=True)
    vae.half().save_pretrained(place.out / "vae", safe_serialization=True)
