"""What another tool's file makes of a base, tensor by tensor: the value from which it starts, and the one it wants there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.container import DTYPES
from overpaint.bases.digests import dtype_name
from overpaint.bases.layout import UnknownLayout
from overpaint.patches.arrays import FLOATS, all_finite, identical
from overpaint.patches.formats.dialect import ForeignFile, Reading
from overpaint.patches.formats.factors import Pair, factors
from overpaint.patches.formats.files import ForeignWeights

Meaning = Literal["change", "weights"]
ALIKE = 0.25
"""Plain tensors are edited weights when the squared difference from the base is below this part of its square."""
SAMPLE = 32
"""Tensors that are looked at to tell."""


@dataclass(frozen=True)
class Edit:
    """One tensor's edit: `wanted` instead of `original`, which is the base's value, rounded to the file's dtype where that
    is the coarser one (`rounded`); and what was added, as two factors where the file has it so, else as float64 array.

    `given` says that the file holds the change itself, and not weights that it was worked out from."""

    original: Tensor
    wanted: Tensor
    change: Tensor | Pair
    rounded: bool = False
    given: bool = False


@dataclass(frozen=True)
class Edits:
    """All edits of a file: which tensors of the base it speaks about, and each edit on demand (None: it stays the same)."""

    dialect: str
    meaning: Meaning
    names: tuple[str, ...]
    matched: int
    unmatched: tuple[str, ...]
    dtypes: tuple[str, ...]
    edit: Callable[[str], Edit | None] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)


def edits_of_file(
    base: Base, weights: ForeignWeights, reading: Reading, meaning: Meaning | None, keep_rounding: bool
) -> Edits:
    """The edits of a file of keys. Raises ForeignFile when it cannot be told whether it holds changes or weights."""
    meaning = meaning or _meaning(base, weights, reading)

    def edit(name: str) -> Edit | None:
        keys, original = reading.parts[name], base.tensor(name)
        if "difference" in keys or ("value" in keys and meaning == "change"):
            key = keys.get("difference") or keys["value"]
            return _changed(original, _fitting(weights, key, name, original.shape).double())
        if "value" in keys:
            return edited(original, _fitting(weights, keys["value"], name, original.shape), keep_rounding)
        pair = factors(weights, name, keys, tuple(original.shape))
        return None if pair is None else _changed(original, pair)

    keys = [key for roles in reading.parts.values() for role, key in roles.items() if role != "alpha"]
    return Edits(
        reading.dialect.name,
        meaning,
        tuple(sorted(reading.parts)),
        reading.matched,
        reading.unmatched,
        _dtypes(weights.shapes[key][0] for key in keys),
        edit,
        weights.metadata,
    )


def edits_of_checkpoint(base: Base, path: Path, keep_rounding: bool) -> Edits | None:
    """The edits of a whole pipeline, folder or single file; None when there is something else at the path.

    Raises ForeignFile when it is of another architecture than the base.
    """
    if path.is_dir() and not (path / "model_index.json").is_file():
        return None
    try:
        other = Base.open(path)
    except UnknownLayout:
        return None
    if other.layout.name != base.layout.name:
        raise ForeignFile(f"{path} is a {other.layout.name}, the base at {base.path} a {base.layout.name}")
    common = [name for name in base.names if name in other.places]
    for name in common:
        if other.places[name].shape != base.places[name].shape:
            raise _other_shape(path.name, name, other.places[name].shape, base.places[name].shape)
    return Edits(
        f"{'single file' if other.is_single_file else 'diffusers folder'}",
        "weights",
        tuple(name for name in common if DTYPES[base.places[name].entry.dtype] in FLOATS),
        len(common),
        tuple(name for name in other.names if name not in base.places),
        _dtypes(DTYPES[place.entry.dtype] for place in other.places.values()),
        lambda name: edited(base.tensor(name), other.tensor(name), keep_rounding),
    )


def edited(original: Tensor, value: Tensor, keep_rounding: bool) -> Edit | None:
    """The edit that makes `value` of a base's tensor, None where it changes nothing.

    Raises ForeignFile when the value is too large for the base's dtype.
    """
    coarser = torch.finfo(value.dtype).eps > torch.finfo(original.dtype).eps
    start = original if keep_rounding or not coarser else original.to(value.dtype)
    wanted = value.to(start.dtype)
    if identical(wanted, start):
        return None
    if not all_finite(wanted) or not all_finite(start):
        raise ForeignFile(
            f"a value is beyond what {dtype_name(start.dtype)} holds, in which the base has it; use a base of a wider dtype"
        )
    return Edit(start, wanted, value.double() - start.double(), start is not original)


def _changed(original: Tensor, change: Tensor | Pair) -> Edit | None:
    array = (change[0].double() @ change[1].double()).reshape(original.shape) if isinstance(change, tuple) else change
    if not bool(array.any()):
        return None
    return Edit(original, (original.double() + array).to(original.dtype), change, given=True)


def _fitting(weights: ForeignWeights, key: str, name: str, shape: torch.Size) -> Tensor:
    """A tensor of the base's shape; matrices are sometimes kept as 1 x 1 kernels, and the other way round."""
    found = weights.shapes[key][1]
    if found != tuple(shape) and (found[:2] != tuple(shape[:2]) or {*found[2:], *shape[2:]} != {1}):
        raise _other_shape(weights.path.name, name, found, tuple(shape))
    return weights.tensor(key).reshape(shape)


def _other_shape(file: str, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> ForeignFile:
    hint = "it was made for another base"
    if "token_embedding" in name and found[1:] == shape[1:]:
        hint = "it adds words to the vocabulary, which a patch cannot"
    return ForeignFile(f"{file} has shape {list(found)} for {name}, which has {list(shape)} here; {hint}")


def _meaning(base: Base, weights: ForeignWeights, reading: Reading) -> Meaning:
    """Whether plain tensors are edited weights or changes, by how far they are from the base."""
    plain = {name: keys["value"] for name, keys in reading.parts.items() if "value" in keys}
    if not plain:
        return "change"
    matrices = [name for name in plain if len(base.places[name].shape) > 1]
    apart = size = length = 0.0
    for name in islice(sorted(matrices or plain), SAMPLE):
        weight = base.tensor(name).double()
        value = _fitting(weights, plain[name], name, weight.shape).double()
        apart += float((value - weight).square().sum())
        size += float(weight.square().sum())
        length += float(value.square().sum())
    if apart < ALIKE * size:
        return "weights"
    if length < ALIKE * size:
        return "change"
    raise ForeignFile(
        f"{weights.path.name} has tensors that are neither like the base's weights nor small beside them, so it cannot be told "
        "whether they replace or change them; name the right base, or say which it is"
    )


def _dtypes(found: Iterable[torch.dtype]) -> tuple[str, ...]:
    return tuple(sorted({dtype_name(dtype) for dtype in found}))
