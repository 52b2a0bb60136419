"""A safetensors file, read by offset: which tensors it holds and where their bytes lie, believed only when it all fits.

Tensors are read, not mapped into memory: mapped pages would count as the program's own, and a file that is cut short
beneath a mapping kills the program instead of raising. Only what passes by once, to be hashed, is mapped, a window at a
time: copying it would take a sixth of the time that hashing takes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

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
