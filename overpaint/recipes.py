"""A recipe in the hand: a base plus a set of patches, changed one patch at a time with a reason."""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING, Any

from overpaint.registry.changes import RecipeMoved
from overpaint.registry.records import HistoryRecord, PatchRecord, RecipeRecord

if TYPE_CHECKING:
    from overpaint.bases.base import Base
    from overpaint.patches.compose import Term
    from overpaint.workshop import Solved, Workshop

TRIES = 20
"""How often a change is worked out anew when others keep changing the same recipe."""


class Recipe:
    """Reads and changes one recipe of a registry; what it holds is read anew each time."""

    def __init__(self, workshop: Workshop, name: str) -> None:
        self._workshop, self.name = workshop, name

    @property
    def record(self) -> RecipeRecord:
        return self._workshop.registry.recipe(self.name)

    @property
    def base(self) -> Base:
        return self._workshop.base(self.record.base)

    def terms(self) -> list[Term]:
        """What `compose` takes. Raises WrongBase when a patch was not solved for this base."""
        return self._terms(dict(self.record.patches))

    def _terms(self, strengths: dict[str, float]) -> list[Term]:
        from overpaint.patches.compose import Term

        found = []
        for patch_id, strength in strengths.items():
            patch = self._workshop.patch(patch_id)
            patch.check(self.base)
            found.append(Term(patch.id, patch.delta, strength))
        return found

    def digest(self) -> str:
        """The digest of the composed weights: the base's fingerprint when the recipe is empty."""
        return self._digest(dict(self.record.patches))

    def _digest(self, strengths: dict[str, float]) -> str:
        from overpaint.patches.compose import compose, composition_digest

        return composition_digest(self.base, compose(self.base, self._terms(strengths)))

    def add(
        self, patch: Solved | PatchRecord | str, strength: float = 1.0, *, why: str = "", who: str = ""
    ) -> HistoryRecord:
        """Lay a patch on, or change the strength of one that is there; returns the line of history.

        Raises AlreadyExists at an equal strength, WrongBase for a patch of another base. Composes first, so that a patch
        that does not fit is refused before anything is written.
        """
        return self._change(patch, strength, why, who)

    def remove(self, patch: Solved | PatchRecord | str, *, why: str = "", who: str = "") -> HistoryRecord:
        """Lift a patch off; the weights are composed anew from the base. Raises NotFound when it is not there."""
        return self._change(patch, None, why, who)

    def _change(self, patch: Solved | PatchRecord | str, strength: float | None, why: str, who: str) -> HistoryRecord:
        """Compose, then record; again from the start when another process changed the recipe in between."""
        for attempt in range(TRIES):
            try:
                return self._change_once(patch, strength, why, who or pwd.getpwuid(os.getuid()).pw_name)
            except RecipeMoved:
                if attempt == TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def _change_once(
        self, patch: Solved | PatchRecord | str, strength: float | None, why: str, who: str
    ) -> HistoryRecord:
        registry, expected = self._workshop.registry, self.record.patches
        before = dict(expected)
        patch_id = self._meant(patch, before, removing=strength is None)
        after = {k: v for k, v in before.items() if k != patch_id}
        if strength is not None:
            after[patch_id] = strength
        revision = registry.change_recipe(
            self.name,
            patch_id,
            strength,
            why=why,
            who=who,
            digest_before=self._digest(before),
            digest_after=self._digest(after),
            expected=expected,
        )
        return next(line for line in registry.log(self.name) if line.revision == revision)

    def _meant(self, patch: Solved | PatchRecord | str, present: dict[str, float], *, removing: bool) -> str:
        """The id of a patch; a concept's name means, when removing, the patch of it that lies here."""
        if not isinstance(patch, str):
            return patch.id
        registry = self._workshop.registry
        if removing:
            here = [p.id for p in registry.patches() if p.id in present and p.concept == patch]
            if len(here) == 1:
                return here[0]
        return registry.patch(patch).id

    def log(self) -> list[HistoryRecord]:
        """Every change, oldest first."""
        return self._workshop.registry.log(self.name)

    def patches(self) -> list[tuple[PatchRecord, float]]:
        """What lies on the base, with strengths, by concept."""
        registry = self._workshop.registry
        found = [(registry.patch(patch_id), strength) for patch_id, strength in self.record.patches]
        return sorted(found, key=lambda item: item[0].concept)

    def as_json(self) -> dict[str, Any]:
        """Name, base and patches, as a build's files and tables state them."""
        record = self.record
        patches = [
            {"id": patch.id, "concept": patch.concept, "solver": patch.solver, "strength": strength}
            for patch, strength in self.patches()
        ]
        return {"recipe": self.name, "base_name": record.base, "patches": patches}

    def card(self) -> str:
        """A model card for a build: what is erased, and what that is worth."""
        rows = [f"| {p.concept} | {p.solver} | {s:g} | `{p.id}` |" for p, s in self.patches()]
        return "\n".join(
            [
                f"# {self.name}",
                "",
                f"A checkpoint built by Overpaint from the base `{self.record.base}` (fingerprint `{self.base.fingerprint}`).",
                "",
                "| erased | solver | strength | patch |",
                "|---|---|--:|---|",
                *rows,
                "",
                "A patch hides a concept. Published attacks (textual inversion, fine-tuning) can bring it back after every "
                "known eraser; do not rely on this checkpoint alone where that matters.",
                "",
            ]
        )
