"""Cross-talk for a workshop: which patches are meant, and the table of what each of them moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overpaint.bases.device import resolve_device
from overpaint.errors import OverpaintError
from overpaint.evaluation.crosstalk import Crosstalk, Pair, crosstalk, has_closed_form

if TYPE_CHECKING:
    from overpaint.workshop import Workshop


def crosstalk_on(shop: Workshop, recipe: str | None, base: str | None, everything: bool, device: str) -> Crosstalk:
    """See `Workshop.crosstalk`."""
    if recipe is not None:
        record = shop.registry.recipe(recipe)
        base, ids = record.base, [patch_id for patch_id, _ in record.patches]
    else:
        base = base or _only_base(shop)
        ids = list({record.concept: record.id for record in shop.registry.patches(base=base)}.values())
    if not ids:
        place = f"the recipe {recipe!r}" if recipe is not None else f"the base {base!r}"
        raise OverpaintError(f"there is no patch on {place}; solve one and add it first")
    return crosstalk(
        shop.base(base),
        [shop.patch(patch_id) for patch_id in ids],
        shop.concepts() if everything else (),
        cache=shop.registry.folder / "cache" / "moments",
        device=resolve_device(device),
    )


def disturbances(shop: Workshop, recipe: str, patch_id: str) -> list[Pair]:
    """See `Workshop.disturbances`."""
    record = shop.registry.recipe(recipe)
    base = shop.base(record.base)
    found = [shop.patch(other) for other, _ in record.patches]
    known = [patch for patch in found if has_closed_form(base, patch)]
    name = shop.patch(patch_id).concept.name
    result = crosstalk(base, known, cache=shop.registry.folder / "cache" / "moments")
    return [pair for pair in result.above() if name in (pair.emitter, pair.receiver)]


def _only_base(shop: Workshop) -> str:
    known = [record.name for record in shop.registry.bases()]
    if len(known) != 1:
        raise OverpaintError(f"say which base is meant (known: {', '.join(known) or 'none; add one first'})")
    return known[0]
