"""Composition: the tensors that a base and a set of patches yield.

A function of the set: terms are sorted by patch id, summed in float64 and rounded once to the tensor's own dtype, so
that any order of adds and removes ends in the same bits, and the empty set is the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.digests import combined_digest, tensor_digest
from overpaint.errors import OverpaintError
from overpaint.patches.delta import BadDelta, Delta


@dataclass(frozen=True)
class Term:
    """One patch of a composition: its id (the sort key), its delta and its strength."""

    id: str
    delta: Delta
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise OverpaintError(f"a strength must be a finite number; patch {self.id[:12]} was given {self.strength}")


def compose(base: Base, terms: Iterable[Term]) -> dict[str, Tensor]:
    """The changed tensors, in the base's dtypes, by canonical name; empty for no terms.

    Raises BadDelta when a delta names a tensor the base lacks or does not fit one, or when a sum overflows the dtype;
    OverpaintError when a patch is given twice.
    """
    ordered = sorted(terms, key=lambda term: term.id)
    if len({term.id for term in ordered}) != len(ordered):
        raise OverpaintError("a composition holds each patch once; change its strength instead of adding it again")
    by_name: dict[str, list[Term]] = {}
    for term in ordered:
        for name in term.delta.targets(base):
            by_name.setdefault(name, []).append(term)
    originals = base.tensors(by_name)
    return {name: _sum(name, originals[name], found) for name, found in sorted(by_name.items())}


def _sum(name: str, original: Tensor, terms: list[Term]) -> Tensor:
    weight = original.double()
    total = weight.clone()
    for term in terms:
        total += term.strength * term.delta.change(name, weight)
    rounded = total.to(original.dtype)
    if not torch.isfinite(rounded).all():
        raise BadDelta(f"{name} overflows {original.dtype} under patches {', '.join(t.id[:12] for t in terms)}")
    return rounded


def composition_digest(base: Base, composed: dict[str, Tensor]) -> str:
    """The digest of the whole model with `composed` laid on: the base's fingerprint when nothing is changed."""
    digests = base.digests(base.names)
    digests.update({name: tensor_digest(name, tensor) for name, tensor in composed.items()})
    return combined_digest(digests)
