"""A file or folder that appears under its name whole or not at all: a new one (`atomic_output`), or in place of an old one.

It is written under a name of its own in the same folder, made durable, and renamed. A program that is killed leaves
something that ends in `.partial`; nothing takes that for a checkpoint, and it can be deleted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sqlite3
import stat
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.core.names import quoted


def sync(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on the disk. Raises OSError."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder, and writes names through by itself
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


MOST_FOLDERS = 100
"""How many folders above an output may be missing: more are no place that somebody meant."""


def missing_folders(folder: Path) -> list[Path]:
    """`folder` and those above it that are not there, the outermost first. Raises OverpaintError for too many."""
    missing = list(takewhile(lambda each: not os.path.isdir(each), (folder, *folder.parents)))
    if len(missing) > MOST_FOLDERS:
        raise OverpaintError(
            f"{len(missing):,} folders of {quoted(str(folder))} are not there, and at most {MOST_FOLDERS} are made for an "
            "output; check the path, or make them first"
        )
    return missing[::-1]


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents so that they survive a power cut, shared as `share` says. Raises OSError."""
    for each in missing_folders(folder):
        each.mkdir(exist_ok=True)
        share(each)
        sync(each.parent)


def share(path: Path) -> None:
    """Let the group use a new file or folder, whatever the umask, if the folder around it is a group's (setgid, writable)."""
    around, mode = path.parent.stat().st_mode, path.stat().st_mode
    if around & stat.S_ISGID and around & stat.S_IWGRP:
        path.chmod(stat.S_IMODE(mode) | (0o070 if stat.S_ISDIR(mode) else 0o060))


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock whose file is `path`; it dies with its holder, so it is never stale. Raises TimeoutError, sqlite3.Error.

    By SQLite, because that locks a file on every system, which no module of the standard library does.
    """
    new = not path.exists()
    with closing(sqlite3.connect(path, timeout=seconds, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise TimeoutError(f"{path} is locked") from error
            raise
        if new:
            share(path)
        yield


_HERE = -100
_NO_REPLACE = 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refuse_taken(out: Path) -> None:
    """Raise AlreadyExists when anything is at `out`, a dangling link too."""
    if os.path.lexists(out):
        raise AlreadyExists(f"{out} is already there; choose a new name, or remove it first")


@contextmanager
def atomic_output(out: Path) -> Iterator[Path]:
    """Within the block, a free name beside `out` at which to make a file or folder; at its end that becomes `out`.

    Raises AlreadyExists when something is at `out` before the block or by its end, OverpaintError when the disk is full
    or not writable. Then, and when the block raises, nothing is left behind, not even the folders made for it.
    """
    refuse_taken(out)
    made: list[Path] = []
    scratch = _scratch_name(out)
    try:
        _make_folders(out.parent, made)
        yield scratch
        _sync_tree(scratch)
        move_new(scratch, out)
        made.clear()
        with suppress(OSError):  # some file systems cannot sync a folder; then its durability is not ours to promise
            sync(out.parent)
    except OSError as error:
        raise _explained(out, error) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()


def _scratch_name(path: Path) -> Path:
    return path.with_name(f"{path.name[:150]}.{secrets.token_hex(6)}.partial")


@contextmanager
def replacing(
    path: Path,
    *,
    scratch: Path | None = None,
    durable: bool = False,
    mode: int | None = None,
    read_only: bool = False,
) -> Iterator[Path]:
    """Within the block, a free name beside `path` at which to write a file; at its end that takes the place of `path`.

    Who reads `path` meanwhile sees the old file or the new one. `scratch` is another name to use, in the same folder. What
    is `durable` is on the disk before it gets its name, and so is the name on return. With a `mode` the file is there from
    the beginning, and never readable by others meanwhile. Makes the folder; raises OSError.
    """
    scratch = scratch or _scratch_name(path)
    for folder in missing_folders(path.parent):
        folder.mkdir(exist_ok=True)
    try:
        if mode is not None:
            scratch.touch(mode, exist_ok=False)
        yield scratch
        if durable:
            sync(scratch)
        if read_only:
            scratch.chmod(stat.S_IMODE(scratch.stat().st_mode) & ~0o222)
        os.replace(scratch, path)
        if durable:
            sync(path.parent)
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def write_over(path: Path, content: bytes, *, durable: bool = False, mode: int | None = None) -> None:
    """Give a file new content at once (`replacing`). Raises OSError."""
    with replacing(path, durable=durable, mode=mode) as scratch:
        scratch.write_bytes(content)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet (`atomic_output`). Raises AlreadyExists, OverpaintError."""
    with atomic_output(path) as scratch:
        scratch.write_bytes(content)


def move_new(source: Path, target: Path) -> None:
    """Rename a file or folder unless something is at `target`, which raises AlreadyExists."""
    try:
        if not _rename_no_replace(source, target):
            # Systems without that call. A link is refused where a name is taken; a folder is renamed over nothing but an
            # empty folder.
            if source.is_dir():
                refuse_taken(target)
                source.rename(target)
            else:
                os.link(source, target)
                source.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise AlreadyExists(f"{target} appeared while it was being built; it was left as it is") from error
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise AlreadyExists(f"{target} appeared while it was being built; it was left as it is") from error
        raise


def _rename_no_replace(source: Path, target: Path) -> bool:
    """Linux's `renameat2` with RENAME_NOREPLACE; False where the system or the file system lacks it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(source), _HERE, os.fsencode(target), _NO_REPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(target))


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it, noting each that was not there."""
    for each in missing_folders(folder):
        each.mkdir()
        made.append(each)
        share(each)


def _sync_tree(path: Path) -> None:
    for inner in [*path.rglob("*"), path] if path.is_dir() else [path]:
        sync(inner)


def _explained(out: Path, error: OSError) -> OverpaintError:
    why = error.strerror or str(error)
    if error.errno in _FULL:
        return OverpaintError(
            f"there is no room for {out} ({why}); free some space or name another disk; nothing was left"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return OverpaintError(f"cannot write to {out.parent} ({why}); choose a folder you may write to")
    return OverpaintError(f"building {out} stopped ({why}); nothing was left behind")


def require_parent(path: Path) -> None:
    """Raise NotFound when the folder that `path` would be written in is not there: asked before long work."""
    if not path.absolute().parent.is_dir():
        raise NotFound(f"there is no folder {path.absolute().parent} to write {path.name} in; make it first")
