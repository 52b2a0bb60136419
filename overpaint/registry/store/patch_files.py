"""Patch files kept as their manifest and their arrays, each array once however many patches have it.

The blob of the manifest has the patch's id for its digest, and the blob of an array the digest that the manifest gives
it, so nothing but the id is needed to find all of it and to put the file together again, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from overpaint.core.encoding import BYTES, DTYPE_NAMES, KEY, canonical_json, header_bytes, header_length, tensor_label
from overpaint.core.errors import OverpaintError
from overpaint.registry.store.blobs import DIGEST, BlobCorrupt, BlobMissing, BlobStore, digest_of

# The manifest of a patch, read without PyTorch: which arrays the patch has, and how they lie in its file.
#
# A patch file is a safetensors container: a header, with the manifest in its metadata, and then the arrays by name. All of
# that follows from the manifest and the arrays, so those are what a store keeps.


LIMIT = 8 << 20
"""The most bytes a manifest may have."""
CODES = {name: code for code, name in DTYPE_NAMES.items() if not code.startswith(("F8", "C"))}
"""The dtypes that arrays of a patch may have, as a safetensors header spells them."""
LARGEST = 1 << 40
LONGEST_NAME = 1000


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
    if len(raw) > LIMIT:
        raise BadManifest(f"a manifest has at most {LIMIT} bytes; this one has {len(raw)}")
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
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise BadManifest(f"the name of an array has 1 to {LONGEST_NAME} characters that print; got {shown!r}")
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
    if any(side > LARGEST for side in shape) or array.nbytes > LARGEST:
        raise BadManifest(f"the array {shown!r} claims to be larger than {LARGEST >> 30} GiB")
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
    if length > min(len(file) - 8, 3 * LIMIT):  # the header spells the manifest's quotation marks with two characters
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
