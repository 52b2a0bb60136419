"""The blocks of rows in which a composed tensor is computed, and the scratch memory for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

BLOCK = 1 << 19
"""Values per block of rows: 4 MB in float64, which stays in a processor's last cache."""
PARTS = 8
"""Into how many parts a block is divided for products: PyTorch shares out many among its threads, and one badly."""


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
                # Never less than a block: views of earlier memory are kept, and would keep it.
                memory = self._memory[use, dtype] = torch.empty(max(size, BLOCK), dtype=dtype)
                self._views = {key: kept for key, kept in self._views.items() if key[::2] != (use, dtype)}
            view = self._views[use, shape, dtype] = memory[:size].view(shape)
        return view


@dataclass(frozen=True)
class Original:
    """A base's value of one tensor, and the largest magnitude in it."""

    values: Tensor
    peak: float


class Part:
    """Some columns of a block: as they are, and with the rows in parts where they can be divided, also turned."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole

    @cached_property
    def parts(self) -> Tensor | None:
        rows, width = self.whole.shape
        return None if rows % PARTS else self.whole.view(PARTS, rows // PARTS, width)

    @cached_property
    def turned(self) -> Tensor | None:
        return None if self.parts is None else self.parts.mT


@dataclass
class Block:
    """Some rows: the original's, memory for their sum, and where it goes once it is rounded, which may be that memory.

    `half` is scratch memory for converting float16 to float64 by way of float32, because PyTorch's direct conversion is not
    vectorised. `all` are all columns of the sum.
    """

    rows: slice
    weight: Tensor
    total: Tensor
    out: Tensor
    work: Workspace
    half: Tensor | None = None
    _parts: dict[tuple[int, int], Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight.dtype == torch.float16 and self.total.dtype == torch.float64:
            self.half = self.work.take("half", self.weight.shape, torch.float32)
        self.all, self.width = Part(self.total), self.total.shape[1]

    def part(self, columns: slice) -> Part:
        """Some columns of the sum."""
        if columns.stop - columns.start == self.width:
            return self.all
        key = columns.start, columns.stop
        if key not in self._parts:
            self._parts[key] = Part(self.total[:, columns])
        return self._parts[key]


class Target:
    """A tensor whose composed value is wanted, and where to put it.

    `out` is contiguous, on the CPU, of the original's shape and dtype, and may be the original itself. To be made and used in
    inference mode; what it keeps saves time when it is written to again.
    """

    def __init__(self, original: Original, out: Tensor, work: Workspace) -> None:
        self.original, self.out, self._work = original, out, work
        self.width, self.largest = out.shape[-1] if out.ndim else 1, torch.finfo(out.dtype).max
        self._blocks: dict[torch.dtype, list[Block]] = {}

    def blocks(self, precision: torch.dtype) -> list[Block]:
        """Its blocks; sums are computed in `precision`. They share scratch memory: finish one before the next."""
        if precision not in self._blocks:
            weight, out = matrix(self.original.values), matrix(self.out)
            count = -(-weight.numel() // BLOCK) or 1
            # Of one size, and one that can be divided.
            rows = -(-weight.shape[0] // (count * PARTS)) * PARTS
            starts = range(0, weight.shape[0], rows) if rows else ()
            self._blocks[precision] = [self._block(weight, out, slice(at, at + rows), precision) for at in starts]
        return self._blocks[precision]

    def _block(self, weight: Tensor, out: Tensor, rows: slice, precision: torch.dtype) -> Block:
        some, written = weight[rows], out[rows]
        if written.dtype == precision == torch.float32:  # not for float64, where the original may be read after a sum
            return Block(rows, some, written, written, self._work)
        return Block(rows, some, self._work.take("total", some.shape, precision), written, self._work)


def matrix(tensor: Tensor) -> Tensor:
    """A tensor as rows; a kernel's rows are its output channels, a vector's its values."""
    return tensor if tensor.ndim == 2 else tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
