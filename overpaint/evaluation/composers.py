"""Ways to put several patches on one base, besides laying them side by side: what the `scale` suite compares.

Task arithmetic (Ilharco et al., ICLR 2023) scales every patch by one factor. TIES (Yadav et al., NeurIPS 2023) keeps of each
the largest changes, lets them vote on a sign for every weight, and averages those that agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import Dense

TASK_SCALE = 0.4
"""The factor that Yadav et al. recommend where nothing can be tuned."""
TIES_KEEP, TIES_SCALE = 0.2, 1.75
"""The share of changes that is kept, and the factor of their mean, as CUIG (ICLR 2026) merges erasers."""


def task_arithmetic(terms: Sequence[Term], scale: float = TASK_SCALE) -> list[Term]:
    """Every patch at `scale` times its strength; a single one as it is, because there is nothing to merge."""
    return list(terms) if len(terms) == 1 else [replace(term, strength=scale * term.strength) for term in terms]


def ties(base: Base, terms: Sequence[Term], keep: float = TIES_KEEP, scale: float = TIES_SCALE) -> list[Term]:
    """One dense term, the TIES merge of `terms`; a single one as it is."""
    if len(terms) == 1:
        return list(terms)
    ordered = sorted(terms, key=lambda term: term.id)
    changes = [_trimmed(_changes(base, term), keep) for term in ordered]
    names = sorted({name for change in changes for name in change})
    merged = {name: scale * _elected([c[name] for c in changes if name in c]) for name in names}
    label = "ties " + hashlib.sha256(repr([(t.id, t.strength, keep, scale) for t in ordered]).encode()).hexdigest()
    return [Term(label, Dense(merged))]


def _changes(base: Base, term: Term) -> dict[str, Tensor]:
    return {name: value.float() - base.tensor(name).float() for name, value in compose(base, [term]).items()}


def _trimmed(changes: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The largest changes of one patch, over all its tensors; the others 0."""
    sizes = torch.cat([change.abs().flatten() for change in changes.values()])
    least = sizes.kthvalue(max(1, sizes.numel() - round(keep * sizes.numel()) + 1)).values
    return {name: change.where(change.abs() >= least, torch.zeros(())) for name, change in changes.items()}


def _elected(changes: Sequence[Tensor]) -> Tensor:
    """The mean of the changes that have the sign of their sum, value by value."""
    stacked = torch.stack(list(changes))
    agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
