"""What comes out the same everywhere: canonical JSON, digests over it, the header of a safetensors file, samples of many things.

A safetensors file is eight bytes with the header's length, the header (JSON: each tensor's dtype, shape and place, and a map
of texts as metadata), and the tensors (https://github.com/huggingface/safetensors). A header is read only where every byte of
the file belongs to one tensor. No PyTorch is needed here.

Samples are taken by place (`evenly_spaced`), or in an order without any pattern (`by_digest`).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

KEY = "overpaint"
"""Under which name a header's metadata holds a patch's manifest or a build's record."""
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
BYTES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
"""By dtype as the format spells it, the size of one value."""
DTYPE_NAMES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
DTYPE_NAMES |= {"U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32"}
DTYPE_NAMES |= {"F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64"}
"""By dtype as the format spells it, PyTorch's name, which is that in digests and manifests."""


def canonical_json(value: Any) -> bytes:
    """The canonical JSON of a value: sorted keys, no spaces, UTF-8. Raises ValueError on NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")


def json_digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value. Raises ValueError on NaN or infinity."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of many tensors: over their names and digests, sorted by name."""
    return json_digest(dict(digests))


def tensor_label(name: str, dtype: str, shape: Iterable[int]) -> bytes:
    """What a tensor's digest is over before its bytes; `dtype` is one of `DTYPE_NAMES`' values."""
    return canonical_json([name, dtype, list(shape)])


class BadHeader(ValueError):
    """What is wrong with a header, in words that fit after "the file cannot be read:"."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its dtype as the format spells it, its shape, and its bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def header_bytes(
    metadata: Mapping[str, str],
    tensors: Iterable[tuple[str, str, Sequence[int]]],
    *,
    multiple: int = 8,
    rest: int = 0,
    sort: bool = True,
) -> bytes:
    """The beginning of a file, up to its first tensor, for tensors (name, dtype, shape) that follow without holes.

    The header is padded with blanks so that its length leaves `rest` when divided by `multiple`. `sort`: whether it is
    canonical JSON, its keys sorted.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = canonical_json(header) if sort else json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * ((rest - len(text)) % multiple)
    return struct.pack("<Q", len(text)) + text


def header_length(beginning: bytes) -> int:
    """Bytes of the header, by the first eight of a file."""
    return int(struct.unpack("<Q", beginning[:8])[0])


def read_header(raw: bytes, file_size: int) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """The metadata of a file, and its tensors in file order. `raw` is the header without its length. Raises BadHeader."""
    header = read_object(raw, "its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BadHeader("its metadata is not a map of texts")
    entries = {key: _entry(key, value, 8 + len(raw)) for key, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)))
    position = 8 + len(raw)
    for key, entry in entries.items():
        # What no tensor names could hold anything, and would be passed on unseen.
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise BadHeader(f"{key[:80]!r} {what}")
        position += entry.size
    if position != file_size:
        raise BadHeader(f"its tensors end at byte {position}, the file at byte {file_size}")
    return metadata, entries


def read_object(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object without a key twice, which can be written again. Raises BadHeader; `what` begins the message."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_no_constant)
        if b"\\u" in raw:
            canonical_json(value)  # an escaped lone surrogate could not be written back
    except RecursionError as error:
        raise BadHeader(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise BadHeader(f"{what} is not JSON: {str(error)[:80]}") from error
    if not isinstance(value, dict):
        raise BadHeader(f"{what} is not a JSON object")
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the name {next(key for key in keys if keys.count(key) > 1)[:40]!r} occurs twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _entry(key: str, value: Any, data_start: int) -> TensorEntry:
    try:
        code, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise BadHeader(f"{key[:80]!r} has no dtype, shape and data_offsets") from error
    if not isinstance(code, str) or code not in BYTES:
        raise BadHeader(f"{key[:80]!r} has the dtype {str(code)[:20]!r}, which this program does not know")
    # A shape with a zero in it may ask for anything; so much and no more can be represented.
    if not whole or len(shape) > 16 or math.prod(side or 1 for side in shape) >= 1 << 62:
        raise BadHeader(f"{key[:80]!r} has a shape or offsets that are not plain counts")
    if end - begin != math.prod(shape) * BYTES[code]:
        raise BadHeader(f"{key[:80]!r} has {end - begin} bytes, which its dtype and shape contradict")
    return TensorEntry(code, tuple(shape), data_start + begin, end - begin)


Item = TypeVar("Item")


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, or all where there are fewer, spread evenly from the first on."""
    wanted = min(count, len(items))
    return [items[i * len(items) // wanted] for i in range(wanted)]


def by_digest(words: Iterable[str]) -> list[str]:
    """Words in the order of their digests: one that is the same everywhere, and of which any beginning is a sample."""
    return sorted(words, key=lambda word: hashlib.sha256(word.encode()).digest())
