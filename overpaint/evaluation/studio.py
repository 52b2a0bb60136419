"""Where pictures come from: a base with any set of patches on, each picture drawn once and then remembered.

Pictures are known by the digest of the composed weights, so that the base, and any two recipes that compose to the same
bits, are drawn once; what an interrupted run has drawn is there for the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from overpaint.bases.base import Base
from overpaint.evaluation.gallery import Gallery, Picture
from overpaint.evaluation.images import Sampler, generate
from overpaint.evaluation.worlds import Question
from overpaint.patches.compose import Term, compose, composition_digest
from overpaint.patches.live import Overlay

Report = Callable[[int, int, str], None]


class Studio:
    """Draws questions on a base under any terms. The pipeline is loaded when the first picture is missing.

    `report(done, of, text)` hears of every batch; `expect` says beforehand how many pictures there will be.
    """

    def __init__(
        self,
        base: Base,
        sampler: Sampler,
        gallery: Gallery,
        device: torch.device,
        report: Report = lambda done, of, text: None,
        pipe: Any = None,
    ) -> None:
        self.base, self.sampler, self.gallery, self.device = base, sampler, gallery, device
        self._report, self._pipe = report, pipe
        self._overlay: Overlay | None = None
        self._digests: dict[tuple[tuple[str, float], ...], str] = {(): base.fingerprint}
        self._seen: set[tuple[str, str, int]] = set()
        self._of = self._drawn = 0
        self._seconds = 0.0

    def expect(self, count: int) -> None:
        """Announce `count` more pictures."""
        self._of += count

    def digest(self, terms: Iterable[Term]) -> str:
        """The digest of the weights that `terms` compose to; the base's fingerprint for none."""
        ordered = sorted(terms, key=lambda term: term.id)
        key = tuple((term.id, term.strength) for term in ordered)
        if key not in self._digests:
            self._digests[key] = composition_digest(self.base, compose(self.base, ordered))
        return self._digests[key]

    def draw(self, terms: Sequence[Term], questions: Sequence[Question]) -> NDArray[np.uint8]:
        """The pictures of `questions`, uint8 [n, h, w, 3]: remembered ones, and the others drawn now."""
        weights, how = self.digest(terms), self.how
        found = self.gallery.find(weights, how, questions)
        missing = [i for i, picture in enumerate(found) if picture is None]
        self._tell(
            weights, [question for question, picture in zip(questions, found, strict=True) if picture is not None]
        )
        for start in range(0, len(missing), self.sampler.batch):
            part = missing[start : start + self.sampler.batch]
            asked = [questions[i] for i in part]
            pictures = self._draw(terms, asked)
            self.gallery.keep(weights, how, asked, pictures)
            for i, picture in zip(part, pictures, strict=True):
                found[i] = picture
            self._tell(weights, asked)
        return np.stack([picture for picture in found if picture is not None])

    @property
    def how(self) -> str:
        """What beside weights, prompt and seed determines a picture."""
        return f"{self.sampler.steps} steps, guidance {self.sampler.guidance:g}, {self.device.type}"

    @property
    def overlay(self) -> Overlay:
        """What changes the pipeline; made, and the pipeline loaded, when first asked for."""
        if self._overlay is None:
            if self._pipe is None:
                self._pipe = self.base.pipeline(device=str(self.device))
            self._overlay = Overlay(self._pipe, self.base)
        return self._overlay

    @property
    def pipe(self) -> Any:
        """The pipeline that `overlay` changes."""
        assert self.overlay is not None
        return self._pipe

    def _draw(self, terms: Sequence[Term], questions: Sequence[Question]) -> list[Picture]:
        self.overlay.set(terms)
        started = time.monotonic()
        prompts, seeds = [each.prompt for each in questions], [each.seed for each in questions]
        pictures = list(generate(self.pipe, prompts, seeds, self.sampler))
        self._drawn += len(pictures)
        self._seconds += time.monotonic() - started
        return pictures

    def _tell(self, weights: str, questions: Sequence[Question]) -> None:
        """Report pictures that are there now; one that is looked at twice counts once."""
        self._seen |= {(weights, question.prompt, question.seed) for question in questions}
        done = len(self._seen)
        self._of = max(self._of, done)
        left = (self._of - done) * self._seconds / self._drawn if self._drawn else 0.0
        self._report(done, self._of, f"pictures, {left:.0f} s left" if left >= 1 else "pictures")
