"""Patches from and for other tools, in a registry: a foreign file becomes a stored patch, patches become a foreign file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overpaint.errors import OverpaintError
from overpaint.registry.records import PatchRecord

if TYPE_CHECKING:
    from overpaint.concepts import Concept
    from overpaint.patches.compose import Term
    from overpaint.patches.formats.exporting import Exported
    from overpaint.patches.formats.importing import Imported
    from overpaint.workshop import Workshop

Report = Callable[[int, int, str], None]
SOLVER = "import"
"""What stands in a patch's record where others have the solver that made them."""


@dataclass(frozen=True)
class Taken:
    """A patch that was imported and stored, and what was found in the file."""

    record: PatchRecord
    found: Imported


def import_patch(
    shop: Workshop,
    file: Path,
    *,
    base: str,
    concept: Concept,
    report: Report = lambda step, of, text: None,
    **options: Any,
) -> Taken:
    """Store another tool's erasure as a patch; `options` are those of `formats.importing.Options`.

    Raises OverpaintError before anything is stored.
    """
    from overpaint.patches.formats.importing import Options, import_weights
    from overpaint.patches.patch import make_patch

    opened, started = shop.base(base), time.perf_counter()
    found = import_weights(opened, file, Options(**options), report=report)
    settings = {"file": file.name, **found.settings()}
    patch = make_patch(opened, concept, found.delta, {"name": SOLVER, "settings": settings, "seed": 0, "universe": []})
    shop.registry.ensure_concept(concept)
    record = shop.registry.add_patch(
        id=patch.id,
        blob=patch.blob,
        concept=concept.name,
        base=base,
        solver=SOLVER,
        kind=patch.delta.kind,
        settings=settings,
        seed=0,
        seconds=time.perf_counter() - started,
    )
    return Taken(record, found)


def export_patches(
    shop: Workshop, keys: Iterable[str], out: Path, format: str, strength: float, **how: Any
) -> Exported:
    """Write patches (by id, beginning of an id, or concept) of one base, all at one strength, as one file of a format."""
    from overpaint.patches.compose import Term

    records = list({record.id: record for record in (shop.registry.patch(key) for key in keys)}.values())
    if len(bases := sorted({record.base for record in records})) != 1:
        raise OverpaintError(f"one file is for one base; these patches are for {', '.join(bases) or 'none'}")
    base = shop.base(bases[0])
    terms = []
    for record in records:
        patch = shop.patch(record.id)
        patch.check(base)
        terms.append(Term(patch.id, patch.delta, strength))
    return _exported(shop, bases[0], terms, records, out, format, out.stem, how)


def export_recipe(shop: Workshop, name: str, out: Path, format: str, **how: Any) -> Exported:
    """Write what lies on a recipe as one file of a format."""
    recipe = shop.known_recipe(name)
    records = [record for record, _ in recipe.patches()]
    return _exported(shop, recipe.record.base, recipe.terms(), records, out, format, name, how)


def _exported(
    shop: Workshop,
    base: str,
    terms: list[Term],
    records: list[PatchRecord],
    out: Path,
    format: str,
    title: str,
    how: dict[str, Any],
) -> Exported:
    from overpaint.patches.formats.exporting import export
    from overpaint.patches.formats.headers import About

    concepts = {record.id: record.concept for record in records}
    day = max((record.solved_at.date().isoformat() for record in records), default="")
    patches = [(term.id, concepts[term.id], term.strength) for term in sorted(terms, key=lambda term: term.id)]
    return export(shop.base(base), terms, out, format, About(title, patches, day), **how)
