"""The low-rank delta: two thin factors per tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from overpaint.bases.base import Base
from overpaint.patches.arrays import BadDelta, joined, kept, paired, scaled
from overpaint.patches.dense import misfit, present
from overpaint.patches.value import Delta


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """`up down` per tensor: factors out x r and r x in, by canonical name.

    A convolution's kernel (out x in x h x w) counts as the matrix out x (in h w).
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    kind: ClassVar[str] = "low-rank"

    def __post_init__(self) -> None:
        if not self.factors:
            raise BadDelta("a low-rank delta without a tensor would change nothing")
        for name, (up, down) in self.factors.items():
            if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or not up.shape[1]:
                raise BadDelta(f"{name}: factors {list(up.shape)} and {list(down.shape)} do not multiply")
        factors = {name: (kept(name, up), kept(name, down)) for name, (up, down) in sorted(self.factors.items())}
        object.__setattr__(self, "factors", factors)

    def tensors(self) -> dict[str, Tensor]:
        # One array per tensor: with two, names and digests would weigh a tenth of a patch of rank 1.
        return {f"{name}/{len(up)}": joined([up, down.T], 0) for name, (up, down) in self.factors.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> list[Delta]:
        """One delta, from the arrays of `tensors`: (out + in) x r under `NAME/OUT`, `up` and then `down` transposed.

        Format 1 of patches had two arrays, `NAME/up` and `NAME/down`, as they are.
        """
        if any(key.endswith(("/up", "/down")) for key in arrays):
            return [cls(paired(arrays, "up", "down"))]
        factors = {}
        for key, array in arrays.items():
            name, _, out = key.rpartition("/")
            if not (out.isascii() and out.isdecimal() and array.ndim == 2 and 0 < int(out) < len(array)):
                raise BadDelta(
                    f"the array {key} of shape {list(array.shape)} is no pair of factors, stacked as NAME/ROWS"
                )
            factors[name] = array[: int(out)], array[int(out) :].T
        return [cls(factors)]

    def targets(self, base: Base) -> list[str]:
        for name in (names := present(base, self.factors)):
            shape, (up, down) = base.places[name].shape, self.factors[name]
            if len(shape) < 2 or (up.shape[0], down.shape[1]) != (shape[0], math.prod(shape[1:])):
                raise misfit(name, shape, (up.shape[0], down.shape[1]))
        return names

    def _scaled(self, strength: float) -> Delta:
        return LowRank({name: (scaled(up, strength), down) for name, (up, down) in self.factors.items()})

    def _merged(self, other: Delta) -> Delta | None:
        if not isinstance(other, LowRank):
            return None
        factors = {**self.factors, **other.factors}
        for name in self.factors.keys() & other.factors.keys():
            (up, down), (more_up, more_down) = self.factors[name], other.factors[name]
            if (up.shape[0], down.shape[1]) != (more_up.shape[0], more_down.shape[1]):
                raise misfit(name, (up.shape[0], down.shape[1]), (more_up.shape[0], more_down.shape[1]))
            factors[name] = joined([up, more_up], 1), joined([down, more_down], 0)
        return LowRank(factors)
