"""Pictures of one loaded base under any of its patches, for callers that take turns: visitors of a page, a widget, a script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

from overpaint.bases.base import Base
from overpaint.bases.loading import resolve_device
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.images import ImageCache, ImageGenerator, Pixels, Sampler, preferred_guidance
from overpaint.evaluation.prompts import EvalPrompt
from overpaint.workspace.opened import OpenRegistry


@dataclass(frozen=True, eq=False)
class DrawnPicture:
    """A picture, uint8 [h, w, 3], the PNG file that holds it, and the digest of the weights that drew it."""

    pixels: Pixels
    file: Path
    weights: str


class Studio:
    """Draws on one loaded base; another patch or strength shows in the next picture, and loads nothing.

    Callers in any thread: `lock` is held while a picture is drawn, so that nobody's patches are in another's picture. Hold it
    for other heavy work on the same registry. A base is loaded when its first picture is asked for, and let go for another.
    Pictures are drawn one at a time, so that the same request gives the same bytes, and kept in `folder`.
    """

    def __init__(self, opened: OpenRegistry, folder: Path, *, device: str = "auto") -> None:
        self.lock = RLock()
        self._opened, self._cache, self._device = opened, ImageCache(folder), resolve_device(device)
        self._generator: ImageGenerator | None = None

    def guidance(self, base: str) -> float:
        """The guidance scale that a base is best drawn with."""
        with self.lock:
            return preferred_guidance(self._opened.base(base))

    def draw(
        self, base: str, strengths: Mapping[str, float], prompt: str, seed: int, *, steps: int, guidance: float
    ) -> DrawnPicture:
        """A prompt drawn with these patches (strengths by id) on a base of the registry.

        Raises NotFound for an unknown base or patch, WrongBase for a patch of another base, LostPatch for lost bytes,
        OverpaintError for what `Sampler` and `EvalPrompt` refuse, or where the picture cannot be written.
        """
        with self.lock:
            opened = self._opened.base(base)
            sampler = Sampler.of(opened, steps, guidance, batch=1)
            terms = [self._opened.term_on(*each, opened) for each in strengths.items() if each[1] != 0]
            generator = self._loaded(opened)
            generator.sampler = sampler
            question = EvalPrompt(prompt, seed, {})
            pixels, weights = generator.draw(terms, [question])[0], generator.digest(terms)
            file = self._cache.place(weights, generator.how, question)
        if not file.exists():
            raise OverpaintError(f"the picture cannot be written to {file.parent}; make room on that disk")
        return DrawnPicture(pixels, file, weights)

    def _loaded(self, base: Base) -> ImageGenerator:
        if self._generator is None or self._generator.base is not base:
            self._generator = None  # first, so that two bases are never in memory at once
            self._generator = ImageGenerator(base, Sampler(batch=1), self._cache, self._device)
        return self._generator
