"""Few-shot unlearning of the text encoder (Fuchi and Takagi, BMVC 2024, arXiv 2405.07288).

The loss of textual inversion, turned round: `min - E |eps - eps_theta(z_t, t, tau(y))|^2`, with z of a few pictures of the
concept, y a sentence that names it and tau the text encoder. Trained are the encoder's feed-forward layers and all of its
last self-attention; nothing else is preserved, so that the number of steps (the paper: 4 pictures, batches of 2, 4 or 5
epochs) decides what else is lost. `zero_shot` puts uniform noise in the place of pictures, as in the paper's code.

`until` goes beyond the paper: it stops once the prompt has lost its guidance.
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
from overpaint.solvers.trained.adapters import DenseAdapter, encoder_layer_tensors
from overpaint.solvers.trained.denoiser import Denoiser
from overpaint.solvers.trained.training import (
    BEFORE,
    Pictures,
    StepResult,
    Training,
    TrainingTask,
    base_texts,
    concept_remaining,
    gathered,
    generator,
)


@dataclass(frozen=True)
class FewShot(Training):
    """Make the text encoder forget with a few pictures; defaults are the paper's."""

    PRESETS: ClassVar = MappingProxyType(
        {
            "emoji": {
                "steps": 40,
                "until": 0.05,
                "momentum": 0.5,
                "lr": 5e-4,
                "batch": 8,
                "pictures": 8,
                "sampling_steps": 12,
                "guidance": 3.0,
            }
        }
    )

    uses_universe = False

    steps: int = setting(8, "most gradient steps (the paper: 8 to 10)", low=1)
    batch: int = setting(2, "noised latents per step", low=1)
    sentences: int = setting(
        64, "train on this many sentences that name the concept, spread over its words; 0: on its bare words", low=0
    )
    guidance: float = setting(7.5, "guidance scale of what the base draws to train on", low=0.0)
    images: str = setting("", "a folder with pictures of the concept; empty: the base draws them")
    pictures: int = setting(4, "pictures that the base draws, or that the folder has at least", low=1)
    zero_shot: bool = setting(False, "train on uniform noise instead of pictures")

    @property
    def uses_pictures(self) -> bool:
        return bool(self.images) and not self.zero_shot

    def touches(self, base: Base) -> Sequence[str]:
        return encoder_layer_tensors(base, feed_forward=None, attention=1)

    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        """A dense change of the text encoder."""
        change = DenseAdapter(model.pipe, problem.base, self.touches(problem.base))
        pairs = training_prompts(problem, model.encoder, self.sentences)
        found = self._latents(model, problem, [prompt for prompt, _ in pairs])

        def loss(random: torch.Generator) -> StepResult:
            x, t, goal, _ = model.noised(found.latents, random, self.batch)
            chosen = [pairs[i] for i in torch.randint(len(pairs), (self.batch,), generator=random).tolist()]
            prompts, without = zip(*chosen, strict=True)
            guess = model(x, t, model.encode(prompts))
            left = None
            if self.watches:
                left = concept_remaining(guess, model, change, x, t, *base_texts(model, change, prompts, without))
            return StepResult(-F.mse_loss(guess, goal), left, (x, t))

        return TrainingTask(change, loss, adam, facts={"images": list(found.digests)})

    def _latents(self, model: Denoiser, problem: EditProblem, prompts: Sequence[str]) -> Pictures:
        if self.zero_shot:
            noise = torch.rand((self.pictures, *model.shape), generator=generator(problem.seed, BEFORE))
            return Pictures(noise.to(model.device))
        return gathered(
            model,
            problem,
            prompts,
            folder=self.images,
            count=self.pictures,
            steps=self.sampling_steps,
            guidance=self.guidance,
        )


def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Adam as the paper's code has it."""
    return torch.optim.Adam(parameters, lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-8)
