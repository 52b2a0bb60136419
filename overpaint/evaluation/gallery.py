"""Pictures that were drawn before, kept on disk by what determines them: weights, sampler, prompt and seed.

Each is a PNG file that says in its own text what it shows and what the digest of its pixels is, so that a damaged one is
found when it is read, and drawn again. A cache that cannot be written costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from overpaint.bases.digests import canonical_json
from overpaint.evaluation.worlds import Question

Picture = NDArray[np.uint8]


class Gallery:
    """A folder of pictures; None keeps nothing. `damaged` lists the files that were not what they should be."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.damaged: list[Path] = []

    def find(self, weights: str, sampler: str, questions: Sequence[Question]) -> list[Picture | None]:
        """For each question its picture, uint8 [h, w, 3], or None where there is no sound one."""
        if self.folder is None or not (self.folder / weights).is_dir():
            return [None] * len(questions)
        return [self._read(self._place(weights, sampler, each)) for each in questions]

    def keep(self, weights: str, sampler: str, questions: Sequence[Question], pictures: Sequence[Picture]) -> None:
        """Keep one picture for each question; a file is there whole or not at all."""
        if self.folder is None:
            return
        try:
            (self.folder / weights).mkdir(parents=True, exist_ok=True)
            for question, picture in zip(questions, pictures, strict=True):
                said = PngInfo()
                said.add_itxt("prompt", question.prompt)
                said.add_text("seed", str(question.seed))
                said.add_text("sampler", sampler)
                said.add_text("sha256", _digest(picture))
                place = self._place(weights, sampler, question)
                scratch = place.with_suffix(f".{os.getpid()}")
                Image.fromarray(picture).save(scratch, "PNG", pnginfo=said)
                scratch.replace(place)
        except OSError:
            pass

    def _place(self, weights: str, sampler: str, question: Question) -> Path:
        assert self.folder is not None
        meant = canonical_json([sampler, question.prompt, question.seed])
        return self.folder / weights / f"{hashlib.sha256(meant).hexdigest()}.png"

    def _read(self, place: Path) -> Picture | None:
        try:
            with Image.open(place) as file:
                picture = np.asarray(file.convert("RGB"))
                sound = file.info.get("sha256") == _digest(picture)
        except FileNotFoundError:
            return None
        except (OSError, SyntaxError, ValueError, EOFError):  # what Pillow raises depends on which byte is damaged
            sound = False
        if not sound:
            self.damaged.append(place)
            return None
        return picture


def _digest(picture: Picture) -> str:
    return hashlib.sha256(canonical_json(list(picture.shape)) + picture.tobytes()).hexdigest()
