"""An OCI image layout: `oci-layout`, `index.json` and `blobs/sha256/<hex>` in a folder, behind a URL, or in one file.

An OCI registry and the Hugging Face Hub are places of a layout too: see `oci_registry` and `hub`.

One file is a plain tar archive of plain files, reproducible to the byte. It is written for exactly this purpose, so that reading
needs to allow nothing else: no links, no folders, no compression, no extensions of the format, no name but those of a layout.
Nothing is ever unpacked to the disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from overpaint.core.atomic import atomic_output, require_parent
from overpaint.core.encoding import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.core.names import quoted
from overpaint.registry.files import BadFile, FileInfo, Files, FolderFiles, too_long
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
from overpaint.registry.store import as_digested, open_files

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


BLOCK = 512
NAME = re.compile(r"oci-layout|index\.json|blobs/sha256/[0-9a-f]{64}")


class ArchiveReader:
    """The files of an archive, read where they are in it; every header is read at once. Raises BadLayout."""

    documents = "blobs/sha256"

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.where = where
        self._file = file
        self._places = dict(_places(file, where))

    def read(self, name: str, *, limit: int | None = None) -> bytes | None:
        """The content of a file, or None if there is none. Raises BadFile when it is longer than `limit` bytes."""
        if name not in self._places:
            return None
        start, size = self._places[name]
        if limit is not None and size > limit:
            raise too_long(f"{name} in {self.where}", size, limit)
        self._file.seek(start)
        return self._file.read(size)

    def info(self, name: str) -> FileInfo | None:
        """A file's size, or None if there is none."""
        return FileInfo(name, self._places[name][1], 0.0) if name in self._places else None

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None:
        """Nothing is written to an archive that is being read."""
        raise AssertionError("an archive is written by an ArchiveWriter")

    def exclusive(self) -> AbstractContextManager[bool]:
        """An archive is nobody else's."""
        return nullcontext(True)


class ArchiveWriter:
    """Writes files to an archive one after the other; the same files in the same order are the same bytes."""

    documents = "blobs/sha256"

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.where = where
        self._file = file
        self._sizes: dict[str, int] = {}

    def read(self, name: str, *, limit: int | None = None) -> bytes | None:
        """Nothing: what has been written is not looked at again."""
        return None

    def info(self, name: str) -> FileInfo | None:
        """The size of a file that was written already, or None."""
        return FileInfo(name, self._sizes[name], 0.0) if name in self._sizes else None

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None:
        """Append a file."""
        data = b"".join(chunks)
        entry = tarfile.TarInfo(name)  # of nobody, at no time: nothing but names and bytes
        entry.size, entry.mode = len(data), 0o644
        self._file.write(entry.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        self._file.write(data + bytes(-len(data) % BLOCK))
        self._sizes[name] = len(data)

    def exclusive(self) -> AbstractContextManager[bool]:
        """An archive is nobody else's."""
        return nullcontext(True)


@contextmanager
def new_archive(path: Path) -> Iterator[ArchiveWriter]:
    """An archive that is at `path`, whole and durable, when the block ends well, and not at all otherwise.

    Raises AlreadyExists when something is there, also when it came meanwhile; NotFound when there is no such folder.
    """
    path = path.absolute()
    require_parent(path)
    with atomic_output(path) as scratch, scratch.open("xb") as file:
        writer = ArchiveWriter(file, str(path))
        yield writer
        file.write(bytes(2 * BLOCK))  # what marks the end


def is_archive(beginning: bytes) -> bool:
    """Whether a file that begins like this may be an archive."""
    return beginning[257:262] == b"ustar"


def _places(file: BinaryIO, where: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every file's name, and where it begins and how long it is."""
    end = file.seek(0, os.SEEK_END)
    position, seen = 0, set[str]()
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if len(block) == BLOCK and not any(block):
            if file.read(BLOCK + 1) != bytes(BLOCK):
                raise BadLayout(f"{where} was cut short or goes on after its end; copy it again from its source")
            return
        entry = _entry(block, where)
        start = position + BLOCK
        position = start + entry.size + -entry.size % BLOCK
        if position > end:
            raise BadLayout(f"{where} ends in the middle of {entry.name}; it was not copied whole: copy it again")
        if entry.name in seen:
            raise BadLayout(
                f"{where} has {entry.name} twice; it was not made by Overpaint, and nothing was taken from it"
            )
        seen.add(entry.name)
        yield entry.name, (start, entry.size)


def _entry(block: bytes, where: str) -> tarfile.TarInfo:
    if len(block) < BLOCK:
        raise BadLayout(f"{where} ends too early; it was not copied whole: copy it again")
    try:
        entry = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise BadLayout(f"{where} is damaged ({error}); copy it again from its source") from error
    if entry.type != tarfile.REGTYPE or not NAME.fullmatch(entry.name) or entry.size < 0:
        shown = entry.name if len(entry.name) <= 80 else f"{entry.name[:77]}..."
        raise BadLayout(
            f"{where} holds {shown!r} of type {entry.type!r}, which has no place in an archive of Overpaint; it was not made "
            "by Overpaint, and nothing was taken from it"
        )
    return entry
