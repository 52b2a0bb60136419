"""SPM: one-dimensional adapters (Lyu et al., CVPR 2024, arXiv 2312.16145).

Beside every linear layer and convolution of the U-Net's transformer blocks stands an adapter of rank one, `W x + u (v^T x)`.
The concept's prediction becomes that of a surrogate c', moved away from the concept by eta, while the predictions for other
embeddings c~ stay where they were (latent anchoring):
`min |eps(x_t, c; theta) - (eps(x_t, c') - eta (eps(x_t, c) - eps(x_t, c')))|^2
+ lambda E |eps(x_t, c~; theta) - eps(x_t, c~)|^2`. x_t is denoised by the adapted model under c. c~ are Gaussian, of 0.8 to
1.2 times the norm of c, accepted with probability 1 - cos(c, c~); or, which the paper does not have, real prompts that do
not name the concept.

Several such patches compose as the sum of their products u v^T, as the paper has it (its code adds up the factors first). Its
facilitated transport scales adapters by prompt at inference; a patch of weights has one strength instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.solvers.problem import EditProblem, setting
from overpaint.solvers.sentences import retained_prompts
from overpaint.solvers.trained.adapters import LowRankAdapter, block_layers
from overpaint.solvers.trained.denoiser import Conditioning, Denoiser
from overpaint.solvers.trained.training import (
    BEFORE,
    StepResult,
    Training,
    TrainingTask,
    denoised_pairs,
    generator,
    share_left,
)


@dataclass(frozen=True)
class SPM(Training):
    """Train thin adapters that leave everything else anchored; defaults are the paper's."""

    PRESETS: ClassVar = MappingProxyType(
        {
            "emoji": {
                "steps": 60,
                "lr": 1e-2,
                "batch": 6,
                "sentences": 64,
                "sampling_steps": 15,
                "anchoring": 10.0,
                "anchors": 1,
                "anchored": "prompts",
                "warm_up": 6,
                "cycles": 1,
                "bank": 24,
            }
        }
    )

    steps: int = setting(3000, "most gradient steps", low=1)
    lr: float = setting(1e-4, "highest learning rate", low=0.0)
    sampling_steps: int = setting(30, "denoising steps of what is drawn to train on", low=1, high=1000)
    rank: int = setting(1, "directions per adapter", low=1)
    eta: float = setting(1.0, "how far beyond the surrogate, in units of the concept's guidance", low=0.0)
    anchoring: float = setting(1000.0, "lambda, the weight of latent anchoring", low=0.0)
    anchors: int = setting(4, "embeddings that are anchored per step and latent", low=1)
    anchored: str = setting("noise", "what is anchored", choices=("noise", "prompts"))
    warm_up: int = setting(500, "steps in which the learning rate rises", low=0)
    cycles: int = setting(3, "how often it falls to zero along half a cosine", low=1)
    bank: int = setting(
        0, "trajectories of the base to draw all x_t from; 0: denoise anew at every step, as in the paper", low=0
    )

    @property
    def uses_universe(self) -> bool:
        return self.anchored == "prompts"

    trains_whole_tensors = False

    @property
    def graph_latents(self) -> int:
        return (2 + self.anchors) * self.batch

    def touches(self, base: Base) -> Sequence[str]:
        return block_layers(base)

    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        """A low-rank change of the transformer blocks."""
        random = generator(problem.seed, BEFORE)
        change = LowRankAdapter(model.pipe, problem.base, self.touches(problem.base), self.rank, random)
        named, surrogate, states = denoised_pairs(model, problem, self, self.bank, random)
        anchors = self._anchors(model, problem)

        def loss(random: torch.Generator) -> StepResult:
            x, t, which = states.draw(random, self.batch)
            others = anchors(named[which].repeat(self.anchors), random)
            many, times = x.repeat(1 + self.anchors, 1, 1, 1), t.repeat(1 + self.anchors)
            texts = Conditioning.cat(named[which], others)
            with torch.no_grad(), change.off():
                with_it, still = (before := model(many, times, texts))[: len(x)], before[len(x) :]
                instead = model(x, t, surrogate[which])
            found = model(many, times, texts)
            away = instead - self.eta * (with_it - instead)
            erase, anchor = F.mse_loss(found[: len(x)], away), F.mse_loss(found[len(x) :], still)
            return StepResult(erase + self.anchoring * anchor, share_left(found[: len(x)], with_it, instead), (x, t))

        return TrainingTask(change, loss, torch.optim.AdamW, self._rate)

    def _anchors(
        self, model: Denoiser, problem: EditProblem
    ) -> Callable[[Conditioning, torch.Generator], Conditioning]:
        """What draws one embedding to anchor for each of the concept's."""
        if self.anchored == "noise":
            return lambda like, random: like.map(lambda part: noise_like(part, random))
        texts = model.hidden(retained_prompts(problem, model.encoder, 512))
        return lambda like, random: texts[torch.randint(len(texts), (len(like),), generator=random).to(texts.device)]

    def _rate(self, step: int) -> float:
        """A cosine with restarts after a linear rise."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return 0.5 * (1 + math.cos(math.pi * (self.cycles * done % 1)))


def noise_like(texts: Tensor, random: torch.Generator) -> Tensor:
    """For each embedding [n, length, d], Gaussian noise of about its norm that is not too like it."""
    found = torch.empty_like(texts)
    for i, text in enumerate(texts):
        while True:
            noise = torch.randn(text.shape, generator=random).to(text)
            likeness = F.cosine_similarity(noise.flatten(), text.flatten(), dim=0)
            if torch.rand((), generator=random) < 1 - likeness.cpu():
                break
        scale = 0.8 + 0.4 * float(torch.rand((), generator=random))
        found[i] = scale * text.norm() * noise / noise.norm()
    return found
