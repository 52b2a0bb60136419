"""An OCI image layout: `oci-layout`, `index.json` and `blobs/sha256/<hex>` in a folder, behind a URL, or in an archive.

An OCI registry and the Hugging Face Hub are places of a layout too: see `oci_registry` and `hub`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

from overpaint.core.encoding import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.core.names import quoted
from overpaint.registry.sharing.documents import (
    INDEX,
    INDEX_LIMIT,
    MANIFEST,
    MARK,
    BadLayout,
    Descriptor,
    Document,
    members_of,
    read_document,
)
from overpaint.registry.sharing.hub import Beside, HubFiles, is_hub
from overpaint.registry.sharing.oci_registry import RegistryFiles, is_registry
from overpaint.registry.store import BadFile, FileInfo, Files, open_files
from overpaint.registry.store.blobs import as_digested
from overpaint.registry.store.files import FolderFiles

DOCUMENT_LIMIT = 32 << 20
"""The most bytes a document may have."""
BLOBS = "blobs/sha256"
TRIES = 10
REHASHED = 1 << 20
"""The most bytes that a push reads back from behind a URL, unless asked to check all, to see that a blob is sound."""


class LayoutStore(Protocol):
    """What a layout needs of the place that has its files."""

    @property
    def where(self) -> str:
        """The place, as a message calls it."""
        ...

    @property
    def documents(self) -> str:
        """The folder of the documents: that of the blobs, but for a place that tells manifests from blobs."""
        ...

    def read(self, name: str, *, limit: int | None = None) -> bytes | None: ...

    def info(self, name: str) -> FileInfo | None: ...

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None: ...

    def exclusive(self) -> AbstractContextManager[bool]: ...


class OciLayout:
    """Reads and writes a layout. What is read is believed only as far as its digest reaches.

    What is written already is read again before it is believed: all of it in a folder or with `check`, and otherwise what
    has at most REHASHED bytes; of the rest the size must be right.
    """

    def __init__(self, files: LayoutStore, *, check: bool = False) -> None:
        self.files = files
        self._check = check or isinstance(files, FolderFiles)

    @classmethod
    def at(
        cls, location: str | Path, *, check: bool = False, overwrite: bool = False, beside: Beside = lambda entries: {}
    ) -> OciLayout:
        """The layout in a folder, behind a URL, in an OCI registry or on the Hub. Raises OverpaintError for what is neither.

        With `overwrite`, a tag of a registry may be moved away from something that is no layout. `beside` gives what a
        commit on the Hub has beside the layout.
        """
        if is_registry(location):
            return cls(RegistryFiles(str(location), overwrite=overwrite), check=check)
        if is_hub(location):
            return cls(HubFiles(str(location), beside=beside), check=check)
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
                f"{self.where} lists {descriptor.digest} as {quoted(descriptor.media_type)} of {descriptor.size} bytes, which is "
                "no document that this program reads"
            )
        return self._checked(f"{self.files.documents}/{descriptor.digest}", descriptor.digest, descriptor.size)

    def blob(self, digest: str, size: int) -> bytes:
        """A blob, its size and digest checked. Raises BadLayout."""
        return self._checked(f"{BLOBS}/{digest}", digest, size)

    def _checked(self, name: str, digest: str, size: int) -> bytes:
        try:
            data = self.files.read(name, limit=size)
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
        return self._put(f"{BLOBS}/{digest}", digest, size, parts)

    def _put(self, name: str, digest: str, size: int, parts: Iterable[bytes | memoryview]) -> int:
        known = self.files.info(name)
        if known is not None and known.nbytes == size and self._is_sound(name, digest, size):
            return 0
        self.files.write(name, as_digested(parts, digest))
        return size

    def _is_sound(self, name: str, digest: str, size: int) -> bool:
        if size > REHASHED and not self._check:
            return True
        data = self.files.read(name, limit=size)
        return data is None or hashlib.sha256(data).hexdigest() == digest  # None: an archive that is being written

    def put_document(self, document: Document) -> int:
        """Write a document unless it is there; return how many bytes were written."""
        described = document.descriptor
        name = f"{self.files.documents}/{described.digest}"
        return self._put(name, described.digest, described.size, [document.data])

    def begin(self) -> bool:
        """Mark the place as a layout; whether it was none before."""
        if self.is_there() or self.files.info(
            "oci-layout"
        ):  # the second for an archive, which is not read while it is written
            return False
        self.files.write("oci-layout", [MARK], final=False)
        return True

    def update(self, change: Callable[[list[Descriptor]], Iterable[Descriptor]]) -> None:
        """Let index.json list what `change` makes of what it lists; all that this names must be there already.

        Two pushes to one folder wait for each other. Behind a URL nobody can wait, so there it is looked at once more.
        """
        with self.files.exclusive() as exclusive:
            began = self.begin()
            try:
                for _ in range(TRIES):
                    wanted = sorted(change(self.listed()), key=lambda each: (each.artifact_type, each.digest))
                    content = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [each.as_json() for each in wanted]}
                    self.files.write("index.json", [canonical_json(content)], final=False)
                    if exclusive or self.listed() == wanted:
                        return
            except BaseException:
                if began and isinstance(self.files, Files):
                    with suppress(OverpaintError):
                        self.files.remove("oci-layout")
                raise
        raise BadLayout(f"others keep changing index.json of {self.where}; push again when they have ended")

    def listed(self) -> list[Descriptor]:
        """What index.json lists, or nothing while there is none."""
        return self.entries() if self.files.info("index.json") else []
