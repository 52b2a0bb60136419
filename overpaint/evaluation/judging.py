"""What the judge sees in generated pictures, and how sure a count of its verdicts can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from overpaint.bases.emoji.judge import Judge
from overpaint.errors import NotFound, OverpaintError

BATCH = 256
"""Pictures judged at once."""
Z95 = 1.959963984540054
"""The normal quantile that leaves 2.5% on either side."""


@dataclass(frozen=True)
class Score:
    """`correct` of `n` pictures judged right. Raises OverpaintError unless 0 <= correct <= n and n > 0."""

    correct: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.n or self.n == 0:
            raise OverpaintError(f"a score needs at least one picture; got {self.correct} right of {self.n}")

    @property
    def rate(self) -> float:
        """The share judged right, 0 to 1."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson score interval of the rate, 0 to 1. It stays honest at 0 and at n of n."""
        squared = Z95**2
        centre = (self.correct + squared / 2) / (self.n + squared)
        half = Z95 / (self.n + squared) * sqrt(self.correct * (self.n - self.correct) / self.n + squared / 4)
        # At the ends the formula gives 0 and 1 up to rounding.
        low = max(0.0, centre - half) if self.correct else 0.0
        return low, min(1.0, centre + half) if self.correct < self.n else 1.0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.1%} ({low:.1%} to {high:.1%}, n={self.n})"


def load_judge(folder: Path) -> Judge:
    """The judge that lies in a base's folder, in `judge/`.

    Raises NotFound when the base has none: only the embedded base ships with one.
    """
    place = folder / "judge"
    if missing := [name for name in ("judge.json", "judge.safetensors") if not (place / name).is_file()]:
        raise NotFound(
            f"no judge in {folder}: {' and '.join(missing)} not found under judge/. Only the embedded base has "
            "a judge; for another base name one with --judge, such as clip:openai/clip-vit-base-patch32"
        )
    return Judge.load(place)


@torch.no_grad()
def verdicts(judge: Judge, pictures: NDArray[np.uint8], head: str) -> list[str]:
    """The class that `head` ("object", "style" or "background") finds most likely in each picture.

    `pictures` is uint8 [n, 64, 64, 3]. Raises OverpaintError on another shape or type, NotFound on an unknown head.
    """
    if head not in judge.classes:
        raise NotFound(f"the judge has no head {head!r}; choose one of {', '.join(judge.classes)}")
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (64, 64, 3):
        raise OverpaintError(f"the judge reads uint8 pictures [n, 64, 64, 3]; got {pictures.dtype} {pictures.shape}")
    device = next(judge.parameters()).device
    found: list[int] = []
    for start in range(0, len(pictures), BATCH):
        part = torch.from_numpy(np.ascontiguousarray(pictures[start : start + BATCH].transpose(0, 3, 1, 2)))
        found += judge(part.to(device).float() / 127.5 - 1)[head].argmax(1).tolist()
    return [judge.classes[head][i] for i in found]


def accuracy(judge: Judge, pictures: NDArray[np.uint8], truth: Sequence[str], head: str) -> Score:
    """How many of `pictures` (uint8 [n, 64, 64, 3]) the judge takes for what `truth` says they should show.

    Raises OverpaintError when the lengths differ or nothing is given, NotFound when the judge does not know a word.
    """
    if len(pictures) != len(truth):
        raise OverpaintError(
            f"one true class per picture is needed; got {len(pictures)} pictures, {len(truth)} classes"
        )
    seen = verdicts(judge, pictures, head)
    if strangers := sorted(set(truth) - set(judge.classes[head])):
        raise NotFound(
            f"the judge cannot tell {', '.join(strangers)}; its {head} head knows {', '.join(judge.classes[head])}"
        )
    return Score(sum(a == b for a, b in zip(seen, truth, strict=True)), len(truth))
