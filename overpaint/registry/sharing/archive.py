"""A layout in one file: a plain tar archive of plain files, reproducible to the byte.

Written for exactly one purpose, so that reading needs to allow nothing else: no links, no folders, no compression, no
extensions of the format, no name but those of a layout. Nothing is ever unpacked to the disk.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from overpaint.core.atomic import atomic_output, require_parent
from overpaint.registry.sharing.documents import BadLayout
from overpaint.registry.store import FileInfo
from overpaint.registry.store.files import too_long

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
