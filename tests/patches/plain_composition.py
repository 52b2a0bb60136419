"""Composition as its definition reads, for tests to compare `compose` with: every sum in float64, whole tensors at once.

`arithmetic` computes the same in blocks, with the factors of all patches side by side, and in float32 where that is proved
to be as good; this is what all of that has to amount to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.patches.compose import Term
from overpaint.patches.delta import Delta, Xor


def compose_plainly(base: Base, terms: Iterable[Term]) -> dict[str, Tensor]:
    """The changed tensors by canonical name, in the base's dtypes; a term of strength 0 counts as absent."""
    ordered = sorted((term for term in terms if term.strength), key=lambda term: term.id)
    names = sorted({name for term in ordered for name in term.delta.targets(base)})
    return {name: _composed(base, name, [t for t in ordered if name in t.delta.targets(base)]) for name in names}


def _composed(base: Base, name: str, terms: Sequence[Term]) -> Tensor:
    """`round(W0 + sum_i s_i change_i)`; a patch alone at strength 1 also has its residual bits flipped."""
    original = base.tensor(name)
    if len(terms) == 1 and terms[0].strength == 1:
        return _alone(base, name, terms[0].delta, original)
    total = original.double()
    for term in terms:
        total = total + term.strength * _difference(base, name, term.delta, original)
    return total.to(original.dtype)


def _difference(base: Base, name: str, delta: Delta, original: Tensor) -> Tensor:
    """The change of a delta, float64; with residual bits, the difference that it makes when alone."""
    parts = [part for part in delta.parts if name in part.targets(base)]
    if any(isinstance(part, Xor) for part in parts):
        return _alone(base, name, delta, original).double() - original.double()
    return torch.stack([part.change(base, name, original) for part in parts]).sum(0)


def _alone(base: Base, name: str, delta: Delta, original: Tensor) -> Tensor:
    """What a delta at strength 1 makes of a tensor, rounded once, then its bits flipped."""
    total, parts = original.double(), [part for part in delta.parts if name in part.targets(base)]
    for part in parts:
        if not isinstance(part, Xor):
            total = total + part.change(base, name, original)
    rounded = total.to(original.dtype)
    for part in parts:
        rounded = part.flipped(name, rounded) if isinstance(part, Xor) else rounded
    return rounded
