"""A safetensors file written in one pass: the header first, whose texts are sorted, then each array when it is computed.

The same arrays and texts give the same bytes. The digest of everything after the header stands in the header too, and is
filled in at the end.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.container import DTYPES
from overpaint.bases.digests import canonical_json, raw_bytes
from overpaint.patches.formats.headers import sealed
from overpaint.patches.publish import appearing

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """An array's place in a file, known before its values."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_file(out: Path, header: Mapping[str, str], slots: Sequence[Slot], arrays: Iterator[Tensor]) -> None:
    """Write a new file whole or not at all; `arrays` come in the order of `slots`.

    Raises AlreadyExists when `out` is there, OverpaintError when nothing can be written.
    """
    head = _head(header, slots)
    with appearing(out) as scratch, scratch.open("xb") as file:
        file.write(head)
        digest = hashlib.sha256()
        for slot, array in zip(slots, arrays, strict=True):
            assert (array.dtype, tuple(array.shape)) == (slot.dtype, slot.shape), slot.key
            data = raw_bytes(array)
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(_head(sealed(header, digest.hexdigest()), slots))


def _head(header: Mapping[str, str], slots: Sequence[Slot]) -> bytes:
    """The header with its length in front, padded to eight bytes."""
    listed: dict[str, Any] = {"__metadata__": dict(header)}
    position = 0
    for slot in slots:
        end = position + torch.Size(slot.shape).numel() * slot.dtype.itemsize
        listed[slot.key] = {"dtype": _CODES[slot.dtype], "shape": list(slot.shape), "data_offsets": [position, end]}
        position = end
    text = canonical_json(listed)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
