"""What the tests of training solvers share: a tiny problem, and what a delta does to a tiny base's predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.patches.compose import Term
from overpaint.patches.delta import Delta
from overpaint.patches.live import Overlay
from overpaint.solvers.problem import EditProblem, Solution
from overpaint.solvers.trained.denoiser import Denoiser
from overpaint.solvers.trained.training import Training

CAT, DOG, CAR = Concept("cat"), Concept("dog"), Concept("car")
WATCHED = -10.0
"""A value of `until` with which what is left is measured and never reached."""


def solve(base: Base, solver: Training, concept: Concept = CAT, seed: int = 0) -> Solution:
    """The solution for a concept among three."""
    return solver.solve(EditProblem(base, concept, (CAT, DOG, CAR), seed))


@torch.no_grad()
def predictions(base: Base, delta: Delta | None, *prompts: str) -> Tensor:
    """What a base predicts under each prompt with a delta laid on it, [prompts, 3, c, h, w]: three levels of noise."""
    model = Denoiser.of(EditProblem(base, CAT))
    x = torch.randn((1, *model.shape), generator=torch.Generator().manual_seed(5)).repeat(3, 1, 1, 1)
    t = torch.tensor([900, 500, 100])
    with Overlay(model.pipe, base) as overlay:
        overlay.set([Term("a", delta)] if delta is not None else [])
        return torch.stack([model(x, t, model.encode([prompt] * 3)) for prompt in prompts])


def moved(base: Base, delta: Delta, prompt: str) -> float:
    """How far a prompt's prediction moves, relative to what the prompt contributes."""
    before, empty = predictions(base, None, prompt, "")
    after = predictions(base, delta, prompt)[0]
    return float((after - before).norm() / (before - empty).norm())


def apart(base: Base, delta: Delta, prompt: str, other: str) -> float:
    """How far apart the predictions for two prompts are with a delta, relative to how far they were."""
    before, after = (predictions(base, laid, prompt, other).diff(dim=0) for laid in (None, delta))
    return float(after.norm() / before.norm())


def names(delta: Delta, base: Base) -> set[str]:
    """The tensors that a delta changes."""
    return set(delta.targets(base))
