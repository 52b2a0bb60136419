"""What one visitor has switched on: the patches of a recipe, and others that are tried, each with a strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overpaint.core.errors import OverpaintError
from overpaint.registry.records import PatchRecord, RecipeRecord


@dataclass
class Switch:
    """One patch: whether it is on, how strongly, and its strength in the recipe (None where it is only tried)."""

    patch: PatchRecord
    on: bool
    strength: float
    saved: float | None

    @property
    def is_changed(self) -> bool:
        """Whether the recipe has it otherwise."""
        return (self.strength if self.on else None) != self.saved


class Switches:
    """The switches of one visitor, for one recipe as it was at one revision.

    `version` counts what was switched; `is_stopped` says that the visitor wants their long work to end.
    """

    def __init__(self, record: RecipeRecord, patches: Sequence[tuple[PatchRecord, float]]) -> None:
        self.recipe, self.base, self.revision, self.version = record.name, record.base, record.revision, 0
        self.is_stopped = False
        self.rows = {patch.id: Switch(patch, True, strength, strength) for patch, strength in patches}

    @property
    def strengths(self) -> dict[str, float]:
        """What is on: strengths by patch id."""
        return {patch_id: row.strength for patch_id, row in self.rows.items() if row.on}

    @property
    def changed(self) -> int:
        """How many patches the recipe has otherwise."""
        return sum(row.is_changed for row in self.rows.values())

    @property
    def label(self) -> str:
        """What a column of pictures under these switches is called."""
        return f"{self.recipe}, as switched" if self.changed else self.recipe

    def matching(self, text: str) -> list[Switch]:
        """The rows whose concept, solver or id has a text in it."""
        wanted = text.strip().casefold()
        return [
            row
            for row in self.rows.values()
            if wanted in row.patch.concept.casefold() or wanted in row.patch.solver or row.patch.id.startswith(wanted)
        ]

    def try_patch(self, patch: PatchRecord) -> None:
        """Switch on a patch that the recipe does not have. Raises OverpaintError for a patch of another base."""
        if patch.base != self.base:
            raise OverpaintError(f"that patch is for the base {patch.base!r}, and {self.recipe!r} is on {self.base!r}")
        self.rows.setdefault(patch.id, Switch(patch, True, 1.0, None))
        self.version += 1

    def switch(self, patch_id: str, *, on: bool | None = None, strength: float | None = None) -> bool:
        """Switch a patch on or off, or give it a strength; returns whether that changed anything."""
        row = self.rows[patch_id]
        before = (row.on, row.strength)
        row.on = row.on if on is None else on
        row.strength = row.strength if strength is None else strength
        self.version += before != (row.on, row.strength)
        return before != (row.on, row.strength)

    def switch_all(self, on: bool) -> None:
        """Switch everything on, or off: the base."""
        for row in self.rows.values():
            row.on = on
        self.version += 1
