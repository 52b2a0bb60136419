"""Which doors a change leaves open: by which ways a prompt still enters the U-Net as it always did.

A door counts as closed when a change reaches what reads it, in the columns that belong to it, or the text encoder behind
it. A change that reaches no door at all works inside the U-Net, whatever comes in, and leaves none open.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from overpaint.bases.base import Base
from overpaint.bases.layout import LAST, PENULTIMATE
from overpaint.patches.delta import Delta, Dense, LowRank, TextMap

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def open_doors(base: Base, delta: Delta) -> tuple[str, ...]:
    """The doors that a delta leaves open although it closes another, in the base's order; none, if it closes all or none."""
    closed = {door for part in delta.parts for door in base.doors if _closes(base, door, part)}
    return tuple(door for door in base.doors if door not in closed) if closed else ()


def untouched_doors(base: Base, changed: Iterable[str]) -> tuple[str, ...]:
    """The doors for which nothing is among the changed tensors although there is for another, in the base's order.

    Doors that share their readers cannot be told apart by names.
    """
    names = set(changed)
    closed = {door for door in base.doors if names & _reaching(base, door)}
    return tuple(door for door in base.doors if door not in closed) if closed else ()


def _closes(base: Base, door: str, part: Delta) -> bool:
    if isinstance(part, TextMap):
        return part.encoder == door
    behind = set(part.targets(base)) & _reaching(base, door)
    return any(_moves(base, door, part, name) for name in behind)


def _reaching(base: Base, door: str) -> set[str]:
    """The tensors that read a door, and those that decide what comes through it."""
    return {*base.readers(door), *_speaking(base, door)}


def _moves(base: Base, door: str, part: Delta, name: str) -> bool:
    """Whether the change of a reader is in the columns of a door; of any other tensor it counts as it is."""
    if name not in base.readers(door):
        return True
    columns = base.columns(door, name)
    if isinstance(part, LowRank):
        return bool(part.factors[name][1][:, columns].any())
    if isinstance(part, Dense):
        return bool(part.changes[name][:, columns].any())
    return True


def _speaking(base: Base, door: str) -> list[str]:
    """The text encoder's tensors that decide what comes through a door: for a penultimate state not the last layer's."""
    spec = base.door(door)
    names = [name for name in base.names if name.startswith(f"{spec.encoder}/")]
    if spec.says == LAST:
        return [name for name in names if "text_projection" not in name]
    if spec.says == PENULTIMATE:
        last = max((int(found[1]) for name in names if (found := _LAYER.search(name))), default=0)
        after = ("text_projection", "final_layer_norm", f".layers.{last}.")
        return [name for name in names if not any(word in name for word in after)]
    return names
