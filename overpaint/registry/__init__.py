"""What we remember: bases, concepts, patches, recipes and their history. `Registry` is the class for all of it."""

from __future__ import annotations

from overpaint.registry.records import (
    BaseRecord,
    Difference,
    ExpiredEntry,
    HistoryRecord,
    PatchRecord,
    RecipeEntry,
    RecipeRecord,
    SearchResult,
    TagRecord,
)
from overpaint.registry.registry import Registry

__all__ = [
    "BaseRecord",
    "Difference",
    "ExpiredEntry",
    "HistoryRecord",
    "PatchRecord",
    "RecipeEntry",
    "RecipeRecord",
    "Registry",
    "SearchResult",
    "TagRecord",
]
