"""Cross-talk: how much the patch for one concept moves every other one.

For cross-attention deltas it has a closed form. A patch i adds `dW_l` to every projection `W_l` that reads the prompt;
over a concept's keys K_j with second moment `S_j = K_j K_j^T / m`, the change of what cross-attention reads is
`effect(i, j)^2 = sum_l |dW_l K_j|^2 / sum_l |W_l K_j|^2 = tr(H_i S_j) / tr(G S_j)`, with `H_i = sum_l dW_l^T dW_l` and
`G = sum_l W_l^T W_l`. Cross-talk is `effect(i, j) / effect(i, i)`: 0 is none, 1 is as much as the patch does to its own
concept. A delta that changes other tensors has no such form; it is probed on the model instead (`probing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.concepts import Concept
from overpaint.evaluation.moments import Moments
from overpaint.evaluation.probing import probe
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import TextMap
from overpaint.patches.patch import Patch

ENCODER = "text_encoder"
WARN_ABOVE = 0.2
"""Cross-talk from which `patch add` warns."""


@dataclass(frozen=True)
class Pair:
    """A patch's concept, a concept that it moves, and by how much relative to its own."""

    emitter: str
    receiver: str
    ratio: float


@dataclass(frozen=True, eq=False)
class Crosstalk:
    """`ratios` float64 [patches, concepts]; `patches` holds (patch id, concept), `methods` "closed form" or "probed"."""

    patches: tuple[tuple[str, str], ...]
    concepts: tuple[str, ...]
    methods: tuple[str, ...]
    ratios: NDArray[np.float64]

    def pairs(self) -> list[Pair]:
        """Every pair of two different concepts, the strongest first."""
        found = [
            Pair(emitter, receiver, float(self.ratios[i, j]))
            for i, (_, emitter) in enumerate(self.patches)
            for j, receiver in enumerate(self.concepts)
            if emitter != receiver
        ]
        return sorted(found, key=lambda pair: (-pair.ratio, pair.emitter, pair.receiver))

    def above(self, threshold: float = WARN_ABOVE) -> list[Pair]:
        """The pairs that a careful person wants to hear of, the strongest first."""
        return [pair for pair in self.pairs() if pair.ratio > threshold]


def crosstalk(
    base: Base,
    patches: Sequence[Patch],
    concepts: Sequence[Concept] = (),
    *,
    cache: Path | None = None,
    device: torch.device | None = None,
) -> Crosstalk:
    """What every patch does to its own and each other's concept, and to those of `concepts`.

    `cache` is a folder where the concepts' second moments are kept between calls. Raises WrongBase for a patch of another
    base, BadDelta for one that does not fit.
    """
    where = device or torch.device("cpu")
    receivers = {patch.concept.name: patch.concept for patch in patches}
    receivers |= {concept.name: concept for concept in concepts if concept.name not in receivers}
    names = tuple(sorted(receivers))
    rows, methods = [], []
    closed = _ClosedForm(base, [receivers[name] for name in names], cache, where)
    for patch in patches:
        patch.check(base)
        in_closed_form = has_closed_form(base, patch)
        moves = closed.effects(patch) if in_closed_form else probe(base, patch, closed.concepts, where)
        methods.append("closed form" if in_closed_form else "probed")
        own = moves[names.index(patch.concept.name)]
        rows.append([move / own if own > 0 else 0.0 for move in moves])
    ratios = np.array(rows, dtype=np.float64).reshape(len(patches), len(names))
    return Crosstalk(tuple((p.id, p.concept.name) for p in patches), names, tuple(methods), ratios)


def has_closed_form(base: Base, patch: Patch) -> bool:
    """Whether a patch changes nothing but projections that read the prompt."""
    return set(patch.delta.targets(base)) <= set(base.readers(ENCODER))


class _ClosedForm:
    """The second moments of a base's projections (G) and of the concepts' keys (S_j), computed when first asked for."""

    def __init__(self, base: Base, concepts: list[Concept], cache: Path | None, device: torch.device) -> None:
        self.base, self.concepts = base, concepts
        self._readers = base.readers(ENCODER)
        self._moments = Moments(base, concepts, cache, device)
        self._read: Tensor | None = None

    def effects(self, patch: Patch) -> list[float]:
        """`effect(i, j)` for every concept j."""
        gram = self._change(patch)
        found = []
        for concept in self.concepts:
            thin = self._moments.factor(concept)
            moved = torch.einsum("dk,de,ek->", thin, gram, thin)
            found.append(
                float((moved / torch.einsum("dk,de,ek->", thin, self._all_readers(), thin)).clamp(min=0).sqrt())
            )
        return found

    def _change(self, patch: Patch) -> Tensor:
        """H of a patch, float64 [d, d]; for a text map from its factors, without touching a weight."""
        if isinstance(patch.delta, TextMap):
            up, down = patch.delta.up.double(), patch.delta.down.double()
            return down @ (up.T @ self._all_readers() @ up) @ down.T
        total = torch.zeros_like(self._all_readers())
        for name, value in compose(self.base, [Term(patch.id, patch.delta)]).items():
            step = value.double() - self.base.tensor(name).double()
            total += step.T @ step
        return total

    def _all_readers(self) -> Tensor:
        if self._read is None:
            weights = self.base.tensors(self._readers).values()
            self._read = torch.stack([w.double().T @ w.double() for w in weights]).sum(0)
        return self._read
