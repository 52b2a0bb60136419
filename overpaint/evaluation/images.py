"""Pictures from a pipeline: one seed per picture, and the picture does not depend on its neighbours in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from overpaint.errors import OverpaintError


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn: denoising steps, guidance scale, and how many pictures go through the model at once.

    Raises OverpaintError on fewer than one step or picture per batch.
    """

    steps: int = 20
    guidance: float = 4.0
    batch: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise OverpaintError(f"a sampler needs at least one step and one picture per batch; got {self}")


@torch.no_grad()
def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler | None = None,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> NDArray[np.uint8]:
    """Draw `prompts[i]` with `seeds[i]`: uint8 [n, height, width, 3], as the pipeline's own postprocessing rounds them.

    Each picture has a CPU generator of its own, so that its noise is the same in any batch; batches of other sizes may
    still move a value by a grey level or two, because the arithmetic is summed in another order. `on_batch` is
    called after each batch with the number of pictures done so far. The pipeline is left as it was. Raises
    OverpaintError when there is nothing to draw or the two lists differ in length.
    """
    if not prompts or len(prompts) != len(seeds):
        raise OverpaintError(f"one seed per prompt is needed; got {len(prompts)} prompts and {len(seeds)} seeds")
    sampler = sampler or Sampler()
    found: list[NDArray[np.uint8]] = []
    with _silenced(pipe):
        for start in range(0, len(prompts), sampler.batch):
            part = slice(start, start + sampler.batch)
            found += _draw(pipe, list(prompts[part]), seeds[part], sampler)
            if on_batch is not None:
                on_batch(len(found))
    return np.stack(found)


def _draw(pipe: Any, prompts: list[str], seeds: Sequence[int], sampler: Sampler) -> list[NDArray[np.uint8]]:
    result = pipe(
        prompts,
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pil",
    )
    return [np.asarray(picture.convert("RGB")) for picture in result.images]


@contextmanager
def _silenced(pipe: Any) -> Iterator[None]:
    """No progress bar within the block; the caller's setting afterwards."""
    kept = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**kept, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**kept)
