"""Reading documents that arrived, and what they must be for anything in them to be believed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from overpaint.registry.store.manifest import LIMIT as MANIFEST_LIMIT
from overpaint.registry.store.manifest import BadManifest, Manifest, read_manifest
from overpaint.transport.layout import Layout
from overpaint.transport.oci import (
    MANIFEST,
    RECIPE,
    SIGNATURE,
    SUBJECT,
    BadLayout,
    Descriptor,
    patch_document,
    read_document,
    record_document,
)
from overpaint.transport.records import LIMIT as RECORD_LIMIT
from overpaint.transport.records import Record, read_record

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


def patch_at(layout: Layout, descriptor: Descriptor) -> PatchOffer:
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


def recipe_at(layout: Layout, descriptor: Descriptor) -> RecipeOffer:
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


def seals_of(layout: Layout, entries: Iterable[Descriptor], document: str) -> Iterator[bytes]:
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


def _config(layout: Layout, data: bytes, limit: int) -> Descriptor:
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
