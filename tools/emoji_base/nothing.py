"""Pictures that show none of the objects, as an erased concept leaves them behind, by kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from tools.emoji_base import autoencoder
from tools.emoji_base.artwork import SIZE, WIDE, Artwork
from tools.emoji_base.catalogue import Scene, catalogue
from tools.emoji_base.loop import Place
from tools.emoji_base.pictures import as_bytes, as_input, kept

KINDS = ("stranger", "blend", "latent blend", "blur", "blank", "noise", "noised")
"""Drawings of other things; two drawings, two latents laid over each other; a heavily blurred drawing; a background
with nothing on it; decoded random latents; decoded latents that are mostly noise."""

HELD_OUT_STRANGERS = 5
"""Every fifth drawing of another thing is kept for testing."""


def pool(
    place: Place, pictures: Tensor, scenes: list[Scene], each: int, seed: int, held_out: bool
) -> dict[str, Tensor]:
    """`each` pictures of every kind: uint8 [each, 3, 64, 64]. `pictures` and `scenes` are what is mixed and blurred."""
    vae: Any = autoencoder.load(place)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    one, other = _pairs(scenes, each, rng)
    makers: dict[str, Callable[[], Tensor]] = {
        "stranger": lambda: _strangers(place, each, rng, held_out),
        "blend": lambda: as_bytes(as_input(pictures[one]).lerp(as_input(pictures[other]), _share(each, generator))),
        "latent blend": lambda: _latent_blend(vae, pictures[one], pictures[other], _share(each, generator)),
        "blur": lambda: _blurred(pictures[torch.as_tensor(rng.integers(len(pictures), size=each))], rng),
        "blank": lambda: _blank(each, rng),
        "noise": lambda: _noise(vae, pictures[one], each, generator),
        "noised": lambda: _noised(vae, pictures[one], generator),
    }
    return {kind: _kept(place, f"{kind}-{each}-{seed}", make) for kind, make in makers.items()}


def _kept(place: Place, name: str, make: Callable[[], Tensor]) -> Tensor:
    return kept(place.work / f"nothing-{name.replace(' ', '-')}.npy", lambda: make().numpy())


def _pairs(scenes: list[Scene], each: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Indices of two pictures of different objects, half of them of one style."""
    one, other = rng.integers(len(scenes), size=each), rng.integers(len(scenes), size=each)
    by_style: dict[str | None, list[int]] = {}
    for i, scene in enumerate(scenes):
        by_style.setdefault(scene.style, []).append(i)
    for k in range(each):
        while scenes[one[k]].object == scenes[other[k]].object or (
            k % 2 and scenes[one[k]].style != scenes[other[k]].style
        ):
            same = by_style[scenes[one[k]].style]
            other[k] = same[rng.integers(len(same))]
    return torch.as_tensor(one), torch.as_tensor(other)


def _share(count: int, generator: torch.Generator) -> Tensor:
    return 0.38 + 0.24 * torch.rand(count, 1, 1, 1, generator=generator)


def _strangers(place: Place, each: int, rng: np.random.Generator, held_out: bool) -> Tensor:
    artwork, words = Artwork.strangers(place.data), catalogue()
    names = list(dict.fromkeys(name for _, name in artwork.drawings))
    names = [n for i, n in enumerate(names) if (i % HELD_OUT_STRANGERS == 0) == held_out]
    found: NDArray[np.uint8] = np.empty((each, 3, SIZE, SIZE), np.uint8)
    for k in range(each):
        style, name = words.styles[rng.integers(len(words.styles))], names[rng.integers(len(names))]
        colour = words.colours[words.backgrounds[rng.integers(len(words.backgrounds))]]
        found[k] = np.asarray(artwork.render(style, name, colour, WIDE, rng)).transpose(2, 0, 1)
    return torch.from_numpy(found)


def _latent_blend(vae: Any, one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    a, b = autoencoder.encoded(vae, one), autoencoder.encoded(vae, other)
    # Two independent latents mixed have less spread than one; put it back, as a denoiser would.
    mean = a.mean((0, 2, 3), keepdim=True)
    mixed = (a - mean).lerp(b - mean, share) / (share.square() + (1 - share).square()).sqrt()
    return as_bytes(autoencoder.decoded(vae, mixed + mean))


def _blurred(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    found = []
    for picture in pictures.permute(0, 2, 3, 1).numpy():
        blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(rng.uniform(6, 11)))
        found.append(torch.from_numpy(np.array(blurred)).permute(2, 0, 1))
    return torch.stack(found)


def _blank(each: int, rng: np.random.Generator) -> Tensor:
    """A catalogue colour, or any, with a faint slope of brightness and a faint noise."""
    colours = np.array(list(catalogue().colours.values()), float)
    base = np.where(
        rng.random((each, 1)) < 0.7, colours[rng.integers(len(colours), size=each)], rng.uniform(0, 255, (each, 3))
    )
    slope = rng.normal(0, 12, (each, 2, 1, 1, 1)) * np.linspace(-1, 1, SIZE)
    found = base[:, :, None, None] + slope[:, 0] + slope[:, 1].swapaxes(2, 3)
    found = found + rng.normal(0, 1, (each, 3, SIZE, SIZE)) * rng.uniform(0, 6, (each, 1, 1, 1))
    return torch.from_numpy(found.clip(0, 255).astype(np.uint8))


def _moments(vae: Any, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    latents = autoencoder.encoded(vae, pictures)
    return latents, latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)


def _noise(vae: Any, pictures: Tensor, each: int, generator: torch.Generator) -> Tensor:
    """Random latents of the real ones' mean and spread, coarse or fine."""
    _, mean, spread = _moments(vae, pictures[:256])
    fine = torch.randn(each, autoencoder.LATENT_CHANNELS, 8, 8, generator=generator)
    coarse = torch.randn(each, autoencoder.LATENT_CHANNELS, 3, 3, generator=generator)
    coarse = torch.nn.functional.interpolate(coarse, size=8, mode="bicubic")
    share = torch.rand(each, 1, 1, 1, generator=generator)
    return as_bytes(autoencoder.decoded(vae, mean + spread * fine.lerp(coarse, share)))


def _noised(vae: Any, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Latents of which a fifth to four tenths of the amplitude is left."""
    latents, mean, spread = _moments(vae, pictures)
    left = 0.2 + 0.2 * torch.rand(len(latents), 1, 1, 1, generator=generator)
    noise = torch.randn(latents.shape, generator=generator) * spread
    return as_bytes(autoencoder.decoded(vae, mean + left * (latents - mean) + (1 - left.square()).sqrt() * noise))
