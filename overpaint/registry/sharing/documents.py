"""Patches, recipes and what goes with them as documents of the OCI image format. `docs/sharing.md` specifies them.

A patch's document follows from its manifest alone, so a patch has one document and one digest of it everywhere, and what
is received is compared with what it should be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from overpaint.core.encoding import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.registry.store import DIGEST, BadManifest, Manifest, read_json

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
PATCH = "application/vnd.overpaint.patch.v1"
PATCH_MANIFEST = "application/vnd.overpaint.patch.manifest.v1+json"
ARRAY = "application/vnd.overpaint.array.v1"
BASE = "application/vnd.overpaint.base.v1"
RECIPE = "application/vnd.overpaint.recipe.v1"
RECORD = "application/vnd.overpaint.recipe.record.v1+json"
SIGNATURE = "application/vnd.overpaint.signature.v1"
SIGNATURE_BLOB = "application/vnd.overpaint.signature.v1+json"
SIGNED_LIST = "application/vnd.overpaint.signed-list.v1"
VOCABULARY = "application/vnd.overpaint.vocabulary.v1"
MOMENTS = "application/vnd.overpaint.vocabulary.moments.v1"

FINGERPRINT = "org.overpaint.base.fingerprint"
NAME = "org.overpaint.name"
SUBJECT = "org.overpaint.subject"
REF = "org.opencontainers.image.ref.name"
CREATED = "org.opencontainers.image.created"
KEY = "org.overpaint.key"
COUNTER = "org.overpaint.counter"
REVISIONS = "org.overpaint.revisions"

MARK = canonical_json({"imageLayoutVersion": "1.0.0"})
"""The content of the file `oci-layout`."""
INDEX_LIMIT = 128 << 20
"""The most bytes that a list of documents may have."""


class BadLayout(OverpaintError):
    """A shared folder, URL or archive whose content contradicts itself or this program's reading of the format."""


@dataclass(frozen=True)
class Descriptor:
    """What points at a blob: its media type, digest (64 hexadecimal digits) and size in bytes, and what it is about."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def created(self) -> datetime | None:
        """The moment that the annotation of this name gives, in UTC and never one to come; None if it gives none."""
        try:
            found = datetime.fromisoformat(self.annotations[CREATED].replace("Z", "+00:00")).astimezone(timezone.utc)
        except (KeyError, ValueError, OverflowError):
            return None
        return min(found, datetime.now(timezone.utc))

    @classmethod
    def of(cls, data: bytes, media_type: str, artifact_type: str = "", **rest: Any) -> Descriptor:
        """The descriptor of these bytes."""
        return cls(media_type, hashlib.sha256(data).hexdigest(), len(data), artifact_type, **rest)

    def as_json(self) -> dict[str, Any]:
        """The JSON object of the OCI format."""
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": f"sha256:{self.digest}", "size": self.size}
        if self.artifact_type:
            found["artifactType"] = self.artifact_type
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        return found

    @classmethod
    def from_json(cls, value: Any, where: str) -> Descriptor:
        """Read one. Raises BadLayout."""
        if not isinstance(value, dict):
            raise BadLayout(f"{where} has something that is no descriptor; nothing was taken from it")
        media_type, digest, size = (value.get(key) for key in ("mediaType", "digest", "size"))
        artifact_type, annotations = value.get("artifactType", ""), value.get("annotations") or {}
        if not isinstance(digest, str) or not digest.startswith("sha256:") or not DIGEST.fullmatch(digest[7:]):
            raise BadLayout(f"{where} has a digest that is not sha256: and 64 hexadecimal digits: {_short(digest)}")
        if type(size) is not int or size < 0:
            raise BadLayout(f"{where} gives {digest} the size {_short(size)}, which is no number of bytes")
        if not isinstance(media_type, str) or not isinstance(artifact_type, str) or not _is_text_map(annotations):
            raise BadLayout(f"{where} describes {digest} in a way the OCI image format does not know")
        return cls(media_type, digest[7:], size, artifact_type, annotations)


@dataclass(frozen=True)
class Document:
    """A document to be shared: its bytes and what points at them."""

    data: bytes
    descriptor: Descriptor


def patch_document(manifest: Manifest) -> Document:
    """The document of a patch. Its config is the patch's manifest, so the config's digest is the patch's id."""
    fingerprint = str(manifest.content["subject"]["fingerprint"])
    layers = [
        Descriptor(ARRAY, array.digest, len(array.label) + array.nbytes, annotations={NAME: array.name}).as_json()
        for array in manifest.arrays
    ]
    return _document(
        PATCH,
        config=Descriptor.of(manifest.raw, PATCH_MANIFEST),
        layers=layers,
        subject=base_document(fingerprint).descriptor,
        annotations={FINGERPRINT: fingerprint},
    )


def base_document(fingerprint: str) -> Document:
    """The document that stands for a base: it says the fingerprint, and nothing else."""
    return _document(BASE, annotations={FINGERPRINT: fingerprint})


def record_document(record: bytes, fingerprint: str) -> Document:
    """The document of a recipe's record, which is its config."""
    return _document(RECIPE, config=Descriptor.of(record, RECORD), subject=base_document(fingerprint).descriptor)


def recipe_document(record: Document, patches: Iterable[Document]) -> Document:
    """The document of a recipe: its record, and every patch that its history names."""
    members = sorted((each.descriptor for each in patches), key=lambda each: each.digest)
    return _index(RECIPE, [record.descriptor, *members])


def list_document(key: bytes, counter: int, members: Iterable[Descriptor]) -> Document:
    """The document of a key's signed list: what `index.json` shall list of what the key has signed, word for word."""
    members = sorted(members, key=lambda each: (each.artifact_type, each.digest))
    return _index(SIGNED_LIST, members, {KEY: key.hex(), COUNTER: str(counter)})


def vocabulary_document(data: bytes) -> Document:
    """The document of a vocabulary."""
    return _document(VOCABULARY, layers=[Descriptor.of(data, MOMENTS).as_json()])


def signature_document(signature: bytes, signed: Descriptor) -> Document:
    """The document of a detached signature over another document."""
    subject = Descriptor(signed.media_type, signed.digest, signed.size)
    return _document(SIGNATURE, layers=[Descriptor.of(signature, SIGNATURE_BLOB).as_json()], subject=subject)


def read_document(data: bytes, where: str) -> dict[str, Any]:
    """The JSON of a document. Raises BadLayout."""
    try:
        content = read_json(data, where)
    except BadManifest as error:
        raise BadLayout(str(error)) from error
    if content.get("schemaVersion") != 2:
        raise BadLayout(f"{where} has no schemaVersion 2, so it is not a document of the OCI image format")
    return content


def members_of(content: Mapping[str, Any], where: str) -> list[Descriptor]:
    """What a document of the OCI index format lists, each once. Raises BadLayout."""
    listed = content.get("manifests")
    if not isinstance(listed, list):
        raise BadLayout(f"{where} lists no manifests; nothing was taken from it")
    members = [Descriptor.from_json(each, where) for each in listed]
    # What is listed again, word for word, would only be read again.
    return list(
        {(each.digest, each.artifact_type, *sorted(each.annotations.items())): each for each in members}.values()
    )


NOTHING = b"{}"
"""The blob that a document names where the format wants a blob and there is nothing to say."""


def _index(artifact_type: str, members: Iterable[Descriptor], annotations: Mapping[str, str] | None = None) -> Document:
    content: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": INDEX,
        "artifactType": artifact_type,
        "manifests": [each.as_json() for each in members],
    }
    if annotations is not None:
        content["annotations"] = dict(annotations)
    data = canonical_json(content)
    return Document(data, Descriptor.of(data, INDEX, artifact_type))


def _document(
    artifact_type: str,
    *,
    config: Descriptor | None = None,
    layers: list[dict[str, Any]] | None = None,
    subject: Descriptor | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Document:
    nothing = Descriptor.of(NOTHING, EMPTY)
    content: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact_type,
        "config": (config or nothing).as_json(),
        "layers": layers if layers is not None else [nothing.as_json()],
    }
    if subject is not None:
        content["subject"] = subject.as_json()
    if annotations is not None:
        content["annotations"] = dict(annotations)
    data = canonical_json(content)
    return Document(data, Descriptor.of(data, MANIFEST, artifact_type))


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for pair in value.items() for each in pair)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
