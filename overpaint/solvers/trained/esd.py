"""ESD: erased Stable Diffusion (Gandikota et al., ICCV 2023, arXiv 2303.07345).

The model's own guidance away from the concept becomes what it predicts under the concept's prompt c (eq. 7 there):
`min |eps(x_t, c; theta) - (eps(x_t, c0; theta0) - eta (eps(x_t, c; theta0) - eps(x_t, c0; theta0)))|^2`, on x_t that the
base denoises under c down to a random t. ESD-x trains cross-attention, x-strict its keys and values only, ESD-u every linear
layer and convolution outside of it.

In the paper c0 is the empty prompt. Here it is the prompt without the concept's words, or with the anchor in their place, which
for a bare word without anchor is the empty prompt; so that in whole sentences only the concept is moved away from. The
paper's code of 2025 writes c for c0 in the first term and 2 for eta, which is the same.
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
from overpaint.solvers.trained.adapters import (
    CROSS_ATTENTION,
    KEYS_AND_VALUES,
    DenseAdapter,
    layers,
    tensors,
    with_biases,
)
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
class ESD(Training):
    """Train the U-Net to steer away from the concept; defaults are the paper's."""

    PRESETS: ClassVar = MappingProxyType(
        {"emoji": {"steps": 100, "lr": 3e-4, "batch": 16, "sentences": 64, "sampling_steps": 20, "bank": 64}}
    )

    uses_universe = False

    variant: str = setting(
        "x", "what is trained: cross-attention, its keys and values, or all else", choices=("x", "x-strict", "u")
    )
    eta: float = setting(1.0, "how far beyond the prompt without the concept, in units of its guidance", low=0.0)
    bank: int = setting(
        0, "trajectories of the base to draw all x_t from; 0: denoise anew at every step, as in the paper", low=0
    )

    def touches(self, base: Base) -> Sequence[str]:
        if self.variant == "u":
            crossing = tensors(base, CROSS_ATTENTION)
            return with_biases(base, [name for name in layers(base) if name not in crossing])
        return tensors(base, CROSS_ATTENTION if self.variant == "x" else KEYS_AND_VALUES)

    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        """A dense change of the variant's tensors."""
        change = DenseAdapter(model.pipe, problem.base, self.touches(problem.base))
        pairs = training_prompts(problem, model.encoder, self.sentences)
        named, unnamed = (model.hidden(side) for side in zip(*pairs, strict=True))
        states = Trajectories(model, named, self.guidance, self.sampling_steps, change.off)
        states = states.with_bank(self.bank, generator(problem.seed, BEFORE), problem.report)

        def loss(random: torch.Generator) -> StepResult:
            x, t, which = states.draw(random, self.batch)
            with torch.no_grad(), change.off():
                with_it, without = model.both(x, t, named[which], unnamed[which])
            found = model(x, t, named[which])
            away = without - self.eta * (with_it - without)
            return StepResult(F.mse_loss(found, away), share_left(found, with_it, without), (x, t))

        return TrainingTask(change, loss)
