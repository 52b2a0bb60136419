"""ESD, SDD, ablation and the surgical update: the denoiser is trained until a prompt no longer guides it to the concept.

They differ in what is put in the place of the concept's guidance: its opposite (ESD, erased Stable Diffusion), nothing (SDD, safe
self-distillation), or that of an anchor (ablation, surgical).
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
from overpaint.solvers.trained.adapters import (
    ATTENTION,
    CROSS_ATTENTION,
    KEYS_AND_VALUES,
    UNET,
    DenseAdapter,
    MovingAverage,
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
    concept_remaining,
    denoised_pairs,
    drawn,
    generator,
    share_left,
)


@dataclass(frozen=True)
class ESD(Training):
    """Train the U-Net to steer away from the concept; defaults are the paper's.

    Gandikota et al., ICCV 2023, arXiv 2303.07345. The model's own guidance away from the concept becomes what it predicts under
    the concept's prompt c (eq. 7 there):
    `min |eps(x_t, c; theta) - (eps(x_t, c0; theta0) - eta (eps(x_t, c; theta0) - eps(x_t, c0; theta0)))|^2`, on x_t that the
    base denoises under c down to a random t. ESD-x trains cross-attention, x-strict its keys and values only, ESD-u every linear
    layer and convolution outside of it.

    In the paper c0 is the empty prompt. Here it is the prompt without the concept's words, or with the anchor in their place,
    which for a bare word without anchor is the empty prompt; so that in whole sentences only the concept is moved away from. The
    paper's code of 2025 writes c for c0 in the first term and 2 for eta, which is the same.
    """

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
        random = generator(problem.seed, BEFORE)
        named, unnamed, states = denoised_pairs(model, problem, self, self.bank, random, change.off)

        def loss(random: torch.Generator) -> StepResult:
            x, t, which = states.draw(random, self.batch)
            with torch.no_grad(), change.off():
                with_it, without = model.both(x, t, named[which], unnamed[which])
            found = model(x, t, named[which])
            away = without - self.eta * (with_it - without)
            return StepResult(F.mse_loss(found, away), share_left(found, with_it, without), (x, t))

        return TrainingTask(change, loss)


@dataclass(frozen=True)
class Surgical(Training):
    """Replace the concept's guidance and hold the unconditional score; defaults are ours, on the scale of ESD's.

    After All but One (Hong, Lee and Woo, AAAI 2024, arXiv 2312.12807), our formulation. Guidance is `eps(x, c) - eps(x, '')`, the
    direction in which a prompt c pulls. The paper replaces that of the concept by that of an alternative concept and holds the
    unconditional score where it was; its formulas are not reproduced here. Ours:
    `min |(eps(x_t, c; theta) - sg eps(x_t, ''; theta)) - (eps(x_t, c'; theta0) - eps(x_t, ''; theta0))|^2
    + lambda |eps(x_t, ''; theta) - eps(x_t, ''; theta0)|^2`, with c' the prompt with the concept's anchor in its place, or
    without the concept, sg no gradient, and x_t denoised by the base under c down to a random t.
    """

    PRESETS: ClassVar = MappingProxyType(
        {"emoji": {"steps": 100, "lr": 3e-4, "batch": 16, "sentences": 64, "sampling_steps": 20, "bank": 64}}
    )

    uses_universe = False

    part: str = setting(CROSS_ATTENTION, "what is trained", choices=(CROSS_ATTENTION, UNET))
    keep: float = setting(1.0, "lambda, the weight of the unconditional drift", low=0.0)
    bank: int = setting(0, "trajectories of the base to draw all x_t from; 0: denoise anew at every step", low=0)

    @property
    def graph_latents(self) -> int:
        return 3 * self.batch

    def touches(self, base: Base) -> Sequence[str]:
        return tensors(base, self.part)

    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        """A dense change of the part."""
        change = DenseAdapter(model.pipe, problem.base, self.touches(problem.base))
        random = generator(problem.seed, BEFORE)
        named, instead, states = denoised_pairs(model, problem, self, self.bank, random, change.off)
        empty = model.unconditional.expand(self.batch)

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


@dataclass(frozen=True)
class SDD(Training):
    """Let the model teach itself to leave the concept out; defaults are the paper's.

    Kim et al., 2023, arXiv 2307.05977. The model under the concept's prompt learns what it predicts itself without it,
    `min |eps(z_t, c; theta) - sg eps(z_t, c0; theta)|^2` with sg no gradient, on z_t that a teacher denoises under c down to a
    random t. The teacher is the exponential moving average of the model; it is also the result. In the paper c0 is the empty
    prompt; here, the prompt without the concept's words, or with its anchor in their place, which for a bare word is the same.
    """

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
        random = generator(problem.seed, BEFORE)
        named, unnamed, states = denoised_pairs(model, problem, self, self.bank, random, teacher.held)

        def loss(random: torch.Generator) -> StepResult:
            x, t, which = states.draw(random, self.batch)
            guess = model(x, t, named[which])
            with torch.no_grad():
                without = model(x, t, unnamed[which])
            sides = named[which], unnamed[which]
            left = concept_remaining(guess, model, change, x, t, *sides, own=without) if self.watches else None
            return StepResult(F.mse_loss(guess, without), left, (x, t))

        return TrainingTask(change, loss, average=teacher)


@dataclass(frozen=True)
class Ablation(Training):
    """Let the concept be drawn as its anchor; defaults are the paper's for one device.

    Kumari et al., ICCV 2023, arXiv 2303.13516. What the model draws for the concept becomes what it draws for an anchor. With x
    pictures that the base draws for prompts c* with the anchor, and c the same prompts with the concept's words in its place,
    the model-based variant is `min E |eps(x_t, c; theta) - sg eps(x_t, c*; theta)|^2`, sg no gradient; the noise-based,
    `min E |eps(x_t, c; theta) - eps|^2` with eps the noise that was added. `prior` adds the loss of training,
    `|eps(x_t, c*; theta) - eps|^2`, which the paper uses where anchor and concept overlap. Without an anchor, c* is the prompt
    with the concept left out.
    """

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

    @property
    def graph_latents(self) -> int:
        return (3 if self.prior else 2) * self.batch

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
