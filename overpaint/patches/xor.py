"""Residual bits: what makes the result of a change exactly the weights it was taken from.

A change that is stored in floating point gives back an edited checkpoint only up to rounding. The bits that still differ,
few as they are, make it exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.container import DTYPES
from overpaint.bases.digests import dtype_name
from overpaint.patches.arrays import BadDelta, paired
from overpaint.patches.dense import present
from overpaint.patches.value import Delta

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer that holds the bits of a value, by its size in bytes."""


@dataclass(frozen=True, eq=False)
class Xor(Delta):
    """Bits to flip after rounding: `(at, mask)` by canonical name.

    `at` (int32 [n], ascending) are flat positions in the tensor, `mask` (int16, int32 or int64 [n], as wide as the
    tensor's values) the bits to flip there; both are sparse because most residuals are zero.

    Bits refer to one rounded result: that of the base and the other parts of the same delta, at strength 1. So they are
    flipped only where the patch lies alone on a tensor at strength 1. Otherwise the patch counts there as the difference
    that it makes when alone, which is a change like any other. Bits cannot be scaled or added as a value.
    """

    bits: Mapping[str, tuple[Tensor, Tensor]]
    kind: ClassVar[str] = "xor"

    def __post_init__(self) -> None:
        if not self.bits:
            raise BadDelta("residual bits without a tensor would change nothing")
        checked = {name: _checked(name, at, mask) for name, (at, mask) in sorted(self.bits.items())}
        object.__setattr__(self, "bits", checked)

    def tensors(self) -> dict[str, Tensor]:
        sides = ("at", "mask")
        return {f"{name}/{side}": pair[i] for name, pair in self.bits.items() for i, side in enumerate(sides)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> list[Delta]:
        """One delta, from the arrays of `tensors`."""
        return [cls(paired(arrays, "at", "mask"))]

    def targets(self, base: Base) -> list[str]:
        for name in (names := present(base, self.bits)):
            place, (at, mask) = base.places[name], self.bits[name]
            dtype = DTYPES[place.entry.dtype]
            if WORDS.get(dtype.itemsize) != mask.dtype or int(at[-1]) >= math.prod(place.shape):
                raise BadDelta(
                    f"{name} is {dtype_name(dtype)} {list(place.shape)} in the base, but the patch has residual bits "
                    f"of {mask.element_size()} bytes up to position {int(at[-1])}; it was made from another base"
                )
        return names

    def flipped(self, name: str, values: Tensor) -> Tensor:
        """`values` (contiguous, of the tensor's dtype) with the bits of `name` flipped, as a new tensor."""
        at, mask = self.bits[name]
        words = values.reshape(-1).view(mask.dtype).clone()
        words[at.long()] ^= mask
        return words.view(values.dtype).reshape(values.shape)

    def _scaled(self, strength: float) -> Delta:
        raise BadDelta(
            f"residual bits cannot be scaled by {strength:g}; lay the patch on with that strength instead, where it counts "
            "as the difference it makes"
        )

    def _merged(self, other: Delta) -> Delta | None:
        if not isinstance(other, Xor):
            return None
        if twice := sorted(self.bits.keys() & other.bits.keys()):
            raise BadDelta(f"{twice[0]} would have residual bits twice; they refer to one result")
        return Xor({**self.bits, **other.bits})


def residual(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor] | None:
    """`(at, mask)` that turn `found` into `wanted`, bit for bit; None where they are the same."""
    word = WORDS[found.element_size()]
    mask = found.contiguous().reshape(-1).view(word) ^ wanted.contiguous().reshape(-1).view(word)
    at = mask.nonzero()[:, 0]
    return (at.int(), mask[at]) if len(at) else None


def _checked(name: str, at: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if at.dtype != torch.int32 or mask.dtype not in WORDS.values():
        raise BadDelta(
            f"{name}: residual bits need int32 positions and int16, int32 or int64 masks; "
            f"got {dtype_name(at.dtype)} and {dtype_name(mask.dtype)}"
        )
    if at.ndim != 1 or at.shape != mask.shape or not len(at):
        raise BadDelta(f"{name}: residual bits need one mask per position; got {list(at.shape)}, {list(mask.shape)}")
    at, mask = at.detach().cpu().contiguous(), mask.detach().cpu().contiguous()
    if int(at[0]) < 0 or not bool((at[1:] > at[:-1]).all()) or not bool(mask.all()):
        raise BadDelta(f"{name}: residual bits need ascending positions, each once, and masks that flip something")
    return at, mask
