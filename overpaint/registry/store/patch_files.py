"""Patch files kept as their manifest and their arrays, each array once however many patches have it.

The blob of the manifest has the patch's id for its digest, and the blob of an array the digest that the manifest gives
it, so nothing but the id is needed to find all of it and to put the file together again, byte for byte.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from overpaint.registry.store.blobs import BlobCorrupt, BlobMissing, BlobStore, digest_of
from overpaint.registry.store.manifest import LIMIT, BadManifest, Manifest, read_json, read_manifest


@dataclass(frozen=True)
class Parts:
    """What a patch file consists of: its manifest, and the values of every array by name."""

    manifest: Manifest
    values: Mapping[str, memoryview | bytes]


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
    (length,) = struct.unpack("<Q", file[:8])
    if length > min(len(file) - 8, 3 * LIMIT):  # the header spells the manifest's quotation marks with two characters
        return None
    try:
        metadata = read_json(file[8 : 8 + length], "the header").get("__metadata__")
        text = metadata.get("overpaint") if isinstance(metadata, dict) else None
        return read_manifest(text.encode()) if isinstance(text, str) else None
    except (BadManifest, UnicodeEncodeError):
        return None


def joined(parts: Parts) -> bytes:
    """The patch file that `parts` make."""
    return b"".join([parts.manifest.head, *(parts.values[array.name] for array in parts.manifest.arrays)])
