"""A solver that answers at once, counts how often it is asked, and fails or is interrupted where a test wants it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from overpaint.patches.delta import Dense, TextMap
from overpaint.solvers.problem import EditProblem, Solution, Solver, Unsolvable, setting

SQUARE = "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight"
CALLS: list[str] = []
"""The concepts that were asked for, in order."""
UNSOLVABLE: set[str] = set()
INTERRUPTED: set[str] = set()
UNIVERSES: list[tuple[str, ...]] = []


def reset() -> None:
    for each in (CALLS, UNSOLVABLE, INTERRUPTED, UNIVERSES):
        each.clear()


@dataclass(frozen=True)
class Counting(Solver):
    """A change that follows from the concept's name, the seed and the size."""

    size: float = setting(0.01, "size of the change", low=0.0)
    dense: bool = setting(False, "change one whole tensor")
    images: str = setting("", "a folder with pictures of the concept")

    def solve(self, problem: EditProblem) -> Solution:
        name = problem.concept.name
        CALLS.append(name)
        UNIVERSES.append(tuple(other.name for other in problem.others))
        problem.report(1, 2, "counting")
        if name in UNSOLVABLE:
            raise Unsolvable(f"{name} cannot be erased; choose another")
        if name in INTERRUPTED:
            raise KeyboardInterrupt
        seed = int.from_bytes(hashlib.sha256(f"{name} {problem.seed}".encode()).digest()[:4], "big")
        random = torch.Generator().manual_seed(seed)
        if self.dense:
            change = self.size * torch.randn(problem.base.places[SQUARE].shape, generator=random)
            return Solution(Dense({SQUARE: change}), {})
        up, down = (self.size * torch.randn(64, 4, generator=random) for _ in range(2))
        return Solution(TextMap("text_encoder", up, down), {})
