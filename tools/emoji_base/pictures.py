"""The training pictures: drawn once, kept in the work folder as one array each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tools.emoji_base.artwork import SIZE, WIDE, Artwork, Placement
from tools.emoji_base.catalogue import Catalogue, Scene, catalogue
from tools.emoji_base.loop import Place

TRAINING_SEED, HELD_OUT_SEED = 1, 2


def pool(
    place: Place,
    variations: int,
    seed: int = TRAINING_SEED,
    placement: Placement = WIDE,
    words: Catalogue | None = None,
) -> tuple[Tensor, list[Scene]]:
    """`variations` augmented pictures of every scene: uint8 [n, 3, 64, 64] and what each shows.

    `words` limits the scenes to a part of the catalogue. The held-out pool differs in every scale, shift and turn, not
    in the drawings: there is only one of each.
    """
    scenes = [scene for scene in (words or catalogue()).scenes() for _ in range(variations)]
    kind = f"{placement.smallest}-{placement.largest}-{placement.shift}-{placement.turn}"
    path = place.work / f"pool-{kind}-{len(scenes)}-{seed}.npy"
    return kept(path, lambda: _draw(place.data, scenes, seed, placement)), scenes


def kept(path: Path, make: Callable[[], NDArray[np.uint8]]) -> Tensor:
    """The array at `path` as a tensor; made and written if there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".tmp").open("wb") as file:
            np.save(file, make())
        path.with_suffix(".tmp").replace(path)
    return torch.from_numpy(np.load(path))


def _draw(data: Path, scenes: list[Scene], seed: int, placement: Placement) -> NDArray[np.uint8]:
    rng, artwork, colours = np.random.default_rng(seed), Artwork.load(data), catalogue().colours
    pictures = np.empty((len(scenes), 3, SIZE, SIZE), np.uint8)
    for i, scene in enumerate(scenes):
        drawn = artwork.render(str(scene.style), str(scene.object), colours[str(scene.background)], placement, rng)
        pictures[i] = np.asarray(drawn).transpose(2, 0, 1)
    return pictures


def as_input(pictures: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] to float32 in [-1, 1], what the autoencoder reads."""
    return pictures.float() / 127.5 - 1


def as_bytes(pictures: Tensor) -> Tensor:
    """Values in [-1, 1] to uint8."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()


def sheet(pictures: Tensor, columns: int, path: Path, scale: int = 1) -> None:
    """Save pictures [n, 3, h, w] with values in [-1, 1] as one grid."""
    tiles = as_bytes(pictures).permute(0, 2, 3, 1).cpu().numpy()
    height, width = tiles.shape[1:3]
    grid = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height))
    for i, tile in enumerate(tiles):
        grid.paste(Image.fromarray(tile), (i % columns * width, i // columns * height))
    grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST).save(path)
