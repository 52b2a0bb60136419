"""Containers whose file is not there: the safetensors file that some tensors would be, gathered when they are read.

So all that reads a base, and all that writes one, has one kind of container to deal with. A legacy checkpoint (`.ckpt`,
`.pt`) is one: read through `torch.load(weights_only=True)` alone and mapped into memory; a build of it is safetensors.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import (
    DTYPES,
    BrokenFile,
    SafetensorsFile,
    file_stamp,
    is_key,
    other_kind,
    raw_bytes,
)
from overpaint.core.encoding import TensorEntry

DATA_START = 4096
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def entries_at_offsets(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> dict[str, TensorEntry]:
    """Entries one after the other. Raises KeyError for a dtype that the format lacks."""
    entries, position = {}, DATA_START
    for key, dtype, shape in tensors:
        size = torch.Size(shape).numel() * dtype.itemsize
        entries[key] = TensorEntry(_CODES[dtype], shape, position, size)
        position += size
    return entries


@dataclass(frozen=True)
class VirtualCheckpoint(SafetensorsFile):
    """The root of such containers. They say what is stored at a key; places follow from `entries`."""

    def stored(self, key: str) -> Iterator[Tensor]:
        """The tensors whose bytes, one after the other, are those of a key."""
        raise NotImplementedError

    def read(self, entries: Mapping[str, TensorEntry], memory: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            yield name, self._values(entry, entry.size).reshape(entry.shape)

    def beginning(self, entry: TensorEntry, values: int) -> Tensor:
        return self._values(entry, min(entry.size, values * DTYPES[entry.dtype].itemsize))

    def passing(self, entries: Mapping[str, TensorEntry]) -> Generator[tuple[str, memoryview], None, None]:
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

    def _values(self, entry: TensorEntry, size: int) -> Tensor:
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.cat([nothing, *self.pieces(entry.start, size)]).view(DTYPES[entry.dtype])

    @cached_property
    def _starts(self) -> tuple[list[int], list[str]]:
        """Where tensors begin, and their keys; those without a value take no place."""
        taking = [(entry.start, key) for key, entry in self.entries.items() if entry.size]
        return [start for start, _ in taking], [key for _, key in taking]


SUFFIXES = (".ckpt", ".pt", ".pth")
PICKLE_LIMIT, PARTS_LIMIT = 3 << 20, 1 << 20
"""Bytes of names and shapes, and of the archive's list of parts. Those of Stable Diffusion XL are 0.4 and 0.2 MB."""

STEP_LIMIT, BUILT_LIMIT = 160_000, 15_000
"""Steps of the program that a pickle is, and those of them that look something up or build it: of the latter a tensor takes
three, of all some 32, and Stable Diffusion XL with averages has 4,200 tensors. A few bytes of it can ask for a tensor, so
that its length says little."""

_BUILDING = frozenset({"REDUCE", "BUILD", "NEWOBJ", "BINPERSID"})
_DTYPES = frozenset(DTYPES.values())


@dataclass(frozen=True)
class PickledCheckpoint(VirtualCheckpoint):
    """An opened legacy checkpoint. `values` are views of the mapped file."""

    values: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(cls, path: Path) -> PickledCheckpoint:
        """Map a file. Raises BrokenFile unless it is a zip archive of plain tensors and nothing else has to be built."""
        try:
            status = path.stat()
            _refuse_other_kinds(path)
            _refuse_bombs(path, status.st_size)
        except OSError as error:
            raise BrokenFile(f"{path} cannot be read ({error.strerror})") from error
        values = _tensors(_loaded(path), path)
        if sum(value.nbytes for value in values.values()) > 2 * status.st_size:  # tied weights are there twice
            raise _refused(path, "its tensors would take more bytes than it has")
        entries = entries_at_offsets((key, value.dtype, tuple(value.shape)) for key, value in values.items())
        return cls(path, entries, {"format": "pt"}, DATA_START, file_stamp(status), values)

    def stored(self, key: str) -> Iterator[Tensor]:
        yield self.values[key]


def _refuse_other_kinds(path: Path) -> None:
    with path.open("rb") as file:
        beginning = file.read(128)
    if beginning[8:10] in (b'{"', b"{}", b"{ ") and beginning[6:8] == b"\0\0":
        raise BrokenFile(f"{path} is a safetensors file by another name; let its name end in .safetensors")
    if not beginning.startswith((b"PK", b"\x80")) and (other := other_kind(beginning)):
        raise BrokenFile(f"{path} is no checkpoint: it is {other}")


def _refuse_bombs(path: Path, size: int) -> None:
    """Raise BrokenFile unless a file is a zip archive that holds its parts as they are, with a short list of them."""
    try:
        if _directory_size(path, size) > PARTS_LIMIT:
            raise _refused(path, f"its list of parts is more than {PARTS_LIMIT >> 20} MB long")
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            _refuse_parts(path, parts)
            pickled = [archive.read(part) for part in parts if part.filename.endswith(".pkl")]
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        raise _refused(path, "it is not a zip archive as torch.save has written them since 2020") from error
    _refuse_long_programs(path, pickled)


def _refuse_parts(path: Path, parts: list[zipfile.ZipInfo]) -> None:
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
            raise _refused(path, f"its part {part.filename[:80]!r} is compressed")
    if sum(part.file_size for part in parts if part.filename.endswith(".pkl")) > PICKLE_LIMIT:
        raise _refused(path, f"the names of its tensors take more than {PICKLE_LIMIT >> 20} MB")


def _refuse_long_programs(path: Path, pickled: list[bytes]) -> None:
    """Raise BrokenFile for pickles that would take longer than the tensors of any base. They are read, and nothing is run."""
    steps = built = 0
    for content in pickled:
        walk = pickletools.genops(content)
        while True:
            try:
                operation, _, _ = next(walk)
            except StopIteration:
                break
            # Whatever a hostile pickle makes the reader raise.
            except Exception as error:
                raise _refused(path, "the list of its tensors is cut short or damaged") from error
            steps, built = steps + 1, built + (operation.name in _BUILDING)
            if steps > STEP_LIMIT or built > BUILT_LIMIT:
                raise _refused(path, "to list its tensors takes more steps than those of any base do")


def _directory_size(path: Path, size: int) -> int:
    """Bytes of a zip archive's central directory, before anything is made of it."""
    with path.open("rb") as file:
        file.seek(max(0, size - (1 << 16) - 42))
        tail = file.read()
        end = len(tail) - 22 if tail[-22:].startswith(b"PK\5\6") else tail.rfind(b"PK\5\6")
        if end < 0:
            raise ValueError("no end of a central directory")
        if tail[end - 20 : end].startswith(b"PK\6\7"):
            file.seek(struct.unpack_from("<Q", tail, end - 12)[0])
            return int(struct.unpack_from("<Q", file.read(56), 40)[0])
    return int(struct.unpack_from("<I", tail, end + 12)[0])


@own_torch_settings()
def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, "it holds more than tensors, and to build that would run a program") from error
    # Whatever else a hostile file makes the reader raise, the answer is the same.
    except Exception as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _refused(path, f"reading its tensors fails: {why[:120]}") from error


def _tensors(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, by key; what else is in it (counters, settings) is left out."""
    held = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(held, dict):
        raise _refused(path, "it holds no map of tensors")
    tensors = {}
    for key, value in held.items():
        if isinstance(value, Tensor):
            check_plain(path, key, value)
            tensors[key] = value.detach()
    return tensors


def check_plain(path: Path, key: object, value: Tensor) -> None:
    """Raise BrokenFile for a key that is no tensor's name, and for a tensor that is not plain or is larger than its bytes."""
    if not isinstance(key, str) or not is_key(key):
        raise _refused(path, f"{str(key)[:80]!r} is no name of a tensor")
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.dtype not in _DTYPES or value.is_conj() or value.is_neg():
        raise _refused(path, f"{key[:80]!r} is not a plain tensor")
    # A view may repeat a few bytes as often as it likes.
    if value.nbytes > value.untyped_storage().nbytes():
        raise _refused(path, f"{key[:80]!r} has fewer bytes than its shape asks for")


def _refused(path: Path, why: str) -> BrokenFile:
    return BrokenFile(
        f"{path} cannot be read as a checkpoint ({why}); get it as .safetensors, or convert it with a program you trust"
    )
