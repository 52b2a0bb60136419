"""Files in a local folder: a temporary neighbour, a byte count, both made durable, then a rename."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from overpaint.durable import sync
from overpaint.registry.faults import plain_disk_errors
from overpaint.registry.store.files import BadFile, FileInfo, Files, checked_parts, too_long

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
