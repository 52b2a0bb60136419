"""The arithmetic of one tensor: what is summed to compose it, where that is rounded, and the least change that an edit takes.

The composed value is `round(W0 + W0 U D^T + up down + arrays + differences)`. Everything before the rounding is float64, in
blocks of rows, so that memory does not grow with the tensor. U and D are the factors of all text maps side by side, as are
`up` and `down`: one product each, however many patches there are. Where text maps together have more directions than a
quarter of the text width d, their sum U D^T (d x d) is formed in float64 and applied in float32 instead, which from there
on is faster. Where a tensor has no other change, the sum with W0 is taken in float32 as well: the same bits, sooner.

With eps = 2^-53, r the directions of `up` and n the number of patches, what is rounded is off from exact arithmetic by at
most `(2 d + r + n + 4) eps (|W0| + |W0| |U| |D|^T + |up| |down| + |arrays| + |differences|)`, value by value; where text maps
are applied in float32, 2^-24 stands for eps in front of `|W0| |U| |D|^T`. Rounding adds half a unit in the last place; for
float16 and bfloat16, which PyTorch rounds by way of float32, 2^-24 of the value more.

The other way round, what an edit added to a weight is often of low rank, seen through the rounding of the edited file. So two
candidates are made (`fit_edit`): thin factors, where as few directions as possible leave no more than rounding would; and the
difference itself. Each gets the residual bits that make it exact, and the one that takes fewer bytes is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from overpaint.patches.delta import TextMap, residual

BLOCK = 1 << 19
"""Values per block of rows: 4 MB in float64, which stays in a processor's last cache."""
PARTS = 8
"""Into how many parts a block is divided for products: PyTorch shares out many among its threads, and one badly."""


class ScratchBuffers:
    """Scratch memory, taken again and again for one tensor after the other; never two at a time."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}

    def take(self, use: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, for use in inference mode, that is valid until the same use is asked for again."""
        # Cached, because making two views takes as long as a small product.
        view = self._views.get((use, shape, dtype))
        if view is None:
            size = shape.numel()
            memory = self._memory.get((use, dtype))
            if memory is None or memory.shape[0] < size:
                # Never less than a block: views of earlier memory are cached, and would hold it.
                memory = self._memory[use, dtype] = torch.empty(max(size, BLOCK), dtype=dtype)
                self._views = {key: view for key, view in self._views.items() if key[::2] != (use, dtype)}
            view = self._views[use, shape, dtype] = memory[:size].view(shape)
        return view


@dataclass(frozen=True)
class Original:
    """A base's value of one tensor, and the largest magnitude in it."""

    values: Tensor
    peak: float


class ColumnBlock:
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
    work: ScratchBuffers
    half: Tensor | None = None
    _parts: dict[tuple[int, int], ColumnBlock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight.dtype == torch.float16 and self.total.dtype == torch.float64:
            self.half = self.work.take("half", self.weight.shape, torch.float32)
        self.all, self.width = ColumnBlock(self.total), self.total.shape[1]

    def part(self, columns: slice) -> ColumnBlock:
        """Some columns of the sum."""
        if columns.stop - columns.start == self.width:
            return self.all
        key = columns.start, columns.stop
        if key not in self._parts:
            self._parts[key] = ColumnBlock(self.total[:, columns])
        return self._parts[key]


class Target:
    """A tensor whose composed value is wanted, and where to put it.

    `out` is contiguous, on the CPU, of the original's shape and dtype, and may be the original itself. To be made and used in
    inference mode; what it caches saves time when it is written to again.
    """

    def __init__(self, original: Original, out: Tensor, work: ScratchBuffers) -> None:
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


THIN = 4
"""Text maps are applied factor by factor while their directions are at most the width over this."""


@dataclass(frozen=True)
class FactoredMap:
    """Text maps side by side: U^T and D^T, k x d, float64, strengths in U.

    `gain` bounds how much larger than the largest weight the change can be.
    """

    up: Tensor
    down: Tensor

    @cached_property
    def gain(self) -> float:
        return float(self.up.abs().sum(1) @ self.down.abs().amax(1))

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Both factors, once for each part of a block."""
        return self.up.expand(PARTS, -1, -1), self.down.expand(PARTS, -1, -1)

    def read(self, weight: ColumnBlock, work: ScratchBuffers) -> Tensor:
        """`(W U)^T` for rows W of a weight (float64), k x rows or divided as the rows are."""
        # With the long side last, because BLAS is up to five times faster for (k x d)(d x rows) than for (rows x d)(d x k).
        if weight.turned is None:
            return torch.mm(self.up, weight.whole.T)
        return torch.bmm(self.parts[0], weight.turned)

    def write(self, read: Tensor, total: ColumnBlock) -> None:
        """Add `W U D^T`."""
        if self.up.shape[0] == 1:  # BLAS takes longer for a single direction
            torch.addcmul(total.whole, read.view(-1, 1), self.down, out=total.whole)
        elif total.parts is None:
            total.whole.addmm_(read.T, self.down)
        else:
            torch.baddbmm(total.parts, read.mT, self.parts[1], out=total.parts)


@dataclass(frozen=True)
class DenseMap:
    """Text maps that fill the text width: their sum U D^T, d x d, float32."""

    map: Tensor

    @cached_property
    def gain(self) -> float:
        return float(self.map.abs().sum(0).max())

    def read(self, weight: ColumnBlock, work: ScratchBuffers) -> Tensor:
        """`W U D^T` for rows W of a weight (float64 or float32), in float32."""
        rows = weight.whole
        if rows.dtype != torch.float32:
            rows = work.take("narrow", rows.shape, torch.float32).copy_(rows)
        return torch.mm(rows, self.map)

    def write(self, read: Tensor, total: ColumnBlock) -> None:
        """Add what was read."""
        total.whole.add_(read)


def side_by_side(maps: Sequence[tuple[TextMap, float]], work: ScratchBuffers) -> FactoredMap | DenseMap:
    """Text maps of one text input with their strengths, in the form that is cheaper to apply; in inference mode."""
    # Transposed first: to interleave the columns of a thousand single directions takes as long as their product.
    up = torch.cat([text_map.turned[0] for text_map, _ in maps])
    down = torch.cat([text_map.turned[1] for text_map, _ in maps])
    strengths = torch.tensor([s for m, s in maps for _ in range(m.up.shape[1])], dtype=torch.float64)[:, None]
    if THIN * up.shape[0] <= up.shape[1]:
        return FactoredMap(up.double() * strengths, down.double())
    wide = _widened(up, "up", work).mul_(strengths)
    total = work.take("square", torch.Size((up.shape[1], up.shape[1])), torch.float64)
    return DenseMap(torch.mm(wide.T, _widened(down, "down", work), out=total).float())


@dataclass(frozen=True)
class TensorUpdate:
    """All that is added to one tensor: text maps, low-rank factors, arrays, and results of patches with bits.

    Text maps come by text input, each with the columns that it reads and writes. `results` are whole patched tensors of the
    base's dtype: what counts is their difference from the original.
    """

    texts: tuple[tuple[slice, FactoredMap | DenseMap], ...] = ()
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
    def _is_text(self) -> bool:
        """Whether text maps are all that is added."""
        return bool(self.texts) and not (self.factors or self.arrays or self.results)

    @cached_property
    def _is_single(self) -> bool:
        """Whether sums with originals no wider than float32 may be float32, because that gives the same bits as float64.

        It does where each value is the original and one float32 product: their float32 sum is their float64 sum, rounded,
        because rounding twice is rounding once where the wider format has twice the digits of the narrower, and two more
        (S. Figueroa, When is double rounding innocuous?, 1995).
        """
        if not self._is_text:
            return False
        columns = sorted((c.start, c.stop) for c, _ in self.texts)
        apart = all(stop <= start for (_, stop), (start, _) in pairwise(columns))
        return apart and all(isinstance(text, DenseMap) for _, text in self.texts)

    def _precision(self, stored: torch.dtype) -> torch.dtype:
        return torch.float32 if stored != torch.float64 and self._is_single else torch.float64

    @cached_property
    def _gain(self) -> float:
        return 1 + sum(text.gain for _, text in self.texts)

    @cached_property
    def _added(self) -> float:
        thin = [float(up.abs().amax(0).double() @ down.abs().amax(1).double()) * abs(s) for up, down, s in self.factors]
        full = [float(array.abs().max()) * abs(s) for array, s in self.arrays]
        return math.inf if self.results else sum(thin) + sum(full)

    def bound(self, peak: float) -> float:
        """No composed value is larger in magnitude than this, when no weight is larger than `peak`."""
        return peak * self._gain + self._added

    @cached_property
    def _only(self) -> tuple[int, Tensor, Tensor] | None:
        """Width and factors of a text map of one direction that is all that is added."""
        if not self._is_text or len(self.texts) > 1:
            return None
        ((columns, text),) = self.texts
        if not isinstance(text, FactoredMap) or text.up.shape[0] != 1:
            return None
        return columns.stop - columns.start, text.parts[0], text.down

    def write(self, target: Target) -> None:
        """Put the composed value where it belongs; in inference mode."""
        only = self._only
        for block in target.blocks(self._precision(target.out.dtype)):
            total = block.total
            if block.half is None:
                total.copy_(block.weight)
            else:
                block.half.copy_(block.weight)
                total.copy_(block.half)
            if only is None or only[0] != block.width or block.all.turned is None:
                self._add(block)
            else:
                # The calls of `_add` without the way to them: after each pass the nearest caches hold a block and no program
                # any more, so that fetching a dozen functions again would be nearly a tenth of the time of a swap.
                torch.addcmul(total, torch.bmm(only[1], block.all.turned).view(-1, 1), only[2], out=total)
            if total is not block.out:
                block.out.copy_(total)

    def _add(self, block: Block) -> None:
        """Add all of this to the sum of a block."""
        total, work = block.total, block.work
        # All are read before one is written, for text inputs may share columns.
        reads = [(text, part := block.part(columns), text.read(part, work)) for columns, text in self.texts]
        for text, part, read in reads:
            text.write(read, part)
        if self.factors:
            total.addmm_(self._up[block.rows], self._down)
        for array, strength in self.arrays:
            # Multiplied first: as one operation with the sum, it would round otherwise than a value times its strength.
            total.add_(_widened(matrix(array)[block.rows], "array", work).mul_(strength))
        for result, strength in self.results:
            original = _widened(block.weight, "original", work)
            total.add_(_widened(matrix(result)[block.rows], "array", work).sub_(original), alpha=strength)


def _widened(values: Tensor, use: str, work: ScratchBuffers) -> Tensor:
    """A copy in float64."""
    return work.take(use, values.shape, torch.float64).copy_(values)


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
