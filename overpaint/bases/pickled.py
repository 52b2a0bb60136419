"""A legacy checkpoint (`.ckpt`, `.pt`), read through `torch.load(weights_only=True)` alone and mapped into memory.

It is presented as the safetensors file that it would be, and a build of it is one.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.container import DTYPES, BrokenFile, is_key
from overpaint.bases.gathered import DATA_START, GatheredContainer, laid_out

SUFFIXES = (".ckpt", ".pt", ".pth")
PICKLE_LIMIT = 3 << 20
"""Bytes of names and shapes. Those of Stable Diffusion XL are 1.2 MB, and 3 MB take a second to read."""
_DTYPES = frozenset(DTYPES.values())


@dataclass(frozen=True)
class PickledContainer(GatheredContainer):
    """An opened legacy checkpoint. `values` are views of the mapped file."""

    values: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(cls, path: Path) -> PickledContainer:
        """Map a file. Raises BrokenFile unless it is a zip archive of plain tensors and nothing else has to be built."""
        try:
            status = path.stat()
            _refuse_bombs(path, status.st_size)
        except OSError as error:
            raise BrokenFile(f"{path} cannot be read ({error.strerror})") from error
        values = _tensors(_loaded(path), path)
        if sum(value.nbytes for value in values.values()) > 2 * status.st_size:  # tied weights are there twice
            raise _refused(path, "its tensors would take more bytes than it has")
        entries = laid_out((key, value.dtype, tuple(value.shape)) for key, value in values.items())
        return cls(path, entries, {"format": "pt"}, DATA_START, status.st_mtime_ns, values)

    def stored(self, key: str) -> Iterator[Tensor]:
        yield self.values[key]


def _refuse_bombs(path: Path, size: int) -> None:
    """Raise BrokenFile unless a file is a zip archive that holds its parts as they are, with a short list of them."""
    try:
        if _directory_size(path, size) > PICKLE_LIMIT:
            raise _refused(path, f"its list of parts is more than {PICKLE_LIMIT >> 20} MB long")
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        raise _refused(path, "it is not a zip archive as torch.save has written them since 2020") from error
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
            raise _refused(path, f"its part {part.filename[:80]!r} is compressed")
        if part.filename.endswith(".pkl") and part.file_size > PICKLE_LIMIT:
            raise _refused(path, f"the names of its tensors take more than {PICKLE_LIMIT >> 20} MB")


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
    found = {}
    for key, value in held.items():
        if isinstance(value, Tensor):
            if not isinstance(key, str) or not is_key(key):
                raise _refused(path, f"{str(key)[:80]!r} is no name of a tensor")
            _refuse_odd(path, key, value)
            found[key] = value.detach()
    return found


def _refuse_odd(path: Path, key: str, value: Tensor) -> None:
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
