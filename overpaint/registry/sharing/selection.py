"""Which patches and recipes of a layout are meant, and what their documents must be for anything in them to be believed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from overpaint.core.errors import NotFound
from overpaint.core.names import checked_texts
from overpaint.registry.sharing.documents import (
    MANIFEST,
    NAME,
    PATCH,
    RECIPE,
    RECORD_LIMIT,
    REF,
    BadLayout,
    Descriptor,
    Record,
    members_of,
    patch_document,
    read_document,
    read_record,
    recipe_document,
    record_document,
)
from overpaint.registry.sharing.layout import OciLayout
from overpaint.registry.store import MANIFEST_LIMIT, BadManifest, Manifest, read_manifest

PATCH_LIMIT = 4 << 30
"""The most bytes that a patch may have; it is put together in memory."""


@dataclass(frozen=True)
class PatchOffer:
    """A patch that a layout has: its manifest, and the digest of its document, which is what signatures are over."""

    manifest: Manifest
    document: str
    solved_at: datetime | None
    """When it was solved, as far as the index says so."""

    @property
    def concept(self) -> str:
        """The name of what it erases."""
        return str(self.manifest.content["concept"]["name"])

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the base it was solved for."""
        return str(self.manifest.content["subject"]["fingerprint"])


@dataclass(frozen=True)
class RecipeOffer:
    """A recipe that a layout has: its record, the digest of its document, and the documents of its patches."""

    record: Record
    document: str
    patches: tuple[Descriptor, ...]


def patch_at(layout: OciLayout, descriptor: Descriptor) -> PatchOffer:
    """The patch of a document. Raises BadLayout, BadManifest.

    The document must be the one that follows from its config, the patch's manifest: so the digest of the document and the
    id of the patch, the digest of the manifest, stand for each other.
    """
    data = layout.document(descriptor)
    config = _config(layout, data, MANIFEST_LIMIT)
    manifest = read_manifest(layout.blob(config.digest, config.size))
    refuse_odd(manifest)
    if patch_document(manifest).data != data:
        raise BadLayout(
            f"the document {descriptor.digest} of {layout.where} is not that of patch {manifest.id}, whose manifest it "
            "names; it was altered, and nothing was taken from it"
        )
    return PatchOffer(manifest, descriptor.digest, descriptor.created)


def recipe_at(layout: OciLayout, descriptor: Descriptor) -> RecipeOffer:
    """The recipe of a document. Raises BadLayout, BadRecipeRecord."""
    where = f"the document {descriptor.digest} of {layout.where}"
    members = members_of(read_document(layout.document(descriptor), where), where)
    records = [each for each in members if each.artifact_type == RECIPE and each.media_type == MANIFEST]
    if len(records) != 1:
        raise BadLayout(f"{where} has {len(records)} records, and a recipe has one")
    data = layout.document(records[0])
    config = _config(layout, data, RECORD_LIMIT)
    record = read_record(layout.blob(config.digest, config.size))
    if record_document(record.raw, record.fingerprint).data != data:
        raise BadLayout(f"{where} names a record that it does not describe; it was altered")
    return RecipeOffer(record, descriptor.digest, tuple(each for each in members if each is not records[0]))


def _config(layout: OciLayout, data: bytes, limit: int) -> Descriptor:
    where = f"a document of {layout.where}"
    config = Descriptor.from_json(read_document(data, where).get("config"), where)
    if config.size > limit:
        raise BadLayout(f"{where} claims {config.size} bytes for {config.digest}, and at most {limit} belong there")
    return config


def refuse_odd(manifest: Manifest) -> None:
    """Raise BadManifest for what lacks the parts that every patch has, or is larger than any."""
    content, nbytes = manifest.content, sum(array.nbytes for array in manifest.arrays)
    if nbytes > PATCH_LIMIT:
        raise BadManifest(f"patch {manifest.id} claims {nbytes} bytes, and at most {PATCH_LIMIT} can be taken")
    texts: list[Any] = [content.get("kind")]
    for part, key in (("concept", "name"), ("solver", "name"), ("subject", "fingerprint")):
        inner = content.get(part)
        texts.append(inner.get(key) if isinstance(inner, dict) else None)
    if not all(isinstance(text, str) and text for text in texts):
        raise BadManifest(
            f"the manifest {manifest.id} lacks its kind, its concept, its solver or its base; take the patch from its "
            "source again"
        )


SHORTEST = 4
"""How many digits of an id are enough to mean it."""


Offer = TypeVar("Offer")


@dataclass(frozen=True)
class Selection:
    """Patches by id, its beginning or concept, and recipes by name; everything, if there are none of both."""

    patches: Sequence[str]
    recipes: Sequence[str]

    @classmethod
    def by(cls, patches: Iterable[str], recipes: Iterable[str]) -> Selection:
        """What these names mean. Raises OverpaintError for what is no list of names."""
        return cls(checked_texts(patches, "the names of patches"), checked_texts(recipes, "the names of recipes"))

    @property
    def everything(self) -> bool:
        """Whether nothing was asked for by name."""
        return not self.patches and not self.recipes

    def asks_for(self, entry: Descriptor) -> bool:
        """Whether an entry is meant, by what the index says of it, which nobody has to believe."""
        marks = entry.annotations
        return (
            self.everything
            or (entry.artifact_type == RECIPE and marks.get(NAME) in self.recipes)
            or (entry.artifact_type == PATCH and bool(self._meant(marks.get(REF, ""), marks.get(NAME, ""))))
        )

    def of(self, layout: OciLayout, entries: Sequence[Descriptor]) -> tuple[list[PatchOffer], list[RecipeOffer]]:
        """What is meant of a layout, with all patches of the recipes; patches sorted by id, each once.

        What was asked for is compared with the manifests and records themselves; what the index says of them only decides
        which are read first. Raises NotFound for what is not there, BadLayout.
        """

        def read_recipe(entry: Descriptor) -> tuple[RecipeOffer, set[str]]:
            recipe = recipe_at(layout, entry)
            return recipe, {recipe.record.name} & set(self.recipes)

        def read_patch(entry: Descriptor) -> tuple[PatchOffer, set[str]]:
            patch = patch_at(layout, entry)
            return patch, self._meant(patch.manifest.id, patch.concept)

        recipes = self._read(layout, entries, RECIPE, self.recipes, read_recipe)
        names = [each.record.name for each in recipes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise BadLayout(
                f"{layout.where} lists several recipes called {twice[0]!r}; nothing was taken. Its owner should push again"
            )
        listed = {each.digest: each for each in entries if each.artifact_type == PATCH}
        members = {each.digest: listed.get(each.digest, each) for recipe in recipes for each in recipe.patches}
        patches = [patch_at(layout, each) for each in members.values()]
        rest = [each for each in listed.values() if each.digest not in members]
        meant = set().union(*(self._meant(each.manifest.id, each.concept) for each in patches))
        patches += self._read(layout, rest, PATCH, set(self.patches) - meant, read_patch)
        offers = {each.manifest.id: each for each in patches}
        for recipe in recipes:
            _require_whole(recipe, offers, layout)
        return [offers[id] for id in sorted(offers)], recipes

    def _read(
        self,
        layout: OciLayout,
        entries: Sequence[Descriptor],
        kind: str,
        wanted: Iterable[str],
        read: Callable[[Descriptor], tuple[Offer, set[str]]],
    ) -> list[Offer]:
        """What is meant of one kind of entries; `read` also says which names it answers to. Raises NotFound."""
        offers, missing = [], set(wanted)
        likely = [each for each in entries if each.artifact_type == kind and self.asks_for(each)]
        unlikely = [each for each in entries if each.artifact_type == kind and not self.asks_for(each)]
        for group in (likely, unlikely):
            for entry in group if missing or group is likely else ():
                offer, answered = read(entry)
                if self.everything or answered:
                    offers.append(offer)
                    missing -= answered
        if missing:
            what = "recipe" if kind == RECIPE else "patch"
            raise NotFound(
                f"{layout.where} has no {what} {sorted(missing)[0]!r}; name no patch and no recipe to take everything"
            )
        return offers

    def _meant(self, id: str, concept: str) -> set[str]:
        """Which of the patches that were asked for this one is."""
        return {key for key in self.patches if key == concept or (len(key) >= SHORTEST and id.startswith(key.lower()))}


def _require_whole(recipe: RecipeOffer, offers: dict[str, PatchOffer], layout: OciLayout) -> None:
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
