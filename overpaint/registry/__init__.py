"""What we remember: bases, concepts, patches, recipes and their history. `Registry` is the door to all of it."""

from overpaint.registry.records import (
    BaseRecord,
    Difference,
    Due,
    Found,
    HistoryRecord,
    Laid,
    PatchRecord,
    RecipeRecord,
    TagRecord,
)
from overpaint.registry.registry import Registry

__all__ = [
    "BaseRecord",
    "Difference",
    "Due",
    "Found",
    "HistoryRecord",
    "Laid",
    "PatchRecord",
    "RecipeRecord",
    "Registry",
    "TagRecord",
]
