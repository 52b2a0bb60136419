"""What every delta is: a frozen value with a sum, a strength, equality and a digest.

Deltas of one kind are added by putting their factors side by side, never by adding factor to factor: a product of sums
is not a sum of products. Deltas of different kinds become a `Sum`, which is one delta to whatever takes one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.digests import combined_digest, tensor_digest
from overpaint.patches.arrays import BadDelta, identical


class Delta(ABC):
    """An immutable map from canonical tensor name to a change. Its arrays must not be written to."""

    kind: ClassVar[str]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The arrays to store, by storage name."""

    @abstractmethod
    def targets(self, base: Base) -> list[str]:
        """The tensors of a base this delta changes, sorted. Reads no weight.

        Raises BadDelta when the base lacks one or has it in a shape that does not fit.
        """

    @abstractmethod
    def _scaled(self, strength: float) -> Delta:
        """This change times a finite strength."""

    @abstractmethod
    def _merged(self, other: Delta) -> Delta | None:
        """The sum with another delta as one of this kind, None when that cannot be."""

    @property
    def parts(self) -> tuple[Delta, ...]:
        """What this delta is a sum of: itself, unless it is a `Sum`."""
        return (self,)

    @property
    def has_bits(self) -> bool:
        """Whether residual bits (`Xor`) are part of it."""
        return any(part.kind == "xor" for part in self.parts)

    @cached_property
    def digest(self) -> str:
        """sha256 over kind and arrays: equal exactly when two deltas are."""
        return combined_digest({f"{self.kind}/{name}": tensor_digest(name, t) for name, t in self.tensors().items()})

    def __add__(self, other: object) -> Delta:
        """The sum of both changes.

        Raises BadDelta for residual bits, which belong to one result, not to a change (`Xor` says why).
        """
        if not isinstance(other, Delta):
            return NotImplemented
        if self.has_bits or other.has_bits:
            raise BadDelta(
                "residual bits make one result exact and cannot be added to another change; "
                "keep the two as patches and lay both on"
            )
        merged = _merge([*self.parts, *other.parts])
        return merged[0] if len(merged) == 1 else Sum(tuple(merged))

    def __mul__(self, strength: object) -> Delta:
        """The change times a strength of either sign; one factor is scaled, once, and no bit is lost (`arrays.scaled`)."""
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            return NotImplemented
        if not math.isfinite(strength):
            raise BadDelta(f"a strength must be a finite number; got {strength}")
        return self if strength == 1 else self._scaled(float(strength))

    __rmul__ = __mul__

    def __neg__(self) -> Delta:
        return self * -1

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Delta) or self.kind != other.kind:
            return False
        mine, theirs = self.tensors(), other.tensors()
        return mine.keys() == theirs.keys() and all(identical(mine[name], theirs[name]) for name in mine)

    def __hash__(self) -> int:
        # Without the values: equal deltas have equal names and shapes, and hashing must not read gigabytes.
        return hash((self.kind, tuple((name, t.shape) for name, t in sorted(self.tensors().items()))))


@dataclass(frozen=True, eq=False)
class Sum(Delta):
    """A sum of deltas of different kinds, at most one of each kind (of text maps, one per encoder).

    Parts of one kind are merged and all are sorted, so that a sum is one value however it was put together. Residual bits
    come last: they refer to the rounded sum of the other parts.
    """

    summands: tuple[Delta, ...]
    kind: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        found = _merge([part for summand in self.summands for part in summand.parts])
        if len(found) < 2:
            raise BadDelta(f"a sum needs deltas of at least two kinds; got {len(found)}")
        object.__setattr__(self, "summands", tuple(found))

    @property
    def parts(self) -> tuple[Delta, ...]:
        return self.summands

    def tensors(self) -> dict[str, Tensor]:
        return {f"{part.kind}/{name}": array for part in self.parts for name, array in part.tensors().items()}

    def targets(self, base: Base) -> list[str]:
        return sorted({name for part in self.parts for name in part.targets(base)})

    def _scaled(self, strength: float) -> Delta:
        return Sum(tuple(part * strength for part in self.parts))

    def _merged(self, other: Delta) -> Delta | None:
        return None


_ORDER = ("text-map", "low-rank", "dense", "xor")


def _merge(parts: Iterable[Delta]) -> list[Delta]:
    """Parts with those that merge merged, sorted by kind and storage names."""
    found: list[Delta] = []
    for part in parts:
        for i, other in enumerate(found):
            merged = other._merged(part)
            if merged is not None:
                found[i] = merged
                break
        else:
            found.append(part)
    return sorted(found, key=lambda part: (_ORDER.index(part.kind), min(part.tensors())))
