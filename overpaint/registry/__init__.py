"""What we remember: bases, concepts, patches, recipes and their history. `Registry` is the door to all of it."""

from overpaint.registry.records import BaseRecord, HistoryRecord, PatchRecord, RecipeRecord
from overpaint.registry.registry import Registry

__all__ = ["BaseRecord", "HistoryRecord", "PatchRecord", "RecipeRecord", "Registry"]
