"""Containers of tensors: a safetensors file, read by offset and believed only when it all fits, or what one would be.

Tensors are read, not mapped into memory: mapped pages would count as the program's own, and a file that is cut short
beneath a mapping kills the program instead of raising. Only what passes by once, to be hashed, is mapped, a window at a
time: copying it would take a sixth of the time that hashing takes.

Some containers have no such file: the safetensors file that some tensors would be is gathered when it is read, so that all that
reads a base, and all that writes one, has one kind of container to deal with. A legacy checkpoint (`.ckpt`, `.pt`) is one: read
through `torch.load(weights_only=True)` alone and mapped into memory; a build of it is safetensors.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import pickle
import pickletools
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from overpaint.bases.loading import own_torch_settings
from overpaint.core.encoding import (
    DTYPE_NAMES,
    BadHeader,
    TensorEntry,
    header_length,
    read_header,
    tensor_label,
)
from overpaint.core.errors import OverpaintError


def dtype_name(dtype: torch.dtype) -> str:
    """`float16`, `bfloat16`, ...: the name in digests and manifests."""
    return str(dtype).removeprefix("torch.")


def raw_bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, without a copy where there is no need of one."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    array: Any = flat.numpy()
    return memoryview(array)


def tensor_digest(name: str, tensor: Tensor) -> str:
    """sha256 of one tensor under its canonical name."""
    digest = hashlib.sha256(tensor_label(name, dtype_name(tensor.dtype), tensor.shape))
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()


HEADER_LIMIT = 16 << 20
"""Bytes. The header of a whole Stable Diffusion is 0.2 MB; the format's own limit would let a file ask for gigabytes."""

TENSOR_LIMIT, KEY_LIMIT = 30_000, 500
"""Tensors in a file and letters in a key, so that nothing takes long to refuse. Stable Diffusion XL has 2,500 and 120."""

WINDOW = 16 << 20
"""Bytes that are mapped at a time."""

DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in DTYPE_NAMES.items()}
"""PyTorch's dtypes by the format's names."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a change can be added to. The steps of an fp8 weight are as large as the change that a patch makes to it."""


class BrokenFile(OverpaintError):
    """A file that is no whole safetensors file: missing, cut short, or with a header that contradicts it."""


def file_stamp(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file does: size, time of change, and those that no program sets at will (ctime and inode)."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@dataclass(frozen=True)
class SafetensorsFile:
    """An opened safetensors file: its tensors in file order, its metadata, and where the first tensor's bytes begin.

    Two of them are equal when the file was not touched in between.
    """

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    stamp: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read a file's header. Raises BrokenFile unless every byte of the file belongs to exactly one tensor."""
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                raw = _header(file, status.st_size, path)
        except OSError as error:
            raise BrokenFile(f"{path} cannot be read ({error.strerror})") from error
        if raw.count(b"{") > TENSOR_LIMIT:
            raise _broken(path, f"its header lists more than {TENSOR_LIMIT} things")
        try:
            metadata, entries = read_header(raw, status.st_size)
        except BadHeader as error:
            raise _broken(path, str(error)) from error
        if odd := [key for key in entries if not is_key(key)]:
            raise _broken(path, f"{odd[0][:80]!r} is no name of a tensor")
        return cls(path, entries, metadata, 8 + len(raw), file_stamp(status))

    def tensor(self, key: str) -> Tensor:
        """One tensor, as stored."""
        return next(tensor for _, tensor in self.tensors([key]))

    def tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors one at a time, in file order, as stored. Raises BrokenFile when the file has become shorter."""
        return self.read({key: self.entries[key] for key in keys})

    def read(self, entries: Mapping[str, TensorEntry], memory: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Tensors, or parts of them, one at a time under the names they are given here, in file order.

        In `memory`, uint8 and as large as the largest, each lies until the next one is asked for.
        """
        with self._reading() as file:
            for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
                own = torch.empty(entry.size, dtype=torch.uint8, device="cpu") if memory is None else memory
                flat = own[: entry.size]
                self._fill(file, entry.start, flat)
                yield name, flat.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def beginning(self, entry: TensorEntry, values: int) -> Tensor:
        """The first so many values of a tensor, flat."""
        dtype = DTYPES[entry.dtype]
        flat = torch.empty(min(entry.size, values * dtype.itemsize), dtype=torch.uint8, device="cpu")
        with self._reading() as file:
            self._fill(file, entry.start, flat)
        return flat.view(dtype)

    def passing(self, entries: Mapping[str, TensorEntry]) -> Generator[tuple[str, memoryview], None, None]:
        """The bytes of tensors, each under its name and in order, in pieces that hold until the next one is asked for.

        Raises BrokenFile when the file has become shorter.
        """
        start = stop = 0
        with self._reading() as file, ExitStack() as window:
            for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
                position, end = entry.start, entry.start + entry.size
                while position < end:
                    if not start <= position < stop:
                        window.close()
                        start = position - position % mmap.ALLOCATIONGRANULARITY
                        stop = min(start + WINDOW, os.fstat(file.fileno()).st_size)
                        if position >= stop:
                            raise _broken(self.path, "it ends early")
                        mapped = mmap.mmap(file.fileno(), stop - start, access=mmap.ACCESS_READ, offset=start)
                        view = window.enter_context(memoryview(window.enter_context(mapped)))
                    with view[position - start : min(stop, end) - start] as piece:
                        yield name, piece
                    position = min(stop, end)

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        try:
            with self.path.open("rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise BrokenFile(f"{self.path} cannot be read ({error.strerror})") from error

    def _fill(self, file: Any, start: int, flat: Tensor) -> None:
        array: Any = flat.numpy()
        view, position = memoryview(array), 0
        file.seek(start)
        # One call reads at most 2 GB.
        while position < len(view):
            got = file.readinto(view[position:])
            if not got:
                raise _broken(self.path, "it ends early")
            position += got


def _header(file: BinaryIO, size: int, path: Path) -> bytes:
    start = file.read(8)
    if other := other_kind(start + file.read(120)):
        raise BrokenFile(f"{path} is no safetensors file: it is {other}")
    file.seek(8)
    if len(start) < 8:
        raise _broken(path, f"it has {size} bytes")
    length = header_length(start)
    if length > size - 8:
        raise _broken(path, f"its header would be {length} bytes long, the whole file has {size}")
    if length > HEADER_LIMIT:
        raise _broken(path, f"its header is {length >> 20} MB long, more than the {HEADER_LIMIT >> 20} MB this reads")
    return file.read(length)


def other_kind(beginning: bytes) -> str:
    """What a file that begins so is, where it is something that often stands in the place of weights; else ""."""
    text = beginning.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, which stands for the weights; run `git lfs pull` in its repository, or download it"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, such as one that asks to log in; download the file again"
    if beginning.startswith(b"GGUF"):
        return "a GGUF file by another name; let its name end in .gguf"
    if text and all(32 <= byte < 127 or byte in b"\r\n\t" for byte in text):
        shown = beginning[:40].decode("utf-8", "replace")
        return f"a text that begins {shown!r}, such as a server's answer; download the file again"
    if beginning.startswith((b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")) and beginning[6:8] != b"\0\0":
        return "a PyTorch pickle by another name; let its name end in .ckpt, or convert it to safetensors"
    return ""


def is_key(key: str) -> bool:
    """Whether a key may name a tensor: nobody who takes it for a path, or prints it, is led elsewhere."""
    return len(key) <= KEY_LIMIT and ".." not in key and key.isprintable()


def _broken(path: Path, why: str) -> BrokenFile:
    return BrokenFile(f"{path} cannot be read as safetensors ({why}); it is cut short or damaged: get it again")


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


PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth")
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
            raise _refused_pickle(path, "its tensors would take more bytes than it has")
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
            raise _refused_pickle(path, f"its list of parts is more than {PARTS_LIMIT >> 20} MB long")
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            _refuse_parts(path, parts)
            pickled = [archive.read(part) for part in parts if part.filename.endswith(".pkl")]
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        raise _refused_pickle(path, "it is not a zip archive as torch.save has written them since 2020") from error
    _refuse_long_programs(path, pickled)


def _refuse_parts(path: Path, parts: list[zipfile.ZipInfo]) -> None:
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
            raise _refused_pickle(path, f"its part {part.filename[:80]!r} is compressed")
    if sum(part.file_size for part in parts if part.filename.endswith(".pkl")) > PICKLE_LIMIT:
        raise _refused_pickle(path, f"the names of its tensors take more than {PICKLE_LIMIT >> 20} MB")


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
                raise _refused_pickle(path, "the list of its tensors is cut short or damaged") from error
            steps, built = steps + 1, built + (operation.name in _BUILDING)
            if steps > STEP_LIMIT or built > BUILT_LIMIT:
                raise _refused_pickle(path, "to list its tensors takes more steps than those of any base do")


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
        raise _refused_pickle(path, "it holds more than tensors, and to build that would run a program") from error
    # Whatever else a hostile file makes the reader raise, the answer is the same.
    except Exception as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _refused_pickle(path, f"reading its tensors fails: {why[:120]}") from error


def _tensors(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, by key; what else is in it (counters, settings) is left out."""
    held = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(held, dict):
        raise _refused_pickle(path, "it holds no map of tensors")
    tensors = {}
    for key, value in held.items():
        if isinstance(value, Tensor):
            check_plain(path, key, value)
            tensors[key] = value.detach()
    return tensors


def check_plain(path: Path, key: object, value: Tensor) -> None:
    """Raise BrokenFile for a key that is no tensor's name, and for a tensor that is not plain or is larger than its bytes."""
    if not isinstance(key, str) or not is_key(key):
        raise _refused_pickle(path, f"{str(key)[:80]!r} is no name of a tensor")
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.dtype not in _DTYPES or value.is_conj() or value.is_neg():
        raise _refused_pickle(path, f"{key[:80]!r} is not a plain tensor")
    # A view may repeat a few bytes as often as it likes.
    if value.nbytes > value.untyped_storage().nbytes():
        raise _refused_pickle(path, f"{key[:80]!r} has fewer bytes than its shape asks for")


def _refused_pickle(path: Path, why: str) -> BrokenFile:
    return BrokenFile(
        f"{path} cannot be read as a checkpoint ({why}); get it as .safetensors, or convert it with a program you trust"
    )
