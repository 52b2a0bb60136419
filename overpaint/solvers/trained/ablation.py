"""Concept Ablation (Kumari et al., ICCV 2023, arXiv 2303.13516).

What the model draws for the concept becomes what it draws for an anchor. With x pictures that the base draws for prompts c*
with the anchor, and c the same prompts with the concept's words in its place, the model-based variant is
`min E |eps(x_t, c; theta) - sg eps(x_t, c*; theta)|^2`, sg no gradient; the noise-based, `min E |eps(x_t, c; theta) - eps|^2`
with eps the noise that was added. `prior` adds the loss of training, `|eps(x_t, c*; theta) - eps|^2`, which the paper uses
where anchor and concept overlap. Without an anchor, c* is the prompt with the concept left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from overpaint.bases.base import Base
from overpaint.solvers.problem import EditProblem, setting
from overpaint.solvers.sentences import training_prompts
from overpaint.solvers.trained.adapters import ATTENTION, KEYS_AND_VALUES, UNET, DenseAdapter, tensors
from overpaint.solvers.trained.denoiser import Denoiser
from overpaint.solvers.trained.training import StepResult, Training, TrainingTask, concept_remaining, drawn


@dataclass(frozen=True)
class Ablation(Training):
    """Let the concept be drawn as its anchor; defaults are the paper's for one device."""

    PRESETS: ClassVar = MappingProxyType(
        {
            "emoji": {
                "steps": 60,
                "lr": 5e-4,
                "batch": 8,
                "sentences": 64,
                "sampling_steps": 12,
                "guidance": 3.0,
                "pictures": 32,
            }
        }
    )

    uses_universe = False

    steps: int = setting(200, "most gradient steps", low=1)
    lr: float = setting(8e-6, "learning rate (the paper: 2e-6 times the batch)", low=0.0)
    batch: int = setting(4, "noised latents per step", low=1)
    guidance: float = setting(6.0, "guidance scale of what the base draws to train on", low=0.0)
    part: str = setting(KEYS_AND_VALUES, "what is trained", choices=(KEYS_AND_VALUES, ATTENTION, UNET))
    target: str = setting(
        "model", "predict as the model does for the anchor, or the true noise", choices=("model", "noise")
    )
    pictures: int = setting(200, "pictures that the base draws for the anchor", low=1)
    prior: float = setting(0.0, "weight of the loss of training on the anchor", low=0.0)

    def touches(self, base: Base) -> Sequence[str]:
        return tensors(base, self.part)

    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        """A dense change of the part."""
        change = DenseAdapter(model.pipe, problem.base, self.touches(problem.base))
        pairs = training_prompts(problem, model.encoder, self.sentences)
        named, anchor = (model.hidden(side) for side in zip(*pairs, strict=True))
        found = drawn(
            model, problem, [prompt for _, prompt in pairs], self.pictures, self.sampling_steps, self.guidance
        )

        def loss(random: torch.Generator) -> StepResult:
            x, t, noise, which = model.noised(found.latents, random, self.batch)
            said, meant = (side[[i % len(pairs) for i in which]] for side in (named, anchor))
            guess = model(x, t, said)
            # With a prior, the anchor's own prediction is trained; as a target it must stand still all the same.
            with torch.set_grad_enabled(self.prior > 0):
                by_anchor = model(x, t, meant) if self.prior or self.target == "model" else noise
            total = F.mse_loss(guess, by_anchor.detach() if self.target == "model" else noise)
            if self.prior:
                total = total + self.prior * F.mse_loss(by_anchor, noise)
            own = by_anchor if self.target == "model" else None
            left = concept_remaining(guess, model, change, x, t, said, meant, own) if self.watches else None
            return StepResult(total, left, (x, t))

        return TrainingTask(change, loss, adamw)


def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW as the paper's code has it."""
    return torch.optim.AdamW(parameters, lr, weight_decay=1e-2)
