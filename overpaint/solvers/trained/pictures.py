"""The pictures on which solvers train, as latents: a folder's, or drawn by the base."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from overpaint.core.errors import OverpaintError
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.trained.denoiser import TOGETHER, Denoiser
from overpaint.solvers.trained.training import BEFORE, generator


class BadPictures(OverpaintError):
    """A folder of example images that a solver cannot learn from."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Latents [n, c, h, w] as the denoiser knows them, and the SHA-256 of every file they were made of."""

    latents: Tensor
    digests: tuple[str, ...] = ()


def gathered(
    model: Denoiser,
    problem: EditProblem,
    prompts: Sequence[str],
    *,
    folder: str,
    count: int,
    steps: int,
    guidance: float,
) -> Pictures:
    """The pictures of `folder`, of which there must be `count`; or, without one, so many that the base draws."""
    if folder:
        return from_folder(model, folder, count, generator(problem.seed, BEFORE))
    return drawn(model, problem, prompts, count, steps, guidance)


@torch.no_grad()
def from_folder(model: Denoiser, folder: str, least: int, random: torch.Generator) -> Pictures:
    """Every picture of a folder, in the order of their digests: fitted to the base's size, mirrored or not at random, encoded.

    Hidden files and folders in it are passed over. Raises BadPictures for a folder that is missing, holds anything that is no
    picture, or holds fewer than `least`.
    """
    if not Path(folder).expanduser().is_dir():
        raise BadPictures(f"{folder} is no folder; name one with pictures of the concept")
    files = picture_files(folder)
    if len(files) < least:
        raise BadPictures(
            f"{folder} holds {len(files)} pictures and at least {least} are needed; add some of the concept"
        )
    pixels = torch.stack([_fitted(model, file, file.read_bytes()) for file in files.values()])
    mirrored = torch.rand(len(pixels), generator=random) < 0.5
    pixels[mirrored] = pixels[mirrored].flip(-1)
    parts = [model.encoded(some, random) for some in pixels.split(TOGETHER)]
    return Pictures(torch.cat(parts), tuple(files))


@torch.no_grad()
def drawn(
    model: Denoiser, problem: EditProblem, prompts: Sequence[str], count: int, steps: int, guidance: float
) -> Pictures:
    """What the base draws, in turn, for the prompts: `count` pictures, each with a seed of its own."""
    found = []
    for start in range(0, count, TOGETHER):
        problem.report(0, count, f"drawing {start} of {count} pictures")
        numbers = range(start, min(start + TOGETHER, count))
        named = [prompts[n % len(prompts)] for n in numbers]
        generators = [generator(problem.seed, BEFORE - 1 - n) for n in numbers]
        found.append(model.drawn(named, steps, guidance, generators))
    return Pictures(torch.cat(found))


def picture_files(folder: str) -> dict[str, Path]:
    """The files of a folder by the SHA-256 of their bytes, sorted: where they are and what they are called decides nothing.

    A picture that is there twice counts once. Hidden files and folders are passed over; without the folder there are none.
    """
    path = Path(folder).expanduser()
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    seen = [file for file in sorted(files) if not file.name.startswith(".")]
    return dict(sorted((hashlib.sha256(file.read_bytes()).hexdigest(), file) for file in seen))


def _fitted(model: Denoiser, file: Path, content: bytes) -> Tensor:
    """The middle of a picture in the base's size: float32 [3, h, w] in [-1, 1]."""
    height, width = model.pixels
    try:
        with warnings.catch_warnings():
            # Pillow only warns of a small file that would unpack to gigabytes.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
            picture = ImageOps.fit(upright.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise BadPictures(f"{file} is no picture that can be read ({error}); take it out of the folder") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPictures(f"{file} is too large a picture ({error}); make it smaller") from error
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return raw.permute(2, 0, 1).float() / 127.5 - 1
