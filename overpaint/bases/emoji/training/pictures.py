"""The training pictures, drawn once and kept in the work folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from overpaint.bases.emoji.artwork import Artwork
from overpaint.bases.emoji.catalogue import Scene

TRAINING_SEED, HELD_OUT_SEED = 1, 2


def pool(data: Path, variations: int, seed: int) -> tuple[Tensor, list[Scene]]:
    """`variations` augmented pictures of every scene: uint8 [n, 3, 64, 64] and what each shows.

    The held-out pool differs in every scale, shift and turn, not in the drawings: there is only one of each.
    """
    pictures, scenes = Artwork.load(data).pool(variations, seed)
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))), scenes


def as_input(pictures: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] to float32 in [-1, 1], what the autoencoder reads."""
    return pictures.float() / 127.5 - 1
