"""The text map: said once for a door of a base, it changes every tensor that reads what comes through that door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor

from overpaint.bases.base import Base
from overpaint.patches.arrays import BadDelta, joined, kept, paired, scaled
from overpaint.patches.value import Delta

_READERS: WeakKeyDictionary[Base, dict[tuple[str, int], list[str]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class TextMap(Delta):
    """`W0 up down^T` for every projection W0 (out x d) that reads `encoder`; up and down are d x k.

    `encoder` is the name of a door (`Base.doors`), for SD 1.x and 2.x that of the text encoder. Where a tensor reads several
    doors side by side, W0 stands for the columns that belong to this one; the others stay as they are.
    """

    encoder: str
    up: Tensor
    down: Tensor
    kind: ClassVar[str] = "text-map"

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.up.shape != self.down.shape or not self.up.numel():
            raise BadDelta(
                f"a text map's factors must both be d x k; got {list(self.up.shape)}, {list(self.down.shape)}"
            )
        for side in ("up", "down"):
            object.__setattr__(self, side, kept(f"{self.encoder}/{side}", getattr(self, side)))

    @cached_property
    def width(self) -> int:
        """d, the width of what comes through the door."""
        return self.up.shape[0]

    @cached_property
    def turned(self) -> tuple[Tensor, Tensor]:
        """U^T and D^T, k x d; views that are kept, since making them for a thousand maps takes milliseconds."""
        return self.up.T, self.down.T

    def tensors(self) -> dict[str, Tensor]:
        return {f"{self.encoder}/up": self.up, f"{self.encoder}/down": self.down}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> list[Delta]:
        """One text map for each door, from the arrays of `tensors`."""
        return [cls(encoder, up, down) for encoder, (up, down) in sorted(paired(arrays, "up", "down").items())]

    def targets(self, base: Base) -> list[str]:
        # Matching a thousand names against patterns takes longer than laying a patch on: once per opened base.
        known = _READERS.setdefault(base, {})
        if (self.encoder, self.width) not in known:
            known[self.encoder, self.width] = _readers(base, self.encoder, self.width)
        return known[self.encoder, self.width]

    def _scaled(self, strength: float) -> Delta:
        return TextMap(self.encoder, scaled(self.up, strength), self.down)

    def _merged(self, other: Delta) -> Delta | None:
        if not isinstance(other, TextMap) or other.encoder != self.encoder:
            return None
        if other.width != self.width:
            raise BadDelta(f"text maps of widths {self.width} and {other.width} are for different text encoders")
        return TextMap(self.encoder, joined([self.up, other.up], 1), joined([self.down, other.down], 1))


def _readers(base: Base, door: str, width: int) -> list[str]:
    names = base.readers(door) if door in base.doors else []
    if not names:
        raise BadDelta(f"this text map is for {door}, which no projection of the base at {base.path} reads")
    for name in names:
        shape, columns = base.places[name].shape, base.columns(door, name)
        if len(shape) != 2 or columns.stop - columns.start != width or columns.stop > shape[1]:
            raise BadDelta(
                f"this text map is for text width {width}, but {name} has shape {list(shape)}, of which {door} has columns "
                f"{columns.start} to {columns.stop}; it was solved for another text encoder"
            )
    return names
