"""Cross-talk: how much the patch for one concept moves every other one.

For deltas that change nothing but what reads the prompt it has a closed form. A patch i adds `dW_l` to every projection
`W_l` that reads it; over a concept's keys K_j with second moment `S_j = K_j K_j^T`, the change of what is read is
`effect(i, j)^2 = sum_l |dW_l K_j|^2 / sum_l |W_l K_j|^2 = tr(H_i S_j) / tr(G S_j)`, with `H_i = sum_l dW_l^T dW_l` and
`G = sum_l W_l^T W_l`. Where tensors read several doors side by side, keys are what comes through all of them together;
where others read another door, both traces are sums over these groups. Cross-talk is `effect(i, j) / effect(i, i)`: 0 is
none, 1 is as much as the patch does to its own concept. A delta that changes other tensors has no such form; it is probed
on the model instead (`probing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
    return set(patch.delta.targets(base)) <= set(base.readers())


class _ClosedForm:
    """The second moments of a base's projections (G) and of the concepts' keys (S_j), computed when first asked for."""

    def __init__(self, base: Base, concepts: list[Concept], cache: Path | None, device: torch.device) -> None:
        self.base, self.concepts = base, concepts
        self._groups = [_Group(base, doors) for doors in _side_by_side(base)]
        self._moments = Moments(base, concepts, cache, device)

    def effects(self, patch: Patch) -> list[float]:
        """`effect(i, j)` for every concept j."""
        changes = [group.change(patch) for group in self._groups]
        found = []
        for concept in self.concepts:
            moved = read = 0.0
            for group, change in zip(self._groups, changes, strict=True):
                thin = self._moments.factor(concept, group.doors)
                moved += float(torch.einsum("dk,de,ek->", thin, change, thin))
                read += float(torch.einsum("dk,de,ek->", thin, group.gram, thin))
            found.append((max(0.0, moved) / read) ** 0.5)
        return found


def _side_by_side(base: Base) -> list[tuple[str, ...]]:
    """The doors of a base, those together that the same tensors read, in the order of their columns."""
    found: dict[tuple[str, ...], list[str]] = {}
    for door in base.doors:
        found.setdefault(tuple(base.readers(door)), []).append(door)
    return [tuple(sorted(doors, key=lambda door: base.columns(door, names[0]).start)) for names, doors in found.items()]


class _Group:
    """Doors that the same tensors read, and the columns of these tensors that belong to them."""

    def __init__(self, base: Base, doors: tuple[str, ...]) -> None:
        self.base, self.doors = base, doors
        self._names = base.readers(doors[0])
        self._columns = {door: base.columns(door, self._names[0]) for door in doors}
        self._width = max(columns.stop for columns in self._columns.values())

    @cached_property
    def gram(self) -> Tensor:
        """G, float64 [d, d]."""
        weights = (weight[:, : self._width].double() for weight in self.base.tensors(self._names).values())
        return torch.stack([weight.T @ weight for weight in weights]).sum(0)

    def change(self, patch: Patch) -> Tensor:
        """H of a patch, float64 [d, d]; for text maps from their factors, without touching a weight."""
        total = torch.zeros_like(self.gram)
        if all(isinstance(part, TextMap) for part in patch.delta.parts):
            maps = [part for part in patch.delta.parts if isinstance(part, TextMap) and part.encoder in self.doors]
            if maps:
                up = torch.cat([self._placed(text_map.encoder, text_map.up) for text_map in maps], 1)
                down = torch.cat([self._placed(text_map.encoder, text_map.down) for text_map in maps], 1)
                total = down @ (up.T @ self.gram @ up) @ down.T
            return total
        for name, value in compose(self.base, [Term(patch.id, patch.delta)]).items():
            if name in self._names:
                step = (value.double() - self.base.tensor(name).double())[:, : self._width]
                total += step.T @ step
        return total

    def _placed(self, door: str, factor: Tensor) -> Tensor:
        """A factor of one door among the columns of all."""
        whole = torch.zeros(self._width, factor.shape[1], dtype=torch.float64)
        whole[self._columns[door]] = factor.double()
        return whole
