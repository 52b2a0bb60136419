"""A folder of bytes, each under the SHA-256 of itself: written durably or not at all, checked whenever it is read."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from overpaint.errors import NotFound, OverpaintError
from overpaint.registry.faults import plain_disk_errors

DIGEST = re.compile(r"[0-9a-f]{64}")


class BlobMissing(NotFound):
    """A digest whose bytes are not in the store."""


class BlobCorrupt(OverpaintError):
    """Bytes that are no longer what their name says. They lie in quarantine."""


class BlobStore:
    """The blobs of a registry: `blobs/sha256/ab/<hex>`, and `quarantine/` for what went bad."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = folder / "blobs" / "sha256"
        self._quarantine = folder / "quarantine"

    def put(self, data: bytes) -> str:
        """Keep `data` and return its digest. On return it has reached the disk; on error no trace of it is left.

        What is there already is kept if it is sound, and replaced if it is not. Raises OverpaintError when the disk is
        full or read-only.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        with plain_disk_errors(self.folder):
            _make_folder(path.parent)
            if self._keeps(path, digest):
                _sync_folder(path.parent)  # whoever renamed it may not have got as far as this
            else:
                _write(path, data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes under `digest`, rehashed. Raises BlobMissing, or BlobCorrupt after the file went to quarantine."""
        path = self._path(digest)
        with plain_disk_errors(path):
            data = _read(path)
        if data is None:
            raise BlobMissing(self._missing(digest))
        if hashlib.sha256(data).hexdigest() != digest:
            raise BlobCorrupt(
                f"blob {digest} is damaged: its {len(data)} bytes no longer have this digest. "
                f"It was kept as {self._set_aside(path)}; solve or import the patch again"
            )
        return data

    def exists(self, digest: str) -> bool:
        """Whether a file of this name is there; only `get` knows whether it is sound."""
        return self._path(digest).is_file()

    def digests(self) -> Iterator[str]:
        """Every digest in the store, sorted. Leftover temporary files are not among them."""
        names = (path.name for path in self._shards.glob("??/*"))
        return iter(sorted(name for name in names if DIGEST.fullmatch(name)))

    def _path(self, digest: str) -> Path:
        if not DIGEST.fullmatch(digest):
            raise OverpaintError(f"{digest!r} is not a blob's digest; a digest is 64 hexadecimal digits")
        return self._shards / digest[:2] / digest

    def _keeps(self, path: Path, digest: str) -> bool:
        """Whether a sound file is at `path`; an unsound one is set aside, so that good bytes can take its place."""
        data = _read(path)
        if data is None:
            return False
        if hashlib.sha256(data).hexdigest() == digest:
            return True
        self._set_aside(path)
        return False

    def _set_aside(self, path: Path) -> Path:
        """Move a damaged file to quarantine; return where it lies now, which is where it was if it cannot be moved."""
        try:
            self._quarantine.mkdir(exist_ok=True)
            place = Path(tempfile.mkdtemp(dir=self._quarantine, prefix=f"{path.name[:12]}-")) / path.name
            os.replace(path, place)
        except OSError:
            return path
        return place

    def _missing(self, digest: str) -> str:
        damaged = next(self._quarantine.glob(f"*/{digest}"), None)
        hint = f"a damaged copy is {damaged}" if damaged else f"looked in {self._shards}"
        return f"blob {digest} is not in the registry ({hint}); solve or import the patch again, or restore a backup"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _make_folder(folder: Path) -> None:
    """Create `folder` and its parents so that they, too, survive a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _write(path: Path, data: bytes) -> None:
    """Write to a temporary neighbour, make it durable and read-only, then rename it into place."""
    with _temporary(path.parent) as (descriptor, temporary):
        _write_all(descriptor, data)
        os.fchmod(descriptor, 0o444)
        os.fsync(descriptor)
        os.replace(temporary, path)
    _sync_folder(path.parent)


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[int, Path]]:
    """An open file of a random name; closed afterwards, and removed if the block fails."""
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".tmp-")
    try:
        yield descriptor, Path(name)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # one call writes at most 2 GiB
        rest = rest[os.write(descriptor, rest) :]
    written = os.fstat(descriptor).st_size
    if written != len(data):
        raise OSError(f"{written} bytes arrived on the disk instead of {len(data)}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
