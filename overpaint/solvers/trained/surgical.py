"""A surgical update of the guidance term, after All but One (Hong, Lee and Woo, AAAI 2024, arXiv 2312.12807), our formulation.

Guidance is `eps(x, c) - eps(x, '')`, the direction in which a prompt c pulls. The paper replaces that of the concept by that of
an alternative concept and holds the unconditional score where it was; its formulas are not reproduced here. Ours:
`min |(eps(x_t, c; theta) - sg eps(x_t, ''; theta)) - (eps(x_t, c'; theta0) - eps(x_t, ''; theta0))|^2
+ lambda |eps(x_t, ''; theta) - eps(x_t, ''; theta0)|^2`, with c' the prompt with the concept's anchor in its place, or without
the concept, sg no gradient, and x_t denoised by the base under c down to a random t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F

from overpaint.bases.base import Base
from overpaint.solvers.problem import EditProblem, setting
from overpaint.solvers.sentences import training_prompts
from overpaint.solvers.trained.adapters import CROSS_ATTENTION, UNET, DenseAdapter, tensors
from overpaint.solvers.trained.denoiser import Denoiser
from overpaint.solvers.trained.training import (
    BEFORE,
    StepResult,
    Training,
    TrainingTask,
    Trajectories,
    generator,
    share_left,
)


@dataclass(frozen=True)
class Surgical(Training):
    """Replace the concept's guidance and hold the unconditional score; defaults are ours, on the scale of ESD's."""

    PRESETS: ClassVar = MappingProxyType(
        {"emoji": {"steps": 100, "lr": 3e-4, "batch": 16, "sentences": 64, "sampling_steps": 20, "bank": 64}}
    )

    uses_universe = False

    part: str = setting(CROSS_ATTENTION, "what is trained", choices=(CROSS_ATTENTION, UNET))
    keep: float = setting(1.0, "lambda, the weight of the unconditional drift", low=0.0)
    bank: int = setting(0, "trajectories of the base to draw all x_t from; 0: denoise anew at every step", low=0)

    def touches(self, base: Base) -> Sequence[str]:
        return tensors(base, self.part)

    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        """A dense change of the part."""
        change = DenseAdapter(model.pipe, problem.base, self.touches(problem.base))
        pairs = training_prompts(problem, model.encoder, self.sentences)
        named, instead = (model.hidden(side) for side in zip(*pairs, strict=True))
        empty = model.unconditional.expand(self.batch)
        states = Trajectories(model, named, self.guidance, self.sampling_steps, change.off)
        states = states.with_bank(self.bank, generator(problem.seed, BEFORE), problem.report)

        def loss(random: torch.Generator) -> StepResult:
            x, t, which = states.draw(random, self.batch)
            with torch.no_grad(), change.off():
                with_it, other = model.both(x, t, named[which], instead[which])
                nothing = model(x, t, empty)
            found, drifted = model.both(x, t, named[which], empty)
            erase = F.mse_loss(found - drifted.detach(), other - nothing)
            loss = erase + self.keep * F.mse_loss(drifted, nothing)
            return StepResult(loss, share_left(found - drifted + nothing, with_it, other), (x, t))

        return TrainingTask(change, loss)
