"""The bytes of a patch file: a safetensors container with a manifest in its header, believed only when it all fits.

`docs/patch-format.md` is the specification. Reading names what is wrong with which array, and never asks for more memory
than the file is long.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.container import DTYPES
from overpaint.bases.digests import canonical_json, dtype_name, raw_bytes, tensor_digest
from overpaint.errors import OverpaintError

HEADER_LIMIT = 24 << 20
"""Bytes. The manifest's 8 MB, with every quotation mark spelled with two characters, and the list of arrays."""
KEY = "overpaint"
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class BadPatch(OverpaintError):
    """A file that is no patch, is damaged, or is of a newer format."""


def file_of(manifest: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> bytes:
    """The one file of a manifest and its arrays: arrays by name, without holes, the header padded to eight bytes."""
    header: dict[str, Any] = {"__metadata__": {KEY: canonical_json(manifest).decode()}}
    offset = 0
    for name in sorted(arrays):
        array = arrays[name]
        end = offset + array.numel() * array.element_size()
        header[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    head = canonical_json(header)
    head += b" " * (-len(head) % 8)
    return b"".join([struct.pack("<Q", len(head)), head, *(raw_bytes(arrays[name]) for name in sorted(arrays))])


def described(arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a manifest says about arrays: dtype, shape and digest by name."""
    return {
        name: {"dtype": dtype_name(a.dtype), "shape": list(a.shape), "digest": tensor_digest(name, a)}
        for name, a in arrays.items()
    }


def parse(blob: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the arrays of a patch file, every array checked against the manifest. Raises BadPatch."""
    raw = _header(blob)
    header = _json(raw, "the header of the patch file")
    metadata = header.pop("__metadata__", None)
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise BadPatch("this safetensors file has no Overpaint manifest; it is not a patch")
    manifest = _json(text.encode("utf-8", "surrogatepass"), "the patch's manifest")
    places = {name: _place(name, entry) for name, entry in header.items()}
    _refuse_gaps(places, len(blob) - 8 - len(raw))
    data = memoryview(blob)[8 + len(raw) :]
    return manifest, {name: _array(data, *place) for name, place in sorted(places.items())}


def check_arrays(listed: Any, arrays: Mapping[str, Tensor]) -> None:
    """Raise BadPatch unless the arrays are exactly those that a manifest lists."""
    if not isinstance(listed, dict) or not listed:
        raise _damaged("its manifest lists no arrays")
    for name in sorted(set(listed) ^ set(arrays)):
        missing = "the file has no such array" if name in listed else "its manifest does not list it"
        raise _damaged(f"array {_short(name)}: {missing}")
    for name, array in arrays.items():
        wanted, found = listed[name], described({name: array})[name]
        for what in ("dtype", "shape", "digest"):
            given = wanted.get(what) if isinstance(wanted, dict) else None
            if given != found[what]:
                raise _damaged(
                    f"array {_short(name)} does not match its {what}: the manifest says {_short(str(given))}, "
                    f"the file has {_short(str(found[what]))}"
                )


def _header(blob: bytes) -> bytes:
    if len(blob) < 8:
        raise BadPatch(f"this is no patch file: it has {len(blob)} bytes, and a header alone has more")
    (length,) = struct.unpack("<Q", blob[:8])
    if length > HEADER_LIMIT:
        raise BadPatch(
            f"this is no patch file: its header would have {length} bytes, and at most {HEADER_LIMIT} are read"
        )
    if length > len(blob) - 8:
        raise _damaged(f"its header has {length} bytes, the whole file {len(blob)}; it is cut short")
    return blob[8 : 8 + length]


def _json(raw: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_no_constant)
        canonical_json(found)  # raises for what could not be written again: a lone surrogate, a number without an end
    except RecursionError as error:
        raise _damaged(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise _damaged(f"{what} is not JSON: {_short(str(error))}") from error
    if not isinstance(found, dict):
        raise _damaged(f"{what} is not a JSON object")
    return found


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


_Place = tuple[str, tuple[int, ...], int, int]


def _place(name: str, entry: Any) -> _Place:
    """dtype code, shape, and first and last byte of an array."""
    try:
        code, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        counts = all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, start, end))
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(f"array {_short(name)} has no dtype, shape and data_offsets") from error
    if not isinstance(code, str) or code not in DTYPES:
        raise _damaged(f"array {_short(name)} has the dtype {_short(str(code))}, which this program does not know")
    if not counts or len(shape) > 16:
        raise _damaged(f"array {_short(name)} has a shape or offsets that are not plain counts")
    if end - start != math.prod(shape) * DTYPES[code].itemsize:
        raise _damaged(f"array {_short(name)} has {end - start} bytes, but its dtype and shape need another number")
    return code, shape, start, end


def _refuse_gaps(places: Mapping[str, _Place], size: int) -> None:
    """Arrays must follow each other to the file's end: what no array names would be kept and passed on unseen."""
    position = 0
    for name, (_, _, start, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if end > size:
            raise _damaged(f"array {_short(name)} ends at byte {end} of {size}; the file is cut short")
        if start != position:
            what = "overlaps the array before it" if start < position else "leaves a hole before it"
            raise _damaged(f"array {_short(name)} {what}")
        position = end
    if position != size:
        raise _damaged(f"{size - position} bytes follow the last array")


def _array(data: memoryview, code: str, shape: tuple[int, ...], start: int, end: int) -> Tensor:
    """A copy of an array, aligned as PyTorch aligns."""
    flat = torch.empty(end - start, dtype=torch.uint8)
    target: Any = flat.numpy()
    memoryview(target)[:] = data[start:end]
    return flat.view(DTYPES[code]).reshape(shape)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:100]}..."


def _damaged(why: str) -> BadPatch:
    return BadPatch(f"the patch file is damaged ({why}); take it from its source again")
