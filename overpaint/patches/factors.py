"""Changes as thin factors: where to cut a matrix, and the smallest delta that makes a base's weight exactly an edited one.

What an edit added is often of low rank, seen through the rounding of the edited file. So two candidates are made: thin
factors, where as few directions as possible leave no more than rounding would; and the difference itself. Each gets the
residual bits that make it exact, and the one that takes fewer bytes is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from overpaint.patches.arithmetic import BLOCK, Original, ScratchBuffers, Target, TensorUpdate
from overpaint.patches.delta import residual

WIDEST = 128
"""Directions. An edit with more is stored as a difference; most are of rank 1 to 64."""
ROUNDING = 1.5
"""How much more than the expected square of rounding errors may be left; they scatter, and the directions hold some."""


@dataclass(frozen=True)
class Fitted:
    """One weight's change: thin factors (up, down) or an array of the weight's shape; and residual bits, if any are due."""

    factors: tuple[Tensor, Tensor] | None = None
    array: Tensor | None = None
    bits: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a patch needs for it."""
        arrays = (*(self.factors or ()), *(self.bits or ()), *(() if self.array is None else (self.array,)))
        return sum(array.nbytes for array in arrays)

    def added_to(self, original: Tensor) -> Tensor:
        """A tensor with factors or array added as composing adds them, rounded to its dtype; without the bits."""
        total = torch.empty_like(original)
        update = TensorUpdate(
            factors=() if self.factors is None else ((*self.factors, 1.0),),
            arrays=() if self.array is None else ((self.array, 1.0),),
        )
        with torch.inference_mode():
            update.write(Target(Original(original, math.inf), total, ScratchBuffers()))
        return total


def fit_edit(
    original: Tensor, wanted: Tensor, change: Tensor, *, tolerance: float = 0.0, with_bits: bool = True
) -> Fitted:
    """How to get from `original` to `wanted` (same shape and dtype), bit for bit.

    `change` is what was added, float64; it may be known better than the rounded `wanted` shows. With a `tolerance`, thin
    factors are enough when what they leave of the change is at most that part of it, and get no bits. Without `with_bits`
    nothing gets any, and the difference itself is as near as it can be.
    """
    if tolerance:
        pair = thin(change, (tolerance * float(change.norm())) ** 2)
        if pair is not None:
            return Fitted(factors=pair)
    candidates = [Fitted(array=difference(original, change))]
    if with_bits and (pair := thin(change, ROUNDING * rounding_energy(wanted))) is not None:
        candidates.append(Fitted(factors=pair))
    if with_bits:
        candidates = [replace(each, bits=residual(each.added_to(original), wanted)) for each in candidates]
    return min(candidates, key=lambda each: each.nbytes)


def is_zero(up: Tensor, down: Tensor) -> bool:
    """Whether the product up down (out x r, r x in) is zero everywhere, in float64; never a whole one in memory."""
    wide = down.double()
    rows = max(BLOCK // max(wide.shape[1], 1), 1)
    # One row first: of a product that is not zero it hardly ever is.
    starts = [0, *range(1, up.shape[0], rows)]
    return not any(
        (up[at:end].double() @ wide).any() for at, end in zip(starts, [*starts[1:], up.shape[0]], strict=True)
    )


def difference(original: Tensor, change: Tensor) -> Tensor:
    """A change in the dtype of the tensor that it is added to where that holds it, else in float32."""
    narrow = change.to(original.dtype)
    return narrow if torch.equal(narrow.double(), change) else change.to(torch.float32)


def rounding_energy(values: Tensor) -> float:
    """The expected sum of squared errors that rounding to a tensor's dtype made in its values."""
    info = torch.finfo(values.dtype)
    _, exponent = torch.frexp(values.double().abs().clamp_min(info.smallest_normal))
    spacing = torch.ldexp(torch.full_like(exponent, 1, dtype=torch.float64), exponent - 1) * info.eps
    return float(spacing.square().sum()) / 12


def thin(change: Tensor, left: float, widest: int = WIDEST) -> tuple[Tensor, Tensor] | None:
    """Factors up (out x r) and down (r x in), float32, that leave at most `left` of the sum of squares of a change.

    As few directions as possible; None where more than `widest` would be needed, or factors would not be smaller than half
    the change. A tensor that is no matrix counts as out x the rest; a vector has no factors.
    """
    if change.ndim < 2:
        return None
    matrix = change.reshape(change.shape[0], -1)
    room = min(widest, math.prod(matrix.shape) // (2 * sum(matrix.shape)))
    if room < 1:
        return None
    up, values, down = leading(matrix, room)
    energy = float(matrix.square().sum())
    after = energy - values.square().cumsum(0)
    enough = (after <= left + 1e-12 * energy).nonzero()
    if not len(enough):
        return None
    rank = int(enough[0]) + 1
    return (up[:, :rank] * values[:rank]).to(torch.float32), down[:rank].to(torch.float32)


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m x k), singular values and V (n x k) of `left right^T`, for factors m x r and n x r that are not multiplied out."""
    (first, upper), (second, lower) = torch.linalg.qr(left), torch.linalg.qr(right)
    inner, sizes, outer = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return first @ inner, sizes, second @ outer.T


def above_rounding(sizes: Tensor) -> int:
    """How many of some singular values, in descending order, are more than rounding error beside the largest."""
    return int((sizes > sizes[0] * len(sizes) * torch.finfo(sizes.dtype).eps).sum())


def leading(matrix: Tensor, rank: int, rounds: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular directions of a matrix (out x in): up out x rank, values, down rank x in; all float64.

    By subspace iteration from a fixed start, so that the same matrix gives the same factors; for matrices that are not
    wider than what is asked for, exactly.
    """
    wide = matrix.double()
    if min(wide.shape) <= rank + 8:
        up, values, down = torch.linalg.svd(wide, full_matrices=False)
        return up[:, :rank], values[:rank], down[:rank]
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(wide @ torch.randn(wide.shape[1], rank + 8, generator=generator, dtype=torch.float64))[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]
    up, values, down = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    return (basis @ up)[:, :rank], values[:rank], down[:rank]
