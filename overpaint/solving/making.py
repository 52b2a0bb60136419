"""One patch from one order: solved, compressed where that is asked, and stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from overpaint.bases.base import Base
from overpaint.patches.patch import Patch, make_patch
from overpaint.registry.records import PatchRecord
from overpaint.registry.registry import Registry
from overpaint.solvers.problem import EditProblem
from overpaint.solving.compression import compressed
from overpaint.solving.orders import Order, Surroundings


@dataclass(frozen=True, eq=False)
class Made:
    """A patch that is not stored yet, what its solver said about it, and the seconds that took."""

    order: Order
    patch: Patch
    diagnostics: Mapping[str, Any]
    seconds: float


def make(
    order: Order,
    provenance: Mapping[str, Any],
    base: Base,
    around: Surroundings,
    device: torch.device,
    report: Callable[[int, int, str], None],
) -> Made:
    """Solve an order. Nothing is stored; what the solver raises passes through."""
    problem = EditProblem(
        base, order.concept, around.universe, order.seed, device, report, keep=around.keep, cache=around.cache
    )
    started = time.perf_counter()
    solution = order.method().solve(problem)
    seconds = time.perf_counter() - started
    patch = make_patch(base, order.concept, solution.delta, dict(provenance))
    errors: dict[str, float] = {}
    for keep in order.keeps:
        found = compressed(base, patch, keep)
        patch = found.patch
        errors = {"compression error": max(found.errors.values())}
    return Made(order, patch, {**solution.diagnostics, **errors}, seconds)


def store(registry: Registry, made: Made, base: str) -> PatchRecord:
    """Keep a patch under the name of a base. Its concept must be known."""
    return store_patch(registry, made.patch, base, made.seconds)


def store_patch(registry: Registry, patch: Patch, base: str, seconds: float) -> PatchRecord:
    """Keep a patch with the row that its manifest asks for. Raises NotFound for a concept or a base that is not known."""
    solver = patch.manifest["solver"]
    return registry.add_patch(
        id=patch.id,
        blob=patch.blob,
        concept=patch.concept.name,
        base=base,
        solver=solver["name"],
        kind=patch.delta.kind,
        settings=solver.get("settings", {}),
        seed=solver.get("seed", 0),
        seconds=seconds,
    )
