"""What a store of blobs needs from a place that keeps files: whole files by name, durable when a write returns.

A place is a local folder, the memory of this process, or anything that `fsspec` can reach. Names are relative, with "/"
between their parts, and are made by this program from digests, never from what people type.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from overpaint.errors import OverpaintError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class BadFile(OverpaintError):
    """Something that is not the plain file of a sensible size that was looked for."""


@dataclass(frozen=True)
class FileInfo:
    """A file's name, its size in bytes, and when it was last written, in seconds since 1970."""

    name: str
    nbytes: int
    modified: float


class Files(ABC):
    """Files by name. Every failure of the place behind them is an OverpaintError that says where it happened."""

    where: str
    """The place, as a message calls it."""

    @abstractmethod
    def read(self, name: str, *, limit: int | None = None) -> bytes | None:
        """The content of a file, or None if there is none. Raises BadFile when it is longer than `limit` bytes."""

    @abstractmethod
    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None:
        """Write a file whole or not at all, in place of any other; on return it is durable.

        An exception from `chunks` leaves nothing behind. What is `final` is never written again, so it becomes read-only
        where the place knows such a thing.
        """

    @abstractmethod
    def info(self, name: str) -> FileInfo | None:
        """What is known of a file without reading it, or None if there is none."""

    @abstractmethod
    def refresh(self, name: str) -> bool:
        """See that a file is durable and, where that is cheap, looks newly written; whether it was there."""

    @abstractmethod
    def walk(self, folder: str) -> Iterator[FileInfo]:
        """Every file below `folder`, temporary ones too, in no order."""

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Give a file another name."""

    def alone(self) -> AbstractContextManager[bool]:
        """Keep others who ask the same waiting, where the place can do that; whether it can."""
        return nullcontext(False)

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""


def open_files(location: str | Path) -> Files:
    """The files at a folder, a `file://` URL, or any other URL that `fsspec` knows.

    Raises OverpaintError for a URL of an unknown kind, or one whose package is not installed.
    """
    from overpaint.registry.store.folder import FolderFiles

    text = str(location)
    if text.startswith("file://"):
        return FolderFiles(Path(text.removeprefix("file://")))
    if isinstance(location, str) and URL.match(text):
        from overpaint.registry.store.remote import RemoteFiles

        return RemoteFiles(text)
    return FolderFiles(Path(location))


def checked_parts(name: str) -> list[str]:
    """The parts of a name. Raises BadFile for one that could lead out of its folder."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise BadFile(f"{name!r} is not the name of a file in a store")
    return parts


def too_long(what: str, nbytes: int, limit: int) -> BadFile:
    """The error for a file that is longer than it may be."""
    return BadFile(f"{what} has {nbytes} bytes, and at most {limit} belong there; it was not read")
