"""An OCI image layout: `oci-layout`, `index.json` and `blobs/sha256/<hex>` in a folder, behind a URL, or in an archive."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from overpaint.registry.store import BadFile, FileInfo
from overpaint.registry.store.blobs import as_digested
from overpaint.registry.store.manifest import canonical_json
from overpaint.transport.oci import (
    DOCUMENT_LIMIT,
    INDEX,
    MANIFEST,
    BadLayout,
    Descriptor,
    Document,
    read_document,
)

MARK = canonical_json({"imageLayoutVersion": "1.0.0"})
INDEX_LIMIT = 128 << 20
TRIES = 10


class Place(Protocol):
    """What a layout needs of the files it lies in."""

    @property
    def where(self) -> str:
        """The place, as a message calls it."""
        ...

    def read(self, name: str, *, limit: int | None = None) -> bytes | None: ...

    def info(self, name: str) -> FileInfo | None: ...

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None: ...

    def alone(self) -> AbstractContextManager[bool]: ...


class Layout:
    """Reads and writes a layout. What is read is believed only as far as its digest reaches."""

    def __init__(self, files: Place) -> None:
        self.files = files

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
        if b'"1.0.0"' not in mark:
            raise BadLayout(f"the layout at {self.where} is not of version 1.0.0; upgrade Overpaint")
        return True

    def entries(self) -> list[Descriptor]:
        """What index.json lists. Raises BadLayout."""
        data = self.files.read("index.json", limit=INDEX_LIMIT)
        where = f"index.json of {self.where}"
        if data is None:
            raise BadLayout(f"{self.where} has no index.json; it is no layout, or a push to it was never finished")
        listed = read_document(data, where).get("manifests")
        if not isinstance(listed, list):
            raise BadLayout(f"{where} lists no manifests; nothing was taken from it")
        return [Descriptor.from_json(each, where) for each in listed]

    def document(self, descriptor: Descriptor) -> bytes:
        """A document, its size and digest checked. Raises BadLayout."""
        if descriptor.media_type not in (MANIFEST, INDEX) or descriptor.size > DOCUMENT_LIMIT:
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
        """Write a blob unless one of this size is there; return how many bytes were written."""
        known = self.files.info(_name(digest))
        if known is not None and known.nbytes == size:
            return 0
        self.files.write(_name(digest), as_digested(parts, digest))
        return size

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
