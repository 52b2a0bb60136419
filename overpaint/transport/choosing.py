"""Which of the patches and recipes that a layout has are meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from overpaint.errors import NotFound
from overpaint.transport.layout import Layout
from overpaint.transport.oci import (
    NAME,
    PATCH,
    RECIPE,
    REF,
    BadLayout,
    Descriptor,
    patch_document,
    recipe_document,
    record_document,
)
from overpaint.transport.reading import PatchOffer, RecipeOffer, patch_at, recipe_at

SHORTEST = 4
"""How many digits of an id are enough to mean it."""


@dataclass(frozen=True)
class Selection:
    """Patches by id, its beginning or concept, and recipes by name; everything, if there are none of both."""

    patches: Sequence[str]
    recipes: Sequence[str]

    def of(self, layout: Layout, entries: Sequence[Descriptor]) -> tuple[list[PatchOffer], list[RecipeOffer]]:
        """What is meant of a layout, with all patches of the recipes; patches sorted by id, each once.

        What the list of contents says about an entry only saves reading the others: what is read is compared with what was
        asked for. Raises NotFound, BadLayout.
        """
        recipes = [recipe_at(layout, each) for each in entries if self._may_be_recipe(each)]
        _require(self.recipes, {each.record.name for each in recipes}, "recipe", layout)
        of_recipes = {each.digest: each for recipe in recipes for each in recipe.patches}
        listed = {each.digest: each for each in entries if self._may_be_patch(each)}
        offers: dict[str, PatchOffer] = {}
        for digest, descriptor in {**listed, **of_recipes}.items():
            offer = patch_at(layout, descriptor)
            if digest in of_recipes or self._means(offer.manifest.id, offer.concept):
                offers[offer.manifest.id] = offer
        found = {key for key in self.patches for each in offers.values() if _is(key, each.manifest.id, each.concept)}
        _require(self.patches, found, "patch", layout)
        for recipe in recipes:
            _require_whole(recipe, offers, layout)
        return [offers[id] for id in sorted(offers)], recipes

    def _may_be_recipe(self, entry: Descriptor) -> bool:
        everything = not self.patches and not self.recipes
        return entry.artifact_type == RECIPE and (everything or entry.annotations.get(NAME) in self.recipes)

    def _may_be_patch(self, entry: Descriptor) -> bool:
        marks = entry.annotations
        return entry.artifact_type == PATCH and self._means(marks.get(REF, ""), marks.get(NAME, ""))

    def _means(self, id: str, concept: str) -> bool:
        everything = not self.patches and not self.recipes
        return everything or any(_is(key, id, concept) for key in self.patches)


def _is(key: str, id: str, concept: str) -> bool:
    return key == concept or (len(key) >= SHORTEST and id.startswith(key.lower()))


def _require(wanted: Iterable[str], found: set[str], what: str, layout: Layout) -> None:
    for each in wanted:
        if each not in found:
            raise NotFound(f"{layout.where} has no {what} {each!r}; name no patch and no recipe to take everything")


def _require_whole(recipe: RecipeOffer, offers: dict[str, PatchOffer], layout: Layout) -> None:
    """Raise BadLayout unless exactly the patches of a recipe's history came with it, solved for its base."""
    for id in recipe.record.patches:
        if id not in offers or offers[id].fingerprint != recipe.record.fingerprint:
            raise BadLayout(
                f"the recipe {recipe.record.name!r} of {layout.where} names the patch {id}, which did not come with it or "
                "was solved for another base; push it again from its source"
            )
    record = recipe.record
    documents = [patch_document(offers[id].manifest) for id in record.patches]
    if recipe_document(record_document(record.raw, record.fingerprint), documents).descriptor.digest != recipe.document:
        raise BadLayout(
            f"the document of the recipe {record.name!r} of {layout.where} lists more than its record and the patches of its "
            "history; it was altered, and nothing was taken from it"
        )
