"""The kinds of deltas, and how each is read back from the arrays that were stored.

A text map says once, for a text encoder, what every projection that reads it shall do; a low-rank delta holds two thin
factors per tensor; a dense one the change itself; residual bits make an import exact; a sum holds several of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from overpaint.patches.arrays import BadDelta
from overpaint.patches.dense import Dense
from overpaint.patches.low_rank import LowRank
from overpaint.patches.text_map import TextMap
from overpaint.patches.value import Delta, Sum
from overpaint.patches.xor import Xor

__all__ = ["BadDelta", "Delta", "Dense", "LowRank", "Sum", "TextMap", "Xor", "delta_from"]

_READERS: Mapping[str, Callable[[Mapping[str, Tensor]], Sequence[Delta]]] = {
    "text-map": TextMap.from_arrays,
    "low-rank": LowRank.from_arrays,
    "dense": lambda arrays: [Dense(arrays)],
    "xor": Xor.from_arrays,
}
KINDS = (*_READERS, "sum")


def delta_from(kind: str, tensors: Mapping[str, Tensor]) -> Delta:
    """Read back what `Delta.tensors` gave. Raises BadDelta on an unknown kind or arrays that do not belong to it."""
    if kind not in KINDS:
        raise BadDelta(f"unknown kind of delta {kind!r}; this program knows {', '.join(KINDS)}: upgrade Overpaint")
    if kind == "sum":
        return Sum(tuple(_summands(tensors)))
    found = _READERS[kind](tensors)
    if len(found) != 1:
        raise BadDelta(f"a {kind} delta is one part; its arrays {sorted(tensors)[:4]} are {len(found)}")
    return found[0]


def _summands(tensors: Mapping[str, Tensor]) -> list[Delta]:
    by_kind: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        by_kind.setdefault(kind, {})[name] = tensor
    if unknown := sorted(by_kind.keys() - _READERS.keys()):
        raise BadDelta(f"a sum with a part of the unknown kind {unknown[0]!r}; upgrade Overpaint")
    return [part for kind, arrays in by_kind.items() for part in _READERS[kind](arrays)]
