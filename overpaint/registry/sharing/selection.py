"""Which of the patches and recipes that a layout has are meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from overpaint.core.errors import NotFound
from overpaint.registry.sharing.layout import (
    MANIFEST,
    NAME,
    PATCH,
    RECIPE,
    REF,
    SIGNATURE,
    SUBJECT,
    BadLayout,
    Descriptor,
    OciLayout,
    patch_document,
    read_document,
    recipe_document,
    record_document,
)
from overpaint.registry.sharing.merge_history import LIMIT as RECORD_LIMIT
from overpaint.registry.sharing.merge_history import Record, read_record
from overpaint.registry.store.patch_files import LIMIT as MANIFEST_LIMIT
from overpaint.registry.store.patch_files import BadManifest, Manifest, read_manifest

# Reading documents that arrived, and what they must be for anything in them to be believed.


SEAL_LIMIT = 10_000
PATCH_LIMIT = 4 << 30
"""The most bytes that a patch may have; it is put together in memory."""


@dataclass(frozen=True)
class PatchOffer:
    """A patch that a layout has: its manifest, and the digest of its document, which is what signatures are over."""

    manifest: Manifest
    document: str

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
    return PatchOffer(manifest, descriptor.digest)


def recipe_at(layout: OciLayout, descriptor: Descriptor) -> RecipeOffer:
    """The recipe of a document. Raises BadLayout, BadRecord."""
    where = f"the document {descriptor.digest} of {layout.where}"
    listed = read_document(layout.document(descriptor), where).get("manifests")
    if not isinstance(listed, list):
        raise BadLayout(f"{where} lists nothing, and a recipe lists its record and its patches")
    members = [Descriptor.from_json(each, where) for each in listed]
    records = [each for each in members if each.artifact_type == RECIPE and each.media_type == MANIFEST]
    if len(records) != 1:
        raise BadLayout(f"{where} has {len(records)} records, and a recipe has one")
    data = layout.document(records[0])
    config = _config(layout, data, RECORD_LIMIT)
    record = read_record(layout.blob(config.digest, config.size))
    if record_document(record.raw, record.fingerprint).data != data:
        raise BadLayout(f"{where} names a record that it does not describe; it was altered")
    return RecipeOffer(record, descriptor.digest, tuple(each for each in members if each is not records[0]))


def seals_of(layout: OciLayout, entries: Iterable[Descriptor], document: str) -> Iterator[bytes]:
    """The signatures over a document that a layout has, not yet checked. Raises BadLayout."""
    for entry in entries:
        # What the list says a signature is about only saves reading the others.
        if entry.artifact_type == SIGNATURE and entry.annotations.get(SUBJECT) == document:
            where = f"the signature {entry.digest} of {layout.where}"
            content = read_document(layout.document(entry), where)
            layers = content.get("layers")
            subject = Descriptor.from_json(content.get("subject"), where)
            if subject.digest == document and isinstance(layers, list) and len(layers) == 1:
                seal = Descriptor.from_json(layers[0], where)
                yield layout.blob(seal.digest, min(seal.size, SEAL_LIMIT))


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


@dataclass(frozen=True)
class Selection:
    """Patches by id, its beginning or concept, and recipes by name; everything, if there are none of both."""

    patches: Sequence[str]
    recipes: Sequence[str]

    def of(self, layout: OciLayout, entries: Sequence[Descriptor]) -> tuple[list[PatchOffer], list[RecipeOffer]]:
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


def _require(wanted: Iterable[str], found: set[str], what: str, layout: OciLayout) -> None:
    for each in wanted:
        if each not in found:
            raise NotFound(f"{layout.where} has no {what} {each!r}; name no patch and no recipe to take everything")


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
