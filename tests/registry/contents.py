"""Things to put into registries, also from other processes."""

from __future__ import annotations

import hashlib
from datetime import date
from pathlib import Path
from typing import Any

from overpaint.core.concepts import Concept
from overpaint.registry import PatchRecord, Registry
from overpaint.registry.history import Note
from overpaint.registry.records import RecipeEntry


def stock(registry: Registry) -> Registry:
    """Add the base "small" and the concept "apple"."""
    registry.add_base("small", Path("/models/small"), "sd1", "f" * 8)
    registry.add_concept(Concept("apple", anchor="pear"))
    return registry


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def add_patch(registry: Registry, label: str, **other: Any) -> PatchRecord:
    """A patch of the apple on the small base whose id and bytes follow from `label`; `other` says what is different."""
    usual = {
        "id": digest_of(label),
        "blob": label.encode(),
        "concept": "apple",
        "base": "small",
        "solver": "uce",
        "kind": "text map",
        "settings": {"lambda": 0.1},
        "seed": 7,
        "seconds": 0.5,
    }
    return registry.add_patch(**{**usual, **other})


def lay(
    registry: Registry,
    recipe: str,
    patch_id: str,
    strength: float | None,
    why: str = "a test",
    *,
    who: str = "tester",
    digests: tuple[str | None, str | None] = (None, None),
    until: date | None = None,
    expected: int | None = None,
) -> int:
    """Set one patch of a recipe, or (None) remove it; `digests` are those before and after."""
    entry = None if strength is None else RecipeEntry(patch_id, strength, until)
    return registry.change_patches(recipe, {patch_id: entry}, Note(why, who, *digests), expected=expected)
