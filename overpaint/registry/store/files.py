"""Files in the memory of this process: for tests, and for trying things out."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from overpaint.core.atomic import sync
from overpaint.core.errors import OverpaintError
from overpaint.registry.db_errors import plain_disk_errors

# What a store of blobs needs from a place that keeps files: whole files by name, durable when a write returns.
#
# A place is a local folder, the memory of this process, or anything that `fsspec` can reach. Names are relative, with "/"
# between their parts, and are made by this program from digests, never from what people type.


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


# Files in a local folder: a temporary neighbour, a byte count, both made durable, then a rename.


TEMPORARY = ".tmp-"


class FolderFiles(Files):
    """The files below a folder, which is made when something is written."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.where = str(self.root)
        self._durable: dict[str, int] = {}  # the files whose names this object has made durable, and their inodes

    def read(self, name: str, *, limit: int | None = None) -> bytes | None:
        path = self._path(name)
        with plain_disk_errors(path):
            try:
                descriptor = _open_plain(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            with os.fdopen(descriptor, "rb") as file:
                nbytes = os.fstat(descriptor).st_size
                if limit is not None and nbytes > limit:
                    raise too_long(str(path), nbytes, limit)
                return file.read() if limit is None else file.read(limit)

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None:
        path = self._path(name)
        with plain_disk_errors(self.root):
            _make_folder(path.parent)
            with _temporary(path.parent) as (descriptor, temporary):
                _write_all(descriptor, chunks)
                if final:
                    os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) & ~0o222)
                os.fsync(descriptor)
                os.replace(temporary, path)
                inode = os.fstat(descriptor).st_ino
            sync(path.parent)
        self._durable[name] = inode

    def info(self, name: str) -> FileInfo | None:
        path = self._path(name)
        with plain_disk_errors(path):
            try:
                found = path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return FileInfo(name, found.st_size, found.st_mtime) if stat.S_ISREG(found.st_mode) else None

    def refresh(self, name: str) -> bool:
        path = self._path(name)
        with plain_disk_errors(path):
            try:
                # Another user's file cannot be made to look new, which only makes a collection of it possible earlier.
                with suppress(PermissionError):
                    os.utime(path)
                inode = path.stat().st_ino
                if self._durable.get(name) != inode:
                    sync(path.parent)  # whoever renamed it may not have got as far as this
                    self._durable[name] = inode
            except FileNotFoundError:
                return False
        return True

    def walk(self, folder: str) -> Iterator[FileInfo]:
        top = self._path(folder)
        with plain_disk_errors(top):
            for parent, _, names in os.walk(top):
                for name in names:
                    path = Path(parent) / name
                    with suppress(FileNotFoundError):  # it may be a temporary file that has just got its name
                        found = path.lstat()
                        if stat.S_ISREG(found.st_mode):
                            yield FileInfo(path.relative_to(self.root).as_posix(), found.st_size, found.st_mtime)

    def move(self, name: str, to: str) -> None:
        target = self._path(to)
        with plain_disk_errors(self.root):
            _make_folder(target.parent)
            os.replace(self._path(name), target)
            sync(target.parent)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """By a lock on the folder itself, which dies with its holder and leaves nothing behind."""
        with plain_disk_errors(self.root):
            _make_folder(self.root)
            descriptor = os.open(self.root, os.O_RDONLY)
        try:
            with plain_disk_errors(self.root):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield True
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        with plain_disk_errors(self.root), suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def _path(self, name: str) -> Path:
        return self.root.joinpath(*checked_parts(name))


def _open_plain(path: Path) -> int:
    """A descriptor of a plain file: following a link, or waiting at a pipe, is what a hostile folder would like."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadFile(f"{path} is a symbolic link, and a plain file belongs there; put the file itself") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadFile(f"{path} is not a plain file; put the file itself there")
    return descriptor


def _make_folder(folder: Path) -> None:
    """Create `folder` and its parents so that they, too, survive a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[int, Path]]:
    """An open file of a random name, of the mode the umask allows; closed afterwards, and removed if the block fails."""
    path = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor, path
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, chunks: Iterable[bytes | memoryview]) -> None:
    given = 0
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        given += len(rest)
        while rest:  # one call writes at most 2 GiB
            rest = rest[os.write(descriptor, rest) :]
    written = os.fstat(descriptor).st_size
    if written != given:
        raise OSError(f"{written} bytes arrived on the disk instead of {given}")


class MemoryFiles(Files):
    """Files that are gone when the object is."""

    where = "memory"

    def __init__(self) -> None:
        self._content: dict[str, tuple[bytes, float]] = {}

    def read(self, name: str, *, limit: int | None = None) -> bytes | None:
        data, _ = self._content.get(_checked(name), (None, 0.0))
        if data is not None and limit is not None and len(data) > limit:
            raise too_long(name, len(data), limit)
        return data

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None:
        self._content[_checked(name)] = b"".join(chunks), time.time()

    def info(self, name: str) -> FileInfo | None:
        if _checked(name) not in self._content:
            return None
        data, modified = self._content[name]
        return FileInfo(name, len(data), modified)

    def refresh(self, name: str) -> bool:
        if _checked(name) not in self._content:
            return False
        self._content[name] = self._content[name][0], time.time()
        return True

    def walk(self, folder: str) -> Iterator[FileInfo]:
        below = f"{_checked(folder)}/"
        for name, (data, modified) in list(self._content.items()):
            if name.startswith(below):
                yield FileInfo(name, len(data), modified)

    def move(self, name: str, to: str) -> None:
        self._content[_checked(to)] = self._content.pop(_checked(name))

    def remove(self, name: str) -> None:
        self._content.pop(_checked(name), None)


def _checked(name: str) -> str:
    checked_parts(name)
    return name
