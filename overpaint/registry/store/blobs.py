"""Bytes, each under the SHA-256 of itself: written durably or not at all, checked whenever they are read."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from overpaint.core.atomic import replacing
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import typed_path
from overpaint.core.urls import URL, has_credentials, without_file_scheme
from overpaint.registry.db_errors import plain_disk_errors
from overpaint.registry.store.files import TEMPORARY, FileInfo, Files, FolderFiles, RemoteFiles

DIGEST = re.compile(r"[0-9a-f]{64}")
SHARDS = "blobs/sha256"
QUARANTINE = "quarantine"
ELSEWHERE = "blobs.url"
"""A file with a URL in a registry's folder: its blobs are kept there."""


class BlobMissing(NotFound):
    """A digest whose bytes are not in the store."""


class BlobCorrupt(OverpaintError):
    """Bytes that are no longer what their name says. They are in quarantine; `found` is what they are now."""

    def __init__(self, message: str, found: bytes = b"") -> None:
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class Blob:
    """A blob's digest, its size in bytes, and when it was last put, in seconds since 1970."""

    digest: str
    nbytes: int
    modified: float


def open_files(location: str | Path) -> Files:
    """The files at a folder, a `file://` URL, or any other URL that `fsspec` knows.

    Raises OverpaintError for a URL of an unknown kind, one whose package is not installed, and what names no place.
    """
    text = without_file_scheme(str(location)) if isinstance(location, (str, Path)) else ""
    if not text.strip():
        raise OverpaintError(f"a folder or a URL is needed, and {location!r} is none; name one")
    return RemoteFiles(text) if isinstance(location, str) and URL.match(text) else FolderFiles(typed_path(text))


def open_store(folder: Path) -> BlobStore:
    """The blobs of the registry in `folder`: in the folder itself, or at the URL in its file `blobs.url`.

    Raises OverpaintError when that URL is of a kind that cannot be reached.
    """
    pointer = open_files(folder).read(ELSEWHERE, limit=10_000)
    return BlobStore(open_files(folder if pointer is None else pointer.decode("utf-8", "replace").strip()))


def place_store(folder: Path, url: str) -> BlobStore:
    """Let the registry in `folder` keep its blobs at `url` from now on.

    Raises OverpaintError when the place cannot be used, or when the registry has blobs already: those would be lost to it.
    """
    here = open_store(folder)
    if here.files.where != open_files(url).where and next(here.blobs(), None) is not None:
        raise OverpaintError(
            f"the registry at {folder} has blobs in {here.files.where} already; make a new registry, and push to it"
        )
    store = BlobStore(open_files(url))
    probe = store.put(b"overpaint\n")  # a place that cannot be written or read is found out now
    store.get(probe)
    store.discard(probe)
    _write_pointer(folder, url)
    return store


def _write_pointer(folder: Path, url: str) -> None:
    if not has_credentials(url):
        return open_files(folder).write(ELSEWHERE, [f"{url}\n".encode()], final=False)
    with plain_disk_errors(folder):  # a file of mode 0600 from the beginning, so that nobody else can ever read it
        temporary = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        with replacing(folder / ELSEWHERE, scratch=temporary, durable=True, mode=0o600):
            temporary.write_text(f"{url}\n", "utf-8")


class BlobStore:
    """The blobs of a registry: `blobs/sha256/ab/<hex>`, and `quarantine/` for what went bad."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def put(self, *parts: bytes | memoryview) -> str:
        """Keep the bytes of `parts`, one after the other, and return their digest; on return they are durable.

        On error no trace of them is left. What is there already is kept if it is sound, and replaced if it is not. Raises
        OverpaintError when the place is full, read-only or out of reach.
        """
        digest = digest_of(parts)
        name = _name(digest)
        if not self._keeps(name, digest):
            self.files.write(name, as_digested(parts, digest))
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes under `digest`, rehashed. Raises BlobMissing, or BlobCorrupt after they went to quarantine."""
        data = self.files.read(_name(digest))
        if data is None:
            raise BlobMissing(self.missing(digest))
        if hashlib.sha256(data).hexdigest() != digest:
            raise BlobCorrupt(
                f"blob {digest} is damaged: its {len(data)} bytes no longer have this digest. "
                f"It was kept as {self._set_aside(digest)}; solve or import the patch again",
                data,
            )
        return data

    def exists(self, digest: str) -> bool:
        """Whether a file of this name is there; only `get` knows whether it is sound."""
        return self.files.info(_name(digest)) is not None

    def find(self, digest: str) -> Blob | None:
        """A blob's size and age without reading it, or None."""
        info = self.files.info(_name(digest))
        return None if info is None else Blob(digest, info.nbytes, info.modified)

    def blobs(self) -> Iterator[Blob]:
        """Every blob of the store, in no order."""
        for info in self.files.walk(SHARDS):
            digest = info.name.rpartition("/")[2]
            if DIGEST.fullmatch(digest):
                yield Blob(digest, info.nbytes, info.modified)

    def digests(self) -> Iterator[str]:
        """Every digest in the store, sorted. Leftover temporary files are not among them."""
        return iter(sorted(blob.digest for blob in self.blobs()))

    def leftovers(self) -> Iterator[FileInfo]:
        """The temporary files of writers that are at work, or were killed."""
        return (info for info in self.files.walk(SHARDS) if ".tmp-" in info.name.rpartition("/")[2])

    def discard(self, digest: str) -> None:
        """Remove a blob for good. Only the collector of garbage does this, when no row names it."""
        self.files.remove(_name(digest))

    def _keeps(self, name: str, digest: str) -> bool:
        """Whether sound bytes are there; unsound ones are set aside, so that good ones can take their place."""
        data = self.files.read(name)
        if data is None:
            return False
        if hashlib.sha256(data).hexdigest() == digest:
            return self.files.refresh(name)
        self._set_aside(digest)
        return False

    def _set_aside(self, digest: str) -> str:
        """Move a damaged blob to quarantine; return where it is now, which is where it was if it cannot be moved."""
        place = f"{QUARANTINE}/{digest[:12]}-{secrets.token_hex(4)}/{digest}"
        try:
            self.files.move(_name(digest), place)
        except OverpaintError:
            return f"{self.files.where}/{_name(digest)}"
        return f"{self.files.where}/{place}"

    def missing(self, digest: str) -> str:
        """What to say of a blob that is not there."""
        damaged = next((info.name for info in self.files.walk(QUARANTINE) if info.name.endswith(f"/{digest}")), None)
        where = self.files.where
        hint = f"a damaged copy is {where}/{damaged}" if damaged else f"looked in {where}/{SHARDS}"
        return f"blob {digest} is not in the registry ({hint}); solve or import the patch again, or restore a backup"


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """sha256 of the bytes of `parts`, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def as_digested(parts: Iterable[bytes | memoryview], digest: str) -> Iterator[bytes | memoryview]:
    """`parts` as they come, hashed on the way. Raises BlobCorrupt at their end if they are not what `digest` says."""
    digest_now = hashlib.sha256()
    for part in parts:
        digest_now.update(part)
        yield part
    if digest_now.hexdigest() != digest:
        raise BlobCorrupt(f"the bytes of blob {digest} changed while they were written; nothing was kept")


def _name(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise OverpaintError(f"{digest!r} is not a blob's digest; a digest is 64 hexadecimal digits")
    return f"{SHARDS}/{digest[:2]}/{digest}"
