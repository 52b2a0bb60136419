"""Import: what one file has, an archive that `overpaint export` wrote or a single patch file, into a registry."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import BinaryIO

from overpaint.errors import NotFound, OverpaintError
from overpaint.registry.faults import plain_disk_errors
from overpaint.registry.registry import Registry
from overpaint.registry.store import PatchFiles
from overpaint.registry.store.manifest import LIMIT as MANIFEST_LIMIT
from overpaint.registry.store.patch_files import split
from overpaint.transport.archive import BLOCK, ArchiveReader, is_archive
from overpaint.transport.arriving import arrival, keep
from overpaint.transport.layout import Layout
from overpaint.transport.reading import PATCH_LIMIT, refuse_odd
from overpaint.transport.receiving import Received, Request, bases_of, receive, whole_here
from overpaint.transport.signing import Untrusted


class BadFileKind(OverpaintError):
    """A file that is neither an archive nor a patch file."""


def import_file(registry: Registry, file: Path, request: Request) -> Received:
    """Take what is asked for from a file.

    Nothing is unpacked, and nothing is ever executed: a file is read as an archive, as a patch file, or not at all. Raises
    NotFound when there is no such file, BadFileKind when it is neither, and what `pull` raises.
    """
    if not file.is_file():
        raise NotFound(f"there is no file {file}; name one that `overpaint export` wrote, or a patch file")
    with plain_disk_errors(file), file.open("rb") as opened:
        beginning = opened.read(BLOCK)
        if is_archive(beginning):
            return receive(registry, Layout(ArchiveReader(opened, str(file))), request)
        data = _patch_file(opened, beginning, file)
    if request.trusted is not None:
        raise Untrusted(f"{file} is a bare patch file, which carries no signature; nothing was taken")
    return _import_patch(registry, data, file, request)


def _patch_file(opened: BinaryIO, beginning: bytes, path: Path) -> bytes:
    """The bytes of a file that may be a patch file: its header's length and its size are sensible. Raises BadFileKind."""
    nbytes = path.stat().st_size
    (length,) = struct.unpack("<Q", beginning[:8].ljust(8, b"\xff"))
    if length > min(nbytes - 8, 3 * MANIFEST_LIMIT) or not beginning[8:9] == b"{":
        raise BadFileKind(
            f"{path} is neither an archive that `overpaint export` wrote nor a patch file; nothing in it was read further"
        )
    if nbytes > PATCH_LIMIT:
        raise BadFileKind(f"{path} has {nbytes} bytes, and a patch has at most {PATCH_LIMIT}; nothing was taken")
    opened.seek(0)
    return opened.read(nbytes)


def _import_patch(registry: Registry, data: bytes, path: Path, request: Request) -> Received:
    parts = split(data)
    if parts is None:
        raise BadFileKind(
            f"{path} looks like a safetensors file, but it is not the sound file of a patch: its manifest is missing, or "
            "does not fit what follows it; take it from its source again"
        )
    refuse_odd(parts.manifest)
    row = arrival(parts.manifest)
    bases, files = bases_of(registry, [row.fingerprint]), PatchFiles(registry.blobs)
    if whole_here(registry, files, [row.id]):
        return Received((), (row.id,), (), 0)
    request.check(data)
    files.put(row.id, data)
    keep(registry, row, hashlib.sha256(data).hexdigest(), bases[row.fingerprint], request.notice)
    return Received((row.id,), (), (), len(data))
