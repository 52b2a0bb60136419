"""What a store of blobs needs from a place that keeps files: whole files by name, durable when a write returns.

A place is a local folder, or anything that `fsspec` can reach: S3 and its kin, a server, another program's storage. Names are
relative, with "/" between their parts, and are made by this program from digests, never from what people type.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from overpaint.core.atomic import locked, make_folder, replacing, sync
from overpaint.core.errors import OverpaintError
from overpaint.core.names import printed_url, reported
from overpaint.registry.database import plain_database_errors, plain_disk_errors


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
    documents = "blobs/sha256"
    """The folder that the documents of a layout share with its blobs here."""

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

    def exclusive(self) -> AbstractContextManager[bool]:
        """Keep others who ask the same waiting, where the place can do that; whether it can."""
        return nullcontext(False)

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""


def checked_parts(name: str) -> list[str]:
    """The parts of a name. Raises BadFile for one that could lead out of its folder."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise BadFile(f"{name!r} is not the name of a file in a store")
    return parts


def too_long(what: str, nbytes: int, limit: int) -> BadFile:
    """The error for a file that is longer than it may be."""
    return BadFile(f"{what} has {nbytes} bytes, and at most {limit} belong there; it was not read")


TEMPORARY = ".tmp-"
LOCK, LOCK_SECONDS = ".lock", 600.0


class FolderFiles(Files):
    """The files below a folder, which is made when something is written.

    Written as a temporary neighbour; its content and length are made durable, then it is renamed.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.where = str(self.root)
        self._durable: dict[str, int] = {}  # the files whose names this object has made durable, and their inodes

    def read(self, name: str, *, limit: int | None = None) -> bytes | None:
        path = self._path(name)
        with plain_disk_errors(path, reading=True):
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
            make_folder(path.parent)
            temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
            with replacing(path, scratch=temporary, durable=True, read_only=final):
                _write_counted(temporary, chunks)
                inode = temporary.stat().st_ino
        self._durable[name] = inode

    def info(self, name: str) -> FileInfo | None:
        path = self._path(name)
        with plain_disk_errors(path, reading=True):
            try:
                status = path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return FileInfo(name, status.st_size, status.st_mtime) if stat.S_ISREG(status.st_mode) else None

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
        with plain_disk_errors(top, reading=True):
            for parent, _, names in os.walk(top):
                for name in names:
                    path = Path(parent) / name
                    with suppress(FileNotFoundError):  # it may be a temporary file that has just got its name
                        status = path.lstat()
                        if stat.S_ISREG(status.st_mode):
                            yield FileInfo(path.relative_to(self.root).as_posix(), status.st_size, status.st_mtime)

    def move(self, name: str, to: str) -> None:
        target = self._path(to)
        with plain_disk_errors(self.root):
            make_folder(target.parent)
            os.replace(self._path(name), target)
            sync(target.parent)

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """By a lock on a file in the folder, which dies with its holder."""
        with ExitStack() as held:
            with plain_disk_errors(self.root), plain_database_errors(self.root):
                make_folder(self.root)
                held.enter_context(locked(self.root / LOCK, LOCK_SECONDS))
            yield True

    def remove(self, name: str) -> None:
        with plain_disk_errors(self.root), suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def _path(self, name: str) -> Path:
        return self.root.joinpath(*checked_parts(name))


# Not every system has all of these.
OPEN_PLAIN = sum(getattr(os, flag, 0) for flag in ("O_RDONLY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def _open_plain(path: Path) -> int:
    """A descriptor of a plain file: following a link, or waiting at a pipe, is what a hostile folder would like."""
    try:
        descriptor = os.open(path, OPEN_PLAIN)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadFile(f"{path} is a symbolic link, and a plain file belongs there; put the file itself") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadFile(f"{path} is not a plain file; put the file itself there")
    return descriptor


def _write_counted(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Make a file of the mode that the umask allows. Raises OSError if one is there, or when bytes were lost."""
    given = 0
    with path.open("xb", buffering=0) as file:
        for chunk in chunks:
            rest = memoryview(chunk).cast("B")
            given += len(rest)
            while rest:  # one call writes at most 2 GiB
                rest = rest[os.write(file.fileno(), rest) :]
    written = path.stat().st_size
    if written != given:
        raise OSError(f"{written} bytes are on the disk instead of {given}")


# An object store shows an object when all of it is there. Elsewhere a file is visible while it is being written, so
# there it is written under another name first.
WHOLE_AT_ONCE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "memory"}
EXTRAS = {"s3": 'pip install "overpaint[s3]"', "s3a": 'pip install "overpaint[s3]"'}
TIMES = ("mtime", "LastModified", "last_modified", "modified", "updated", "created")


class Unreachable(OverpaintError):
    """A place behind a URL that does not answer, or refuses."""


class RemoteFiles(Files):
    """The files below a URL. Credentials come from where the URL's own package looks for them."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        scheme = scheme.lower()
        self._url = url = f"{scheme}://{rest}"
        self.where = printed_url(url).rstrip("/")
        self._at_once = scheme in WHOLE_AT_ONCE
        try:
            import fsspec  # type: ignore[import-untyped]

            # Listings are never taken from a cache: other programs write here too.
            if scheme == "ftp":  # what fsspec's destructor closes, also where no connection came about
                from ftplib import FTP

                fsspec.get_filesystem_class(scheme).ftp = FTP()
            self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            hint = EXTRAS.get(scheme, "install the package that `fsspec` names for it")
            reason = reported(str(error), url)
            raise OverpaintError(f"{scheme}:// cannot be reached ({reason}); {hint}, or name a folder") from None
        except Exception as error:  # some packages connect as soon as they are asked for
            raise self._unreachable(error) from None
        self._root = str(root).rstrip("/")

    def read(self, name: str, *, limit: int | None = None) -> bytes | None:
        path = self._path(name)
        with self._looking_for(name):
            if limit is not None:
                nbytes = self._fs.info(path)["size"]
                if nbytes is None:  # a server that does not say
                    with self._fs.open(path, "rb") as file:
                        data = bytes(file.read(limit + 1))
                    if len(data) <= limit:
                        return data
                    nbytes = len(data)
                if nbytes > limit:
                    raise too_long(f"{self.where}/{name}", nbytes, limit)
            return bytes(self._fs.cat_file(path))
        return None

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None:
        data = b"".join(chunks)
        path = self._path(name)
        temporary = path if self._at_once else f"{path}.tmp-{secrets.token_hex(8)}"
        with self._plain(name):
            self._make_folder(path)
            self._fs.pipe_file(temporary, data)
            written = int(self._fs.info(temporary)["size"])
            if written != len(data):
                raise OSError(f"{written} bytes are there instead of {len(data)}")
            if not self._at_once:
                self._fs.mv(temporary, path)

    def info(self, name: str) -> FileInfo | None:
        with self._looking_for(name):
            info = self._fs.info(self._path(name))
            if info["type"] == "file":
                return FileInfo(name, int(info["size"]), self._modified(info))
        return None

    def refresh(self, name: str) -> bool:
        return self.info(name) is not None  # what an object store has acknowledged is durable

    def walk(self, folder: str) -> Iterator[FileInfo]:
        entries: dict[str, Any] = {}
        # An object store lists everything in one go; elsewhere a folder that cannot be listed would be left out.
        all_or_nothing = {} if self._at_once else {"on_error": "raise"}
        with self._looking_for(folder):
            entries = self._fs.find(self._path(folder), detail=True, **all_or_nothing)
        for path, entry in entries.items():
            name = str(path).removeprefix(self._root).strip("/")
            yield FileInfo(name, int(entry["size"]), self._modified(entry))

    def move(self, name: str, to: str) -> None:
        target = self._path(to)
        with self._plain(name):
            self._make_folder(target)
            self._fs.mv(self._path(name), target)

    def remove(self, name: str) -> None:
        with self._looking_for(name):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return "/".join([self._root, *checked_parts(name)])

    def _make_folder(self, path: str) -> None:
        if not self._at_once:  # an object store has none, and s3fs would make a bucket
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _modified(self, entry: dict[str, Any]) -> float:
        for key in TIMES:
            value = entry.get(key)
            if isinstance(value, datetime):
                return value.timestamp()
            if isinstance(value, (int, float)):
                return float(value)
        moment: datetime = self._fs.modified(entry["name"])
        return moment.timestamp()

    @contextmanager
    def _plain(self, name: str) -> Iterator[None]:
        """Turn what the many packages behind `fsspec` raise into one error."""
        try:
            yield
        except OverpaintError:
            raise
        except Exception as error:  # each package has errors of its own, with no common root
            raise self._unreachable(error, f" for {name}") from None  # the cause may hold the credentials

    @contextmanager
    def _looking_for(self, name: str) -> Iterator[None]:
        """The same, where a file that is not there is no error."""
        with self._plain(name):
            try:
                yield
            except FileNotFoundError as error:
                if not _is_missing(error.__cause__):
                    raise (error.__cause__ or error) from None

    def _unreachable(self, error: Exception, purpose: str = "") -> Unreachable:
        reason = reported(str(error), self._url) or type(error).__name__
        if isinstance(error, NotImplementedError):
            reason = "this kind of place can only be read"
        return Unreachable(
            f"{self.where} cannot be used{purpose} ({reason}); check the address, the network and your credentials"
        )


def _is_missing(cause: BaseException | None) -> bool:
    """Whether a place said that a file is missing: `fsspec` says so too when nobody answered, or with another refusal."""
    from asyncio import TimeoutError as LateAnswer

    if type(cause).__module__.startswith("aiohttp"):
        return getattr(cause, "status", None) == 404
    return isinstance(cause, FileNotFoundError) or not isinstance(cause, (OSError, ValueError, LateAnswer))
