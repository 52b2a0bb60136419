"""Where the bytes of patches are kept: blobs by digest, in a folder or behind a URL; patch files as arrays kept once."""

from __future__ import annotations

from overpaint.registry.store.blobs import (
    DIGEST,
    Blob,
    BlobCorrupt,
    BlobMissing,
    BlobStore,
    open_files,
    open_store,
    place_store,
)
from overpaint.registry.store.files import BadFile, FileInfo, Files
from overpaint.registry.store.patch_files import PatchFiles

__all__ = [
    "DIGEST",
    "BadFile",
    "Blob",
    "BlobCorrupt",
    "BlobMissing",
    "BlobStore",
    "FileInfo",
    "Files",
    "PatchFiles",
    "open_files",
    "open_store",
    "place_store",
]
