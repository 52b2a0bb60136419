"""An OCI image layout: `oci-layout`, `index.json` and `blobs/sha256/<hex>` in a folder, behind a URL, or in an archive.

And patches and recipes as documents of that format. A patch's document follows from its manifest alone, so a patch has one
document and one digest of it everywhere, and what comes is compared with what should come. `docs/sharing.md` specifies it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from overpaint.core.digests import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.registry.store import DIGEST, BadFile, FileInfo, open_files
from overpaint.registry.store.blobs import as_digested
from overpaint.registry.store.files import FolderFiles
from overpaint.registry.store.patch_files import BadManifest, Manifest, read_json

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
SEAL = "application/vnd.overpaint.signature.v1+json"
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

DOCUMENT_LIMIT = 32 << 20
"""The most bytes a document may have."""


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


def signature_document(seal: bytes, signed: Descriptor) -> Document:
    """The document of a detached signature over another document."""
    subject = Descriptor(signed.media_type, signed.digest, signed.size)
    return _document(SIGNATURE, layers=[Descriptor.of(seal, SEAL).as_json()], subject=subject)


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
    """What a document of the OCI index format lists. Raises BadLayout."""
    listed = content.get("manifests")
    if not isinstance(listed, list):
        raise BadLayout(f"{where} lists no manifests; nothing was taken from it")
    return [Descriptor.from_json(each, where) for each in listed]


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


MARK = canonical_json({"imageLayoutVersion": "1.0.0"})
INDEX_LIMIT = 128 << 20
TRIES = 10
REHASHED = 1 << 20
"""The most bytes that a push reads back from behind a URL, unless asked to check all, to see that a blob is sound."""


class LayoutStore(Protocol):
    """What a layout needs of the place that has its files."""

    @property
    def where(self) -> str:
        """The place, as a message calls it."""
        ...

    def read(self, name: str, *, limit: int | None = None) -> bytes | None: ...

    def info(self, name: str) -> FileInfo | None: ...

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None: ...

    def alone(self) -> AbstractContextManager[bool]: ...


class OciLayout:
    """Reads and writes a layout. What is read is believed only as far as its digest reaches.

    What is written already is read again before it is believed: all of it in a folder or with `check`, and otherwise what
    has at most REHASHED bytes; of the rest the size must be right.
    """

    def __init__(self, files: LayoutStore, *, check: bool = False) -> None:
        self.files = files
        self._check = check or isinstance(files, FolderFiles)

    @classmethod
    def at(cls, location: str | Path, *, check: bool = False) -> OciLayout:
        """The layout in a folder or behind a URL. Raises OverpaintError for what is neither."""
        files = open_files(location)
        if isinstance(files, FolderFiles) and files.root.is_file():
            raise OverpaintError(
                f"{files.where} is a file, and patches are pushed to and pulled from folders and URLs; `overpaint import` "
                "takes what is in a file, `overpaint export` writes one"
            )
        return cls(files, check=check)

    @property
    def where(self) -> str:
        return self.files.where

    def is_there(self) -> bool:
        """Whether there is a layout. Raises BadLayout when there is one of a version that this program does not know."""
        try:
            mark = self.files.read("oci-layout", limit=1000)
        except BadFile as error:
            raise BadLayout(f"{self.where} is no OCI image layout: {error}") from error
        if mark is None:
            return False
        if b"imageLayoutVersion" not in mark:
            raise BadLayout(
                f"the file oci-layout of {self.where} does not say what it should: it is damaged, or something else answers at "
                "this address; check the address, or copy the file again from its source"
            )
        if b'"1.0.0"' not in mark:
            raise BadLayout(f"the layout at {self.where} is not of version 1.0.0; upgrade Overpaint")
        return True

    def entries(self) -> list[Descriptor]:
        """What index.json lists. Raises BadLayout."""
        data = self.files.read("index.json", limit=INDEX_LIMIT)
        where = f"index.json of {self.where}"
        if data is None:
            raise BadLayout(f"{self.where} has no index.json; it is no layout, or a push to it was never finished")
        return members_of(read_document(data, where), where)

    def document(self, descriptor: Descriptor, limit: int = DOCUMENT_LIMIT) -> bytes:
        """A document of at most `limit` bytes, its size and digest checked. Raises BadLayout."""
        if descriptor.media_type not in (MANIFEST, INDEX) or descriptor.size > limit:
            raise BadLayout(
                f"{self.where} lists {descriptor.digest} as {descriptor.media_type} of {descriptor.size} bytes, which is "
                "no document that this program reads"
            )
        return self.blob(descriptor.digest, descriptor.size)

    def blob(self, digest: str, size: int) -> bytes:
        """A blob, its size and digest checked. Raises BadLayout."""
        try:
            data = self.files.read(_name(digest), limit=size)
        except BadFile as error:
            raise BadLayout(f"{self.where}: {error}") from error
        if data is None:
            raise BadLayout(f"{self.where} lacks the blob {digest}; it was not copied whole: copy it again")
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise BadLayout(
                f"the blob {digest} of {self.where} is not what its digest says; it was damaged or altered. Nothing was "
                "taken from it: copy it again from its source"
            )
        return data

    def put(self, digest: str, size: int, parts: Iterable[bytes | memoryview]) -> int:
        """Write a blob unless it is there, whole; return how many bytes were written. A damaged one is replaced."""
        known = self.files.info(_name(digest))
        if known is not None and known.nbytes == size and self._is_sound(digest, size):
            return 0
        self.files.write(_name(digest), as_digested(parts, digest))
        return size

    def _is_sound(self, digest: str, size: int) -> bool:
        if size > REHASHED and not self._check:
            return True
        data = self.files.read(_name(digest), limit=size)
        return data is None or hashlib.sha256(data).hexdigest() == digest  # None: an archive that is being written

    def put_document(self, document: Document) -> int:
        """Write a document unless it is there; return how many bytes were written."""
        return self.put(document.descriptor.digest, document.descriptor.size, [document.data])

    def begin(self) -> None:
        """Mark the place as a layout."""
        if not self.is_there():
            self.files.write("oci-layout", [MARK], final=False)

    def update(self, change: Callable[[list[Descriptor]], Iterable[Descriptor]]) -> None:
        """Let index.json list what `change` makes of what it lists; all that this names must be there already.

        Two pushes to one folder wait for each other. Behind a URL nobody can wait, so there it is looked at once more.
        """
        with self.files.alone() as alone:
            for _ in range(TRIES):
                wanted = sorted(change(self.listed()), key=lambda each: (each.artifact_type, each.digest))
                content = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [each.as_json() for each in wanted]}
                self.files.write("index.json", [canonical_json(content)], final=False)
                if alone or self.listed() == wanted:
                    return
        raise BadLayout(f"others keep changing index.json of {self.where}; push again when they have ended")

    def listed(self) -> list[Descriptor]:
        """What index.json lists, or nothing while there is none."""
        return self.entries() if self.files.info("index.json") else []


def _name(digest: str) -> str:
    return f"blobs/sha256/{digest}"
