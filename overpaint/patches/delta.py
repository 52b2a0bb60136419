"""Deltas: immutable maps from canonical tensor name to a change.

A text map says once, for a text encoder, what every projection that reads it shall do; a low-rank delta holds two thin
factors per tensor; a dense one the change itself. Factors of different deltas are never added to each other: a sum of
products is not the product of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.errors import OverpaintError


class BadDelta(OverpaintError):
    """A change that does not fit: a wrong shape, a value that is not finite, a tensor the base lacks."""


@dataclass(frozen=True, eq=False)
class TextMap:
    """`W0 up down^T` for every projection W0 (out x d) that reads `encoder`; up and down are d x k."""

    encoder: str
    up: Tensor
    down: Tensor
    kind = "text-map"

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.up.shape != self.down.shape:
            raise BadDelta(
                f"a text map's factors must both be d x k; got {list(self.up.shape)}, {list(self.down.shape)}"
            )
        _check_finite({"up": self.up, "down": self.down})

    def tensors(self) -> dict[str, Tensor]:
        """The arrays to store, by storage name."""
        return {f"{self.encoder}/up": self.up, f"{self.encoder}/down": self.down}

    def targets(self, base: Base) -> list[str]:
        """The tensors of a base this delta changes. Raises BadDelta when there are none or their width is another."""
        names = base.readers(self.encoder) if self.encoder in base.layout.text_readers else []
        if not names:
            raise BadDelta(f"this text map is for {self.encoder}, which no projection of the base at {base.path} reads")
        return names

    def change(self, name: str, weight: Tensor) -> Tensor:
        """The change to `weight` (float64, out x d)."""
        if weight.ndim != 2 or weight.shape[1] != self.up.shape[0]:
            raise BadDelta(
                f"this text map is for text width {self.up.shape[0]}, but {name} has shape {list(weight.shape)}; "
                "it was solved for another text encoder"
            )
        return (weight @ self.up.to(weight)) @ self.down.to(weight).T


@dataclass(frozen=True, eq=False)
class LowRank:
    """`up down` per tensor: factors out x r and r x in, by canonical name."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    kind = "low-rank"

    def __post_init__(self) -> None:
        for name, (up, down) in self.factors.items():
            if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
                raise BadDelta(f"{name}: factors {list(up.shape)} and {list(down.shape)} do not multiply")
            _check_finite({name: up})
            _check_finite({name: down})

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, (up, down) in self.factors.items():
            found[f"{name}/up"], found[f"{name}/down"] = up, down
        return found

    def targets(self, base: Base) -> list[str]:
        return _present(base, self.factors)

    def change(self, name: str, weight: Tensor) -> Tensor:
        up, down = self.factors[name]
        return _fits(name, weight, up.to(weight) @ down.to(weight))


@dataclass(frozen=True, eq=False)
class Dense:
    """One array per tensor, by canonical name."""

    changes: Mapping[str, Tensor]
    kind = "dense"

    def __post_init__(self) -> None:
        _check_finite(self.changes)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.changes)

    def targets(self, base: Base) -> list[str]:
        return _present(base, self.changes)

    def change(self, name: str, weight: Tensor) -> Tensor:
        return _fits(name, weight, self.changes[name].to(weight))


Delta = TextMap | LowRank | Dense


def delta_from(kind: str, tensors: Mapping[str, Tensor]) -> Delta:
    """Read back what `Delta.tensors` gave. Raises BadDelta on an unknown kind or missing factors."""
    if kind == "dense":
        return Dense(dict(tensors))
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, side = key.rpartition("/")
        pairs.setdefault(name, {})[side] = tensor
    if any(set(pair) != {"up", "down"} for pair in pairs.values()):
        raise BadDelta(f"a {kind} delta needs an up and a down factor for each name; got {sorted(tensors)[:4]}")
    if kind == "low-rank":
        return LowRank({name: (pair["up"], pair["down"]) for name, pair in pairs.items()})
    if kind == "text-map" and len(pairs) == 1:
        ((encoder, pair),) = pairs.items()
        return TextMap(encoder, pair["up"], pair["down"])
    raise BadDelta(
        f"unknown kind of delta {kind!r} with {len(pairs)} parts; this program knows text-map, low-rank, dense"
    )


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise BadDelta(f"{name} has values that are not finite; the solver diverged: lower its learning rate")


def _present(base: Base, names: Iterable[str]) -> list[str]:
    wanted = sorted(names)
    missing = [name for name in wanted if name not in base.places]
    if missing:
        raise BadDelta(
            f"the patch names {len(missing)} of {len(wanted)} tensors that the base at {base.path} lacks, "
            f"first {missing[0]}; it was solved for another architecture"
        )
    return wanted


def _fits(name: str, weight: Tensor, change: Tensor) -> Tensor:
    if change.shape != weight.shape:
        raise BadDelta(f"{name} has shape {list(weight.shape)} in the base and {list(change.shape)} in the patch")
    return change
