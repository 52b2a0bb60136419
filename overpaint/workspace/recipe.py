"""A recipe in the hand: a base plus a set of patches, changed one patch at a time with a reason."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Mapping
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

from overpaint.registry.history import Note, StaleRevision
from overpaint.registry.records import (
    Difference,
    ExpiredEntry,
    HistoryRecord,
    PatchRecord,
    RecipeEntry,
    RecipeRecord,
    TagRecord,
)
from overpaint.registry.registry import EvaluationRecord

if TYPE_CHECKING:
    from overpaint.bases.base import Base
    from overpaint.patches.compose import Term
    from overpaint.workspace.workspace import Solved, Workspace


TRIES = 20
"""How often a change is worked out anew when others keep changing the same recipe."""


def current_user() -> str:
    """Who runs this program: the name of the user, or the number where it has no name, as in many containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


class Recipe:
    """Reads and changes one recipe of a registry; what it holds is read anew each time.

    The name may say a revision, as NAME@NUMBER or NAME@TAG: that can be read, composed and built, but not changed.
    """

    def __init__(self, workspace: Workspace, name: str) -> None:
        self._workspace, self.name = workspace, name

    @property
    def record(self) -> RecipeRecord:
        return self._workspace.registry.recipe(self.name)

    @property
    def base(self) -> Base:
        return self._workspace.base(self.record.base)

    def terms(self) -> list[Term]:
        """What `compose` takes. Raises WrongBase when a patch was not solved for this base."""
        return self._terms(dict(self.record.patches))

    def _terms(self, strengths: dict[str, float]) -> list[Term]:
        from overpaint.patches.compose import Term

        found = []
        for patch_id, strength in strengths.items():
            patch = self._workspace.patch(patch_id)
            patch.check(self.base)
            found.append(Term(patch.id, patch.delta, strength))
        return found

    def digest(self) -> str:
        """The digest of the composed weights: the base's fingerprint when the recipe is empty."""
        return self._digest(dict(self.record.patches))

    def _digest(self, strengths: dict[str, float]) -> str:
        from overpaint.patches.compose import compose, composition_digest

        return composition_digest(self.base, compose(self.base, self._terms(strengths)))

    # Changing

    def add(
        self,
        patch: Solved | PatchRecord | str,
        strength: float = 1.0,
        *,
        why: str = "",
        who: str = "",
        until: date | Literal["never"] | None = None,
    ) -> HistoryRecord:
        """Lay a patch on, or change the strength of one that is there; returns the line of history.

        `until` is the day on which it lapses: `due` lists it from then on, and nothing is lifted off by itself. Without
        one a patch stays for good, or as long as it was to stay before. Raises AlreadyExists when it lies there like this,
        WrongBase for a patch of another base. Composes first, so that a patch that does not fit is refused before
        anything is written.
        """

        def change(held: RecipeRecord) -> int:
            patch_id = self._meant(patch)
            before = next((each for each in held.laid if each.patch == patch_id), None)
            day = before.until if until is None and before is not None else until
            return self._set(held, patch_id, RecipeEntry(patch_id, strength, None if day == "never" else day), why, who)

        return self._changed(change)[0]

    def remove(self, patch: Solved | PatchRecord | str, *, why: str = "", who: str = "") -> HistoryRecord:
        """Lift a patch off; the weights are composed anew from the base. Raises NotFound when it is not there."""
        return self._changed(lambda held: self._set(held, self._meant(patch, on=held), None, why, who))[0]

    def replace(self, new: Mapping[str, str], *, why: str = "", who: str = "") -> list[HistoryRecord]:
        """Lay patches in the place of others, as those lie, in one revision; `new` has their ids by the others'.

        Raises NotFound for what is not there, AlreadyExists for a patch that would lie here twice, WrongBase.
        """

        def change(held: RecipeRecord) -> int:
            before = dict(held.patches)
            after = {new.get(each, each): strength for each, strength in before.items()}
            note = Note(why, who or current_user(), self._digest(before), self._digest(after))
            return self._workspace.registry.exchange_patches(held.name, new, note, expected=held.revision)

        return self._changed(change)

    def checkout(self, revision: int | str, *, why: str = "", who: str = "") -> list[HistoryRecord]:
        """Lay on exactly what lay here at an earlier revision, by number or tag; returns the lines of the new revision.

        The weights are composed anew, and their digest is recorded beside the old one. Raises NotFound for an unknown
        revision, AlreadyExists when the same lies here now.
        """

        def change(held: RecipeRecord) -> int:
            then = self._workspace.registry.recipe(f"{held.name}@{revision}")
            note = Note(why, who or current_user(), self._digest(dict(held.patches)), self._digest(dict(then.patches)))
            return self._workspace.registry.checkout_recipe(held.name, then.revision, note, expected=held.revision)

        return self._changed(change)

    def _changed(self, change: Callable[[RecipeRecord], int]) -> list[HistoryRecord]:
        """Compose, then record; again from the start when another process changed the recipe in between."""
        for attempt in range(TRIES):
            try:
                revision = change(self.record)
                return self._workspace.registry.log(self.name, revision=revision)
            except StaleRevision:
                if attempt == TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def _set(self, held: RecipeRecord, patch_id: str, wanted: RecipeEntry | None, why: str, who: str) -> int:
        before = dict(held.patches)
        after = {each: strength for each, strength in before.items() if each != patch_id}
        if wanted is not None:
            after[patch_id] = wanted.strength
        return self._workspace.registry.change_recipe(
            self.name,
            patch_id,
            wanted.strength if wanted else None,
            until=wanted.until if wanted else None,
            why=why,
            who=who or current_user(),
            digest_before=self._digest(before),
            digest_after=self._digest(after),
            expected=held.revision,
        )

    def _meant(self, patch: Solved | PatchRecord | str, *, on: RecipeRecord | None = None) -> str:
        """The id of a patch; a concept's name means, on a recipe, the patch of it that lies there."""
        if not isinstance(patch, str):
            return patch.id
        registry = self._workspace.registry
        if on is not None:
            here = [record.id for record, _ in registry.patches_on(on.name) if record.concept == patch]
            if len(here) == 1:
                return here[0]
        return registry.patch(patch).id

    # Keeping

    def copy(self, name: str, *, why: str = "", who: str = "") -> Recipe:
        """A new recipe with what lies on this one. Raises AlreadyExists."""
        self._workspace.registry.copy_recipe(self.name, name, why=why, who=who or current_user())
        return Recipe(self._workspace, name)

    def delete(self, *, why: str = "", who: str = "") -> None:
        """Take this recipe off the lists. Its history stays, and `Workshop.undelete_recipe` brings it back."""
        self._workspace.registry.delete_recipe(self.name, why=why, who=who or current_user())

    def tag(self, tag: str, *, who: str = "") -> TagRecord:
        """Tie a tag to this recipe as it is now: `checkout(tag)` comes back to it. Raises AlreadyExists."""
        return self._workspace.registry.tag(tag, recipes=[self.name], who=who or current_user())[0]

    def untag(self, tag: str) -> None:
        """Untie a tag from this recipe. Raises NotFound."""
        self._workspace.registry.untag(tag, recipes=[self.record.name])

    # Reading

    def log(self) -> list[HistoryRecord]:
        """Every change, oldest first."""
        return self._workspace.registry.log(self.record.name)

    def diff(self, other: str) -> list[Difference]:
        """Every patch that lies differently here and on another recipe or revision (NAME, NAME@NUMBER, NAME@TAG)."""
        return self._workspace.registry.diff(self.name, other)

    def due(self, on: date | None = None) -> list[ExpiredEntry]:
        """What lies here though its day had come, by today (in UTC) or another day."""
        return self._workspace.due(on, recipe=self.record.name)

    def evaluations(self) -> list[EvaluationRecord]:
        """The latest run of every suite on this recipe as it is (or, NAME@REVISION, as it was)."""
        return self._workspace.registry.evaluations(recipe=self.name, latest=True)

    def patches(self) -> list[tuple[PatchRecord, float]]:
        """What lies on the base, with strengths, by concept."""
        found = [(patch, laid.strength) for patch, laid in self._workspace.registry.patches_on(self.name)]
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
        from overpaint.workspace.report import model_card

        return model_card(self.name, self.record.base, self.base.fingerprint, self.patches())
