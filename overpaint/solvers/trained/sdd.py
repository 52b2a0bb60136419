"""SDD: safe self-distillation (Kim et al., 2023, arXiv 2307.05977).

The model under the concept's prompt learns what it predicts itself without it,
`min |eps(z_t, c; theta) - sg eps(z_t, c0; theta)|^2` with sg no gradient, on z_t that a teacher denoises under c down to a
random t. The teacher is the exponential moving average of the model; it is also the result. In the paper c0 is the empty
prompt; here, the prompt without the concept's words, or with its anchor in their place, which for a bare word is the same.
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
from overpaint.solvers.trained.adapters import CROSS_ATTENTION, DenseAdapter, MovingAverage, tensors
from overpaint.solvers.trained.denoiser import Denoiser
from overpaint.solvers.trained.training import (
    BEFORE,
    StepResult,
    Training,
    TrainingTask,
    Trajectories,
    concept_remaining,
    generator,
)


@dataclass(frozen=True)
class SDD(Training):
    """Let the model teach itself to leave the concept out; defaults are the paper's."""

    PRESETS: ClassVar = MappingProxyType(
        {
            "emoji": {
                "steps": 80,
                "lr": 5e-4,
                "batch": 8,
                "sentences": 64,
                "sampling_steps": 15,
                "bank": 24,
                "ema": 0.9,
            }
        }
    )

    uses_universe = False

    steps: int = setting(1500, "most gradient steps", low=1)
    ema: float = setting(0.999, "weight of earlier steps in the teacher", low=0.0, high=0.99999)
    bank: int = setting(
        0,
        "trajectories of the base to draw all z_t from; 0: the teacher denoises at every step, as in the paper",
        low=0,
    )

    def touches(self, base: Base) -> Sequence[str]:
        return tensors(base, CROSS_ATTENTION)

    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        """A dense change of cross-attention."""
        change = DenseAdapter(model.pipe, problem.base, self.touches(problem.base))
        teacher = MovingAverage(change.parameters, self.ema)
        pairs = training_prompts(problem, model.encoder, self.sentences)
        named, unnamed = (model.hidden(side) for side in zip(*pairs, strict=True))
        states = Trajectories(model, named, self.guidance, self.sampling_steps, teacher.held)
        states = states.with_bank(self.bank, generator(problem.seed, BEFORE), problem.report)

        def loss(random: torch.Generator) -> StepResult:
            x, t, which = states.draw(random, self.batch)
            guess = model(x, t, named[which])
            with torch.no_grad():
                without = model(x, t, unnamed[which])
            sides = named[which], unnamed[which]
            left = concept_remaining(guess, model, change, x, t, *sides, own=without) if self.watches else None
            return StepResult(F.mse_loss(guess, without), left, (x, t))

        return TrainingTask(change, loss, average=teacher)
