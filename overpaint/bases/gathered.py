"""A container whose file is not there: the safetensors file that some tensors would be, gathered when they are read.

So all that reads a base, and all that writes one, has one kind of container to deal with.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from overpaint.bases.container import DTYPES, Container, Entry
from overpaint.bases.digests import raw_bytes

DATA_START = 4096
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def laid_out(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> dict[str, Entry]:
    """Entries one after the other. Raises KeyError for a dtype that the format lacks."""
    entries, position = {}, DATA_START
    for key, dtype, shape in tensors:
        size = torch.Size(shape).numel() * dtype.itemsize
        entries[key] = Entry(_CODES[dtype], shape, position, size)
        position += size
    return entries


@dataclass(frozen=True)
class GatheredContainer(Container):
    """The root of such containers. They say what lies at a key; places follow from `entries`."""

    def stored(self, key: str) -> Iterator[Tensor]:
        """The tensors whose bytes, one after the other, are those of a key."""
        raise NotImplementedError

    def read(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            yield name, self._values(entry, entry.size).reshape(entry.shape)

    def beginning(self, entry: Entry, values: int) -> Tensor:
        return self._values(entry, min(entry.size, values * DTYPES[entry.dtype].itemsize))

    def passing(self, entries: Mapping[str, Entry]) -> Generator[tuple[str, memoryview], None, None]:
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            for piece in self.pieces(entry.start, entry.size):
                yield name, raw_bytes(piece)

    def pieces(self, start: int, size: int) -> Iterator[Tensor]:
        """The bytes from `start` on, a tensor at a time."""
        starts, keys = self._starts
        at = bisect_right(starts, start) - 1
        while size:
            position = starts[at]
            for tensor in self.stored(keys[at]):
                flat = tensor.contiguous().reshape(-1).view(torch.uint8)
                piece = flat[max(start - position, 0) :][:size]
                position += len(flat)
                if len(piece):
                    yield piece
                    start, size = start + len(piece), size - len(piece)
            at += 1

    def _values(self, entry: Entry, size: int) -> Tensor:
        nothing = torch.empty(0, dtype=torch.uint8)
        return torch.cat([nothing, *self.pieces(entry.start, size)]).view(DTYPES[entry.dtype])

    @cached_property
    def _starts(self) -> tuple[list[int], list[str]]:
        """Where tensors begin, and their keys; those without a value take no place."""
        taking = [(entry.start, key) for key, entry in self.entries.items() if entry.size]
        return [start for start, _ in taking], [key for _, key in taking]
