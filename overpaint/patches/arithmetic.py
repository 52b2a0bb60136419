"""The arithmetic of one tensor's composition: what is summed, in which precision, and where it is rounded.

The composed value is `round(W0 + W0 U D^T + up down + arrays + differences)`. Everything before the rounding is float64, in
blocks of rows, so that memory does not grow with the tensor. U and D are the factors of all text maps side by side, as are
`up` and `down`: one product each, however many patches there are. Where text maps together have more directions than a
quarter of the text width d, their sum U D^T (d x d) is formed in float64 and applied in float32 instead, which from there
on is faster. Where nothing but that lies on a tensor, the sum with W0 is taken in float32 as well: the same bits, sooner.

With eps = 2^-53, r the directions of `up` and n the number of patches, what is rounded is off from exact arithmetic by at
most `(2 d + r + n + 4) eps (|W0| + |W0| |U| |D|^T + |up| |down| + |arrays| + |differences|)`, value by value; where text maps
are applied in float32, 2^-24 stands for eps in front of `|W0| |U| |D|^T`. Rounding adds half a unit in the last place; for
float16 and bfloat16, which PyTorch rounds by way of float32, 2^-24 of the value more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from overpaint.patches.text_map import TextMap

BLOCK = 1 << 20
"""Values per block of rows: 8 MB in float64, which stays in a processor's last cache."""
THIN = 4
"""Text maps are applied factor by factor while their directions are at most the width over this."""


class Workspace:
    """Scratch memory, taken again and again for one tensor after the other; never two at a time."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}

    def take(self, use: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, for use in inference mode, that is valid until the same use is asked for again."""
        # Kept, because making two views takes as long as a small product.
        view = self._views.get((use, shape, dtype))
        if view is None:
            size = shape.numel()
            memory = self._memory.get((use, dtype))
            if memory is None or memory.shape[0] < size:
                memory = self._memory[use, dtype] = torch.empty(size, dtype=dtype)
                self._views = {key: kept for key, kept in self._views.items() if key[::2] != (use, dtype)}
            view = self._views[use, shape, dtype] = memory[:size].view(shape)
        return view


@dataclass(frozen=True)
class Original:
    """A base's value of one tensor, and the largest magnitude in it."""

    values: Tensor
    peak: float


@dataclass(frozen=True)
class Thin:
    """Text maps side by side: U^T and D^T, k x d, float64, strengths in U.

    `gain` bounds how much larger than the largest weight the change can be.
    """

    up: Tensor
    down: Tensor

    @cached_property
    def gain(self) -> float:
        return float(self.up.abs().sum(1) @ self.down.abs().amax(1))

    def read(self, weight: Tensor, work: Workspace) -> Tensor:
        """`(W U)^T` for rows W of a weight (float64)."""
        if len(self.up) == 1:
            return torch.mv(weight, self.up[0])[None]
        # The long side last: BLAS is up to five times faster for (k x d)(d x rows) than for (rows x d)(d x k).
        return torch.mm(self.up, weight.T)

    def write(self, read: Tensor, total: Tensor, work: Workspace) -> None:
        """Add `W U D^T`."""
        if len(read) == 1:  # BLAS takes twice as long for a single direction
            torch.addcmul(total, read.T, self.down, out=total)
        else:
            total.addmm_(read.T, self.down)


@dataclass(frozen=True)
class Square:
    """Text maps that fill the text width: their sum U D^T, d x d, float32."""

    map: Tensor

    @cached_property
    def gain(self) -> float:
        return float(self.map.abs().sum(0).max())

    def read(self, weight: Tensor, work: Workspace) -> Tensor:
        """`W U D^T` for rows W of a weight (float64 or float32), in float32."""
        single = weight.dtype == torch.float32
        return torch.mm(weight if single else work.take("narrow", weight.shape, torch.float32).copy_(weight), self.map)

    def write(self, read: Tensor, total: Tensor, work: Workspace) -> None:
        """Add what was read."""
        total.add_(read)


def side_by_side(maps: Sequence[tuple[TextMap, float]]) -> Thin | Square:
    """Text maps of one door with their strengths, in the form that is cheaper to apply."""
    # Transposed first: to interleave the columns of a thousand single directions takes as long as their product.
    up = torch.cat([m.up.T for m, _ in maps]).double()
    down = torch.cat([m.down.T for m, _ in maps]).double()
    strengths = [s for m, s in maps for _ in range(m.up.shape[1])]
    up *= torch.tensor(strengths, dtype=torch.float64)[:, None]
    if THIN * up.shape[0] > up.shape[1]:
        return Square((up.T @ down).float())
    return Thin(up, down)


@dataclass(frozen=True)
class Change:
    """All that is added to one tensor: text maps, low-rank factors, arrays, and results of patches with bits.

    Text maps come by door, each with the columns that it reads and writes. `results` are whole patched tensors of the base's
    dtype: what counts is their difference from the original.
    """

    texts: tuple[tuple[slice, Thin | Square], ...] = ()
    factors: tuple[tuple[Tensor, Tensor, float], ...] = ()
    arrays: tuple[tuple[Tensor, float], ...] = ()
    results: tuple[tuple[Tensor, float], ...] = ()

    @cached_property
    def _up(self) -> Tensor:
        return torch.cat([up.double() * strength for up, _, strength in self.factors], 1)

    @cached_property
    def _down(self) -> Tensor:
        return torch.cat([down.double() for _, down, _ in self.factors], 0)

    @cached_property
    def _is_single(self) -> bool:
        """Whether sums with originals no wider than float32 may be float32, because that gives the same bits as float64.

        It does where each value is the original and one float32 product: their float32 sum is their float64 sum, rounded,
        because rounding twice is rounding once where the wider format has twice the digits of the narrower, and two more
        (S. Figueroa, When is double rounding innocuous?, 1995).
        """
        if self.factors or self.arrays or self.results or not self.texts:
            return False
        columns = sorted((c.start, c.stop) for c, _ in self.texts)
        apart = all(stop <= start for (_, stop), (start, _) in pairwise(columns))
        return apart and all(isinstance(text, Square) for _, text in self.texts)

    def _precision(self, stored: torch.dtype) -> torch.dtype:
        return torch.float32 if stored != torch.float64 and self._is_single else torch.float64

    def bound(self, peak: float) -> float:
        """No composed value is larger in magnitude than this, when no weight is larger than `peak`."""
        if self.results:
            return math.inf
        thin = [float(up.abs().amax(0).double() @ down.abs().amax(1).double()) * abs(s) for up, down, s in self.factors]
        full = [float(array.abs().max()) * abs(s) for array, s in self.arrays]
        return peak * (1 + sum(text.gain for _, text in self.texts)) + sum(thin) + sum(full)

    def write(self, original: Tensor, out: Tensor, work: Workspace) -> None:
        """Put the composed value into `out`: contiguous, of the original's shape and dtype, possibly the original itself."""
        with torch.inference_mode():
            weight, target = _matrix(original), _matrix(out)
            rows = max(1, BLOCK // weight.shape[1])
            precision = self._precision(original.dtype)
            if rows >= weight.shape[0]:
                target.copy_(self._sum(weight, slice(None), precision, work))
                return
            for start in range(0, weight.shape[0], rows):
                some = slice(start, start + rows)
                target[some].copy_(self._sum(weight[some], some, precision, work))

    def _sum(self, weight: Tensor, rows: slice, precision: torch.dtype, work: Workspace) -> Tensor:
        """The unrounded value of some rows, in scratch memory."""
        total = _widened(weight, "total", work, precision)
        parts = [total if total.shape[1] == c.stop - c.start else total[:, c] for c, _ in self.texts]
        read = [text.read(part, work) for part, (_, text) in zip(parts, self.texts, strict=True)]
        for part, (_, text), found in zip(parts, self.texts, read, strict=True):
            text.write(found, part, work)
        if self.factors:
            total.addmm_(self._up[rows], self._down)
        for array, strength in self.arrays:
            # Multiplied first: as one operation with the sum, it would round otherwise than a value times its strength.
            total.add_(_widened(_matrix(array)[rows], "array", work).mul_(strength))
        for result, strength in self.results:
            difference = _widened(_matrix(result)[rows], "array", work).sub_(_widened(weight, "original", work))
            total.add_(difference, alpha=strength)
        return total


def _matrix(tensor: Tensor) -> Tensor:
    """A tensor as rows; a kernel's rows are its output channels, a vector's its values."""
    return tensor if tensor.ndim == 2 else tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)


def _widened(values: Tensor, use: str, work: Workspace, dtype: torch.dtype = torch.float64) -> Tensor:
    """A copy in float64, or another wide dtype."""
    if values.dtype == torch.float16 and dtype == torch.float64:
        # In two steps, because the direct conversion is not vectorised.
        values = work.take("half", values.shape, torch.float32).copy_(values)
    return work.take(use, values.shape, dtype).copy_(values)
