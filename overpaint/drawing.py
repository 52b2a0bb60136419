"""`generate`: pictures of a prompt with a recipe applied, alone or beside the base's for the same seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from overpaint.errors import OverpaintError
from overpaint.evaluation.grid import labelled_grid
from overpaint.evaluation.images import Sampler, generate

if TYPE_CHECKING:
    from overpaint.workshop import Workshop


def draw(
    shop: Workshop,
    recipe: str,
    prompt: str,
    out: Path,
    *,
    compare: bool,
    seed: int,
    count: int,
    steps: int,
    guidance: float | None,
    device: str,
) -> None:
    """Save one labelled picture of `count` drawings to `out`; with `compare`, a row for the base above the recipe's.

    Raises OverpaintError when the recipe is unknown or the file cannot be written.
    """
    if not out.parent.is_dir():
        raise OverpaintError(f"there is no folder {out.parent}; make it first")
    pipe, overlay = shop.live(recipe, device=device)
    liked = overlay.base.extras.get("guidance", 7.5)
    sampler = Sampler(steps=steps, guidance=liked if guidance is None else guidance)
    seeds = list(range(seed, seed + count))
    rows = [(recipe, list(generate(pipe, [prompt] * count, seeds, sampler)))]
    if compare:
        overlay.clear()
        rows.insert(0, ("base", list(generate(pipe, [prompt] * count, seeds, sampler))))
    picture = labelled_grid(rows, [f"seed {s}" for s in seeds], title=prompt)
    try:
        picture.save(out)
    except (OSError, ValueError) as error:
        raise OverpaintError(
            f"cannot write the picture {out} ({error}); choose a .png file in a folder you may write to"
        ) from error
