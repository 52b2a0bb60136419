"""Sharpen the autoencoder's decoder while the encoder, and so the latents the U-Net is trained on, stay as they are.

A little noise on the latents stands for what sampling leaves in them. Independent of the U-Net: run it before, after or
beside that stage.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from overpaint.bases.emoji.training.loop import Run, sheet, train
from overpaint.bases.emoji.training.pictures import HELD_OUT_SEED, TRAINING_SEED, as_input, pool
from overpaint.bases.emoji.training.vae import distance

NOISE = 0.05
"""Standard deviation of the noise, relative to that of the latents."""


def run(spec: Run) -> None:
    """Train the decoder of `out/vae`; save it in place."""
    torch.manual_seed(spec.seed)
    vae: Any = AutoencoderKL.from_pretrained(spec.out / "vae", dtype=torch.float32, low_cpu_mem_usage=False)
    vae.to(spec.device)
    pictures, _ = pool(spec.data, 5, TRAINING_SEED)
    with torch.no_grad():
        parts = [vae.encode(as_input(part).to(spec.device)).latent_dist.mean for part in pictures.split(256)]
    latents = torch.cat(parts)
    spread = NOISE * latents.std()
    half = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(pictures), (spec.batch,), generator=generator)
        noise = torch.randn((spec.batch, *latents.shape[1:]), generator=generator).to(spec.device)
        z = latents[chosen] + spread * noise
        return distance(vae.decode(z).sample, as_input(pictures[chosen]).to(spec.device))

    train("decoder", half, loss_of, spec)
    held_out, _ = pool(spec.data, 1, HELD_OUT_SEED)
    shown = as_input(held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:256]])
    with torch.no_grad():
        back = vae(shown.to(spec.device), sample_posterior=False).sample.cpu()
    print(f"decoder held-out mean absolute error {((back - shown).abs().mean() * 127.5):.2f} of 255")
    sheet([p for pair in zip(shown[:48], back[:48], strict=True) for p in pair], 16, spec.work / "decoder.png")
    vae.half().save_pretrained(spec.out / "vae", safe_serialization=True)
