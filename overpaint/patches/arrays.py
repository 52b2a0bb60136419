"""The arrays of deltas: what may be in them, and the few operations that lose nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from overpaint.bases.digests import dtype_name
from overpaint.errors import OverpaintError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class BadDelta(OverpaintError):
    """A change that does not fit: a wrong shape, a value that is not finite, a tensor the base lacks."""


def kept(name: str, array: Tensor) -> Tensor:
    """An array as a delta keeps it: on the CPU, contiguous, apart from any graph.

    Raises BadDelta when it is not floating point, or holds NaN or infinity.
    """
    if array.dtype not in FLOATS:
        raise BadDelta(f"{name} is {dtype_name(array.dtype)}; a change is float16, bfloat16, float32 or float64")
    if not all_finite(array):
        raise BadDelta(f"{name} has values that are not finite; the solver diverged: lower its learning rate")
    return array.detach().cpu().contiguous()


def all_finite(array: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # A sum that is finite had only finite terms, and costs a tenth of looking at each; one that is not may just be large.
    return bool(torch.isfinite(array.sum())) or bool(torch.isfinite(array).all())


def scaled(array: Tensor, strength: float) -> Tensor:
    """`strength * array`, in the array's dtype where that loses no bit, else in float64.

    Composition multiplies in float64, so that a scaled factor and a strength kept beside the factor give the same bits.
    """
    wide = array.double() * strength
    narrow = wide.to(array.dtype)
    return narrow if torch.equal(narrow.double(), wide) else wide


def joined(arrays: Sequence[Tensor], dim: int) -> Tensor:
    """Factors side by side, in the narrowest dtype that holds all of them without loss."""
    return torch.cat(list(arrays), dim)


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; zeros of different sign differ."""
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b)))


def _bits(array: Tensor) -> Tensor:
    return array.detach().contiguous().reshape(-1).view(torch.uint8)


def paired(arrays: Mapping[str, Tensor], first: str, second: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Stored arrays `NAME/first` and `NAME/second` by name. Raises BadDelta where one has no other."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, array in arrays.items():
        name, _, side = key.rpartition("/")
        found.setdefault(name, {})[side] = array
    for name, pair in found.items():
        if pair.keys() != {first, second}:
            raise BadDelta(f"{name!r} needs two arrays, {first} and {second}; the patch has {', '.join(sorted(pair))}")
    return {name: (pair[first], pair[second]) for name, pair in found.items()}
