"""A weight file written again with some tensors replaced and others left out, in one pass, at the speed of a copy.

The header comes first: everything in it has a known length, so its digests are filled in at the end. Tensors follow in
file order. What lies between two changed tensors is copied by the kernel as one piece, and a file system that can share
blocks shares them; memory holds one changed tensor at a time.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from overpaint.bases.container import BrokenFile, Container, Entry
from overpaint.bases.digests import raw_bytes, tensor_digest
from overpaint.bases.files import Place
from overpaint.bases.gathered import GatheredContainer
from overpaint.patches.record import metadata_with

CHUNK = 8 << 20
BLOCK = 4096
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Rewrite:
    """How a file is written again: where each tensor to replace lies, by canonical name, and the keys to leave out."""

    source: Container
    replaced: Mapping[str, Place]
    dropped: frozenset[str] = field(default_factory=frozenset)

    def header(self, record: Mapping[str, Any]) -> bytes:
        """The new header with its length in front. Records that differ in digests alone give equal lengths."""
        header: dict[str, Any] = {"__metadata__": metadata_with(self.source.metadata, record)}
        position = 0
        for key, entry in self.source.entries.items():
            if key not in self.dropped:
                offsets = [position, position + entry.size]
                header[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
                position += entry.size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # Whole blocks apart from where they were, bytes can be shared or copied page by page.
        text += b" " * ((self.source.data_start - 8 - len(text)) % BLOCK)
        return struct.pack("<Q", len(text)) + text

    def write(self, target: Path, record: Mapping[str, Any], value: Callable[[str], Tensor]) -> dict[str, str]:
        """Write a new file; returns the digest of each new value by canonical name, which `seal` needs."""
        digests = {}
        with ExitStack() as opened:
            source = self.source
            reader = None
            if not isinstance(source, GatheredContainer):
                reader = opened.enter_context(source.path.open("rb", buffering=0))
            writer = opened.enter_context(target.open("xb", buffering=0))
            head = self.header(record)
            write_all(writer.fileno(), head, 0)
            position = len(head)
            for name, start, size in self._pieces():
                if name is not None:
                    tensor = value(name)
                    assert tensor.nbytes == size, name
                    digests[name] = tensor_digest(name, tensor)
                    write_all(writer.fileno(), raw_bytes(self.replaced[name].stored(tensor)), position)
                elif isinstance(source, GatheredContainer):
                    copy_gathered(source, writer.fileno(), start, position, size)
                elif reader is not None:
                    copy_range(reader.fileno(), writer.fileno(), start, position, size)
                position += size
        return digests

    def seal(self, target: Path, record: Mapping[str, Any]) -> None:
        """Write the header again, with a record that has the true digests in place of equally long ones."""
        head = self.header(record)
        with target.open("r+b", buffering=0) as writer:
            assert writer.read(8) == head[:8]
            write_all(writer.fileno(), head, 0)

    def _pieces(self) -> Iterator[tuple[str | None, int, int]]:
        """The bytes to write in order: a changed tensor's name, or None for a run of bytes to copy; start and size."""
        gone: list[tuple[str | None, Entry]] = [(None, self.source.entries[key]) for key in self.dropped]
        gone += [(name, place.entry) for name, place in self.replaced.items()]
        position = self.source.data_start
        for name, entry in sorted(gone, key=lambda item: (item[1].start, item[1].size)):
            if entry.start > position:
                yield None, position, entry.start - position
            if name is not None:
                yield name, entry.start, entry.size
            position = entry.start + entry.size
        end = max((entry.start + entry.size for entry in self.source.entries.values()), default=position)
        if end > position:
            yield None, position, end - position


def copy_file(source: Path, target: Path) -> None:
    """A whole file as it is, under a new name."""
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        copy_range(reader.fileno(), writer.fileno(), 0, 0, os.fstat(reader.fileno()).st_size)


def copy_gathered(source: GatheredContainer, target: int, start: int, at: int, size: int) -> None:
    """What `copy_range` does, from a file that is not there."""
    for piece in source.pieces(start, size):
        write_all(target, raw_bytes(piece), at)
        at += len(piece)


def copy_range(source: int, target: int, start: int, at: int, size: int) -> None:
    """Copy bytes between open files within the kernel, or by hand where it cannot. Raises BrokenFile at an early end."""
    end = start + size
    by_kernel = hasattr(os, "copy_file_range")
    while start < end:
        moved, ask = 0, end - start
        if start % BLOCK == at % BLOCK:
            # Up to a block's beginning, then whole blocks, then the rest: only whole blocks can be shared.
            ask = min(-start % BLOCK, ask) or ask - ask % BLOCK or ask
        if by_kernel:
            try:
                moved = os.copy_file_range(source, target, ask, start, at)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
        if not moved:
            by_kernel = False
            data = os.pread(source, min(ask, CHUNK), start)
            if not data:
                raise BrokenFile("a weight file of the base ended early; it is cut short: download the base again")
            write_all(target, data, at)
            moved = len(data)
        start, at = start + moved, at + moved


def write_all(target: int, data: bytes | memoryview, at: int) -> None:
    """Write every byte at a position; one call may write fewer."""
    view = memoryview(data)
    while view:
        written = os.pwrite(target, view[:CHUNK], at)
        view, at = view[written:], at + written
