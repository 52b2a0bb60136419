"""Things to put into registries, also from other processes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from overpaint.core.concepts import Concept
from overpaint.registry import PatchRecord, Registry


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


def lay(registry: Registry, recipe: str, patch_id: str, strength: float | None, why: str = "a test") -> int:
    """Change a recipe without digests."""
    return registry.change_recipe(
        recipe, patch_id, strength, why=why, who="tester", digest_before=None, digest_after=None
    )
