"""Where the bytes of patches are kept: blobs, and patch files as their manifest and their arrays, each array once.

A blob is bytes under the SHA-256 of itself: written durably or not at all, checked whenever it is read. The blob of a manifest
has the patch's id for its digest, and the blob of an array the digest that the manifest gives it, so nothing but the id is
needed to find all of a patch file and to put it together again, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overpaint.core.atomic import replacing
from overpaint.core.encoding import BYTES, DTYPE_NAMES, KEY, canonical_json, header_bytes, header_length, tensor_label
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import URL, has_credentials, typed_path, without_file_scheme
from overpaint.registry.database import plain_disk_errors
from overpaint.registry.files import TEMPORARY, FileInfo, Files, FolderFiles, RemoteFiles

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


# The manifest of a patch, read without PyTorch: which arrays the patch has, and how they lie in its file.
#
# A patch file is a safetensors container: a header, with the manifest in its metadata, and then the arrays by name. All of
# that follows from the manifest and the arrays, so those are what a store keeps.

MANIFEST_LIMIT = 8 << 20
"""The most bytes a manifest may have."""
CODES = {name: code for code, name in DTYPE_NAMES.items() if not code.startswith(("F8", "C"))}
"""The dtypes that arrays of a patch may have, as a safetensors header spells them."""
LARGEST_ARRAY = 1 << 40
LONGEST_ARRAY_NAME = 1000


class BadManifest(OverpaintError):
    """Bytes that are no manifest, or one that contradicts itself."""


@dataclass(frozen=True)
class Array:
    """One array of a patch as its manifest describes it; `digest` is over name, dtype, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def nbytes(self) -> int:
        """Size of the values, in bytes."""
        return math.prod(self.shape) * BYTES[CODES[self.dtype]]

    @property
    def label(self) -> bytes:
        """What is hashed before the values. Label and values are the array's blob, so its digest is the manifest's."""
        return tensor_label(self.name, self.dtype, self.shape)


@dataclass(frozen=True)
class Manifest:
    """A manifest's canonical bytes, what they say, and the arrays they list, sorted by name."""

    raw: bytes
    content: Mapping[str, Any]
    arrays: tuple[Array, ...]

    @property
    def id(self) -> str:
        """The id of the patch."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def head(self) -> bytes:
        """The beginning of the patch's file, up to the first array."""
        arrays = ((array.name, CODES[array.dtype], array.shape) for array in self.arrays)
        return header_bytes({KEY: self.raw.decode()}, arrays)

    def named(self, digest: str) -> list[Array]:
        """The arrays of this digest."""
        return [array for array in self.arrays if array.digest == digest]


def read_manifest(raw: bytes) -> Manifest:
    """Read a manifest. Raises BadManifest for bytes that are not canonical JSON, and for arrays that cannot be."""
    if len(raw) > MANIFEST_LIMIT:
        raise BadManifest(f"a manifest has at most {MANIFEST_LIMIT} bytes; this one has {len(raw)}")
    content = read_json(raw, "the manifest")
    listed = content.get("arrays")
    if not isinstance(listed, dict) or not listed:
        raise BadManifest("the manifest lists no arrays; take the patch from its source again")
    arrays = tuple(_array(name, listed[name]) for name in sorted(listed))
    try:
        if canonical_json(content) != raw:
            raise BadManifest("the manifest is not canonical JSON; take the patch from its source again")
    except (ValueError, RecursionError) as error:
        raise BadManifest(f"the manifest holds what JSON cannot express ({error})") from error
    return Manifest(raw, content, arrays)


def read_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises BadManifest for anything else."""
    try:
        content = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadManifest(f"{what} is not UTF-8 text; take it from its source again") from error
    except (ValueError, RecursionError) as error:
        raise BadManifest(f"{what} is not JSON ({error}); take it from its source again") from error
    if not isinstance(content, dict):
        raise BadManifest(f"{what} is not a JSON object; take it from its source again")
    return content


def _array(name: str, entry: Any) -> Array:
    shown = name if len(name) <= 80 else f"{name[:77]}..."
    if not name or len(name) > LONGEST_ARRAY_NAME or not name.isprintable():
        raise BadManifest(f"the name of an array has 1 to {LONGEST_ARRAY_NAME} characters that print; got {shown!r}")
    if name == "__metadata__" or not isinstance(entry, dict):
        raise BadManifest(f"the manifest's array {shown!r} has no description; take the patch from its source again")
    dtype, shape, digest = entry.get("dtype"), entry.get("shape"), entry.get("digest")
    if not isinstance(dtype, str) or dtype not in CODES:
        raise BadManifest(f"the array {shown!r} has the dtype {dtype!r}, which no patch has")
    if not isinstance(shape, list) or any(type(side) is not int or side < 0 for side in shape) or len(shape) > 16:
        raise BadManifest(f"the array {shown!r} has no sensible shape; take the patch from its source again")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise BadManifest(f"the array {shown!r} has no digest of 64 hexadecimal digits")
    array = Array(name, dtype, tuple(shape), digest)
    if any(side > LARGEST_ARRAY for side in shape) or array.nbytes > LARGEST_ARRAY:
        raise BadManifest(f"the array {shown!r} claims to be larger than {LARGEST_ARRAY >> 30} GiB")
    return array


@dataclass(frozen=True)
class Parts:
    """What a patch file consists of: its manifest, and the values of every array by name."""

    manifest: Manifest
    values: Mapping[str, memoryview | bytes]


@contextmanager
def bytes_of_patch(id: str, concept: str) -> Iterator[None]:
    """Within the block, what is raised for lost or damaged bytes names the patch that needs them."""
    try:
        yield
    except (BlobMissing, BlobCorrupt) as error:
        message = f"the bytes of patch {id[:12]} for {concept!r} cannot be read ({error})"
        raise (BlobCorrupt(message, error.found) if isinstance(error, BlobCorrupt) else BlobMissing(message)) from error


class PatchFiles:
    """The patch files in a store, by the patch's id and the digest of the whole file.

    What is not a patch file in its canonical form is kept whole, under its own digest; so are the files that earlier
    versions put there.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self.blobs = blobs

    def put(self, id: str, file: bytes) -> None:
        """Keep a patch file: the arrays that are not there yet, then the manifest. Durable on return."""
        parts = split(file)
        whole = hashlib.sha256(file).hexdigest()
        if parts is None or parts.manifest.id != id or self.blobs.exists(whole):
            self.blobs.put(file)
            return
        for array in parts.manifest.arrays:
            self.blobs.put(array.label, parts.values[array.name])
        self.blobs.put(parts.manifest.raw)

    def get(self, id: str, digest: str) -> bytes:
        """The file of a patch, every part of it rehashed, and the whole too. Raises BlobMissing or BlobCorrupt."""
        if id == digest or not self.blobs.exists(id):
            return self.blobs.get(digest)
        file = b"".join(self.stream(id))
        if hashlib.sha256(file).hexdigest() != digest:
            raise BlobCorrupt(
                f"the parts of patch {id} are sound, but they make another file than {digest}; "
                "the registry's row is damaged: restore a backup"
            )
        return file

    def holds(self, id: str, digest: str) -> bool:
        """Whether every part of a patch's file is there; only `get` knows whether it is sound."""
        if self.blobs.exists(digest):
            return True
        try:
            return all(self.blobs.exists(array.digest) for array in self.manifest(id).arrays)
        except BlobMissing:
            return False

    def manifest(self, id: str) -> Manifest:
        """The manifest of a patch that is kept in parts. Raises BlobMissing or BlobCorrupt."""
        return read_manifest(self.blobs.get(id))

    def stream(self, id: str) -> Iterator[bytes]:
        """The file of a patch that is kept in parts, one part after the other. Raises BlobMissing or BlobCorrupt."""
        manifest = self.manifest(id)
        yield manifest.head
        for array in manifest.arrays:
            blob = self.blobs.get(array.digest)
            if not blob.startswith(array.label):
                raise BlobCorrupt(f"blob {array.digest} is sound, but it is not the array {array.name} of patch {id}")
            yield blob[len(array.label) :]


def split(file: bytes) -> Parts | None:
    """The parts of a patch file from which `Parts` makes the same bytes again, or None if it has no such parts."""
    manifest = embedded_manifest(file)
    if manifest is None or file[: len(manifest.head)] != manifest.head:
        return None
    values, offset = {}, len(manifest.head)
    for array in manifest.arrays:
        values[array.name] = memoryview(file)[offset : offset + array.nbytes]
        offset += array.nbytes
        if digest_of((array.label, values[array.name])) != array.digest:
            return None
    return Parts(manifest, values) if offset == len(file) else None


def embedded_manifest(file: bytes) -> Manifest | None:
    """The manifest in the header of a safetensors file, or None if there is none that makes sense."""
    if len(file) < 8:
        return None
    length = header_length(file)
    if length > min(
        len(file) - 8, 3 * MANIFEST_LIMIT
    ):  # the header spells the manifest's quotation marks with two characters
        return None
    try:
        metadata = read_json(file[8 : 8 + length], "the header").get("__metadata__")
        text = metadata.get(KEY) if isinstance(metadata, dict) else None
        return read_manifest(text.encode()) if isinstance(text, str) else None
    except (BadManifest, UnicodeEncodeError):
        return None


def joined(parts: Parts) -> bytes:
    """The patch file that `parts` make."""
    return b"".join([parts.manifest.head, *(parts.values[array.name] for array in parts.manifest.arrays)])
