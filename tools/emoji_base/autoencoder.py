"""The autoencoder: 64 x 64 pictures to 8 x 8 x 8 latents.

Loss: absolute and squared error on the pixels and on their horizontal and vertical differences (edges are what a
drawing is made of; this stands in for a perceptual loss), plus a small Kullback-Leibler term as in latent diffusion.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tools.emoji_base.artwork import NARROW
from tools.emoji_base.loop import Place, Schedule, train
from tools.emoji_base.pictures import HELD_OUT_SEED, as_input, pool, sheet

VARIATIONS = 4
"""Pictures per scene; the same pool the U-Net learns from."""
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


def load(place: Place) -> Any:
    """The finished autoencoder in single precision."""
    vae: Any = AutoencoderKL.from_pretrained(place.out / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False)
    return vae.to(place.device).eval()


@torch.no_grad()
def encoded(vae: Any, pictures: Tensor) -> Tensor:
    """Posterior means, unscaled: uint8 [n, 3, 64, 64] to float32 [n, 8, 8, 8]."""
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(as_input(part).to(device)).latent_dist.mean.cpu() for part in pictures.split(64)])


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Unscaled latents [n, 8, 8, 8] to pictures [n, 3, 64, 64] in [-1, 1]."""
    device = next(vae.parameters()).device
    return torch.cat([vae.decode(part.to(device)).sample.clamp(-1, 1).cpu() for part in latents.split(64)])


def run(place: Place, schedule: Schedule) -> None:
    """Train, measure the latents' spread, save to `out/vae`."""
    torch.manual_seed(place.seed)
    vae: Any = architecture()
    if place.start:
        before = AutoencoderKL.from_pretrained(place.start / "vae", torch_dtype=torch.float32)
        vae.load_state_dict(before.state_dict())
    vae.to(place.device)
    pictures, _ = pool(place, VARIATIONS, placement=NARROW)
    shown = _held_out(place)
    print(f"vae starts at a mean absolute error of {_error(vae, shown):.3f} of 255", flush=True)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(pictures), (schedule.batch,), generator=generator)
        x = as_input(pictures[chosen]).to(place.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(place.device)
        z = posterior.mean + posterior.std * noise
        loss: Tensor = distance(vae.decode(z).sample, x) + KL_WEIGHT * posterior.kl().mean()
        return loss

    train("vae", vae, loss_of, place, schedule)
    latents = encoded(vae, shown)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    print(f"vae held-out mean absolute error {_error(vae, shown):.3f} of 255, n = {len(shown)}", flush=True)
    back = decoded(vae, latents[:96])
    sheet(torch.stack([as_input(shown[:96]), back], 1).flatten(0, 1), 16, place.work / "vae.png")
    vae.half().save_pretrained(place.out / "vae", safe_serialization=True)


def _held_out(place: Place) -> Tensor:
    pictures, _ = pool(place, 1, HELD_OUT_SEED, NARROW)
    return pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:384]]


def held_out_error(vae: Any, place: Place) -> float:
    """Mean absolute difference of held-out pictures and what comes back, of 255."""
    return _error(vae, _held_out(place))


def _error(vae: Any, pictures: Tensor) -> float:
    back = decoded(vae, encoded(vae, pictures))
    return ((back - as_input(pictures)).abs().mean() * 127.5).item()
