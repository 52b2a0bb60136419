"""The dense delta: the change itself, one array per tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.patches.arrays import BadDelta, kept, scaled
from overpaint.patches.value import Delta


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """One array per tensor, of the tensor's own shape, by canonical name."""

    changes: Mapping[str, Tensor]
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        if not self.changes:
            raise BadDelta("a dense delta without a tensor would change nothing")
        changes = {name: kept(name, array) for name, array in sorted(self.changes.items())}
        object.__setattr__(self, "changes", changes)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.changes)

    def targets(self, base: Base) -> list[str]:
        for name in (names := present(base, self.changes)):
            if tuple(self.changes[name].shape) != base.places[name].shape:
                raise misfit(name, base.places[name].shape, self.changes[name].shape)
        return names

    def _scaled(self, strength: float) -> Delta:
        return Dense({name: scaled(array, strength) for name, array in self.changes.items()})

    def _merged(self, other: Delta) -> Delta | None:
        if not isinstance(other, Dense):
            return None
        changes = {**self.changes, **other.changes}
        for name in self.changes.keys() & other.changes.keys():
            if self.changes[name].shape != other.changes[name].shape:
                raise misfit(name, self.changes[name].shape, other.changes[name].shape)
            changes[name] = _added(self.changes[name], other.changes[name])
        return Dense(changes)


def _added(a: Tensor, b: Tensor) -> Tensor:
    """The sum in the narrowest of both dtypes' union that holds it, else in float64."""
    wide = a.double() + b.double()
    narrow = wide.to(torch.promote_types(a.dtype, b.dtype))
    return narrow if torch.equal(narrow.double(), wide) else wide


def present(base: Base, names: Iterable[str]) -> list[str]:
    """`names`, sorted. Raises BadDelta when the base lacks one."""
    wanted = sorted(names)
    missing = [name for name in wanted if name not in base.places]
    if missing:
        raise BadDelta(
            f"the patch names {len(missing)} of {len(wanted)} tensors that the base at {base.path} lacks, "
            f"first {missing[0]}; it was solved for another architecture"
        )
    return wanted


def misfit(name: str, wanted: Sequence[int], found: Sequence[int]) -> BadDelta:
    """The error of a change whose shape is not the tensor's."""
    return BadDelta(
        f"{name} has shape {list(wanted)}, but the change is for {list(found)}; it was made for another architecture"
    )
