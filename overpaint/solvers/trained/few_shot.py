"""Few-shot unlearning: the text encoder forgets with a few pictures of the concept, in full or at low rank.

Both maximise the loss of textual inversion: the error in denoising the pictures under a sentence that names the concept.
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
from overpaint.solvers.sentences import retained_prompts, training_prompts
from overpaint.solvers.trained.adapters import (
    AdapterStack,
    DenseAdapter,
    LowRankAdapter,
    TextMapAdapter,
    encoder_layer_tensors,
)
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
    """Make the text encoder forget with a few pictures; defaults are the paper's.

    Fuchi and Takagi, BMVC 2024, arXiv 2405.07288: `min - E |eps - eps_theta(z_t, t, tau(y))|^2`, with z of the pictures, y a
    sentence that names the concept and tau the text encoder. Trained are the encoder's feed-forward layers and all of its last
    self-attention; nothing else is preserved, so that the number of steps (the paper: 4 pictures, batches of 2, 4 or 5 epochs)
    decides what else is lost. `zero_shot` puts uniform noise in the place of pictures, as in the paper's code.

    `until` goes beyond the paper: it stops once the prompt has lost its guidance.
    """

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


@dataclass(frozen=True)
class FewShotLoRA(Training):
    """Make the last text-encoder layers forget with a few pictures, at low rank; defaults are ours but for the rank.

    After Shreyas and Aadarsh (arXiv 2505.12395), our formulation. The paper adapts the last layers of the text encoder and its
    projection, `P' = P + A B^T`, to a few pictures of the concept, with a weighted loss of a textual-inversion term and of
    prompts to retain; its weights and hyper-parameters are not published. Ours is
    `min - a E |eps - eps_theta(z_t, t, f(y))|^2 + b mean |f(r) - f0(r)|^2 + c |A B^T|^2`, over sentences y that name the concept
    and prompts r that do not; f is what the denoiser reads, f0 that of the base. No base has a projection that belongs to the
    text encoder alone, so P is the identity, and `A B^T` a text map at each text input: the delta is low-rank throughout.
    """

    PRESETS: ClassVar = MappingProxyType(
        {
            "emoji": {
                # Stopped by what is left of the concept, and held to the retained prompts, it serves other bases as well.
                "steps": 80,
                "until": 0.0,
                "lr": 2e-3,
                "retain": 40.0,
                "batch": 8,
                "layers": 2,
                "pictures": 8,
                "sampling_steps": 12,
                "guidance": 3.0,
            }
        }
    )

    steps: int = setting(100, "most gradient steps", low=1)
    lr: float = setting(1e-4, "learning rate", low=0.0)
    batch: int = setting(2, "noised latents per step", low=1)
    sentences: int = setting(
        64, "train on this many sentences that name the concept, spread over its words; 0: on its bare words", low=0
    )
    guidance: float = setting(7.5, "guidance scale of what the base draws to train on", low=0.0)
    rank: int = setting(8, "directions per tensor (the paper: 4 to 8)", low=1)
    layers: int = setting(4, "how many of the text encoder's last layers are adapted", low=1)
    images: str = setting("", "a folder with pictures of the concept; empty: the base draws them")
    pictures: int = setting(
        4, "pictures that the base draws, or that the folder has at least (the paper: 4 or 5)", low=1
    )
    forget: float = setting(1.0, "a, the weight of the textual-inversion term", low=0.0)
    retain: float = setting(1.0, "b, the weight of the retained prompts", low=0.0)
    shrink: float = setting(0.0, "c, the weight of the projection's squared norm", low=0.0)
    retained: int = setting(512, "how many prompts are retained besides the empty one", low=0)
    retain_batch: int = setting(16, "how many of them a step looks at, besides the empty one", low=1)

    @property
    def uses_universe(self) -> bool:
        return self.retain > 0 and self.retained > 1

    @property
    def uses_preserved_prompts(self) -> bool:
        return self.retain > 0

    trains_whole_tensors = False

    def touches(self, base: Base) -> Sequence[str]:
        return [*self._matrices(base), *base.projections()]

    def _matrices(self, base: Base) -> list[str]:
        found = encoder_layer_tensors(base, feed_forward=self.layers, attention=self.layers)
        return [name for name in found if name.endswith(".weight")]

    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        """Low-rank factors in the text encoders, and a text map for each text input."""
        random = generator(problem.seed, BEFORE)
        layers = LowRankAdapter(model.pipe, problem.base, self._matrices(problem.base), self.rank, random)
        projections = {
            name: TextMapAdapter(name, place.width, self.rank, random, model.device)
            for name, place in model.inputs.items()
        }
        change = AdapterStack(layers, *projections.values())
        pairs = training_prompts(problem, model.encoder, self.sentences)
        kept = retained_prompts(problem, model.encoder, self.retained)
        meant = model.hidden(kept)
        preserved = len(problem.preserved_prompts())
        found = gathered(
            model,
            problem,
            [prompt for prompt, _ in pairs],
            folder=self.images,
            count=self.pictures,
            steps=self.sampling_steps,
            guidance=self.guidance,
        )

        def loss(random: torch.Generator) -> StepResult:
            x, t, goal, _ = model.noised(found.latents, random, self.batch)
            chosen = [pairs[i] for i in torch.randint(len(pairs), (self.batch,), generator=random).tolist()]
            prompts, without = zip(*chosen, strict=True)
            also = [0, *torch.randint(len(kept), (self.retain_batch,), generator=random).tolist()]
            if preserved:
                also += (1 + torch.randperm(preserved, generator=random)[: self.retain_batch]).tolist()
            said = model.mapped(model.encode([*prompts, *(kept[i] for i in also)]), projections)
            guess = model(x, t, said[: self.batch])
            drift = said[self.batch :].drift(meant[also])
            size = torch.stack([projection.size() for projection in projections.values()]).sum()
            total = self.retain * drift - self.forget * F.mse_loss(guess, goal) + self.shrink * size
            left = None
            if self.watches:
                left = concept_remaining(guess, model, change, x, t, *base_texts(model, change, prompts, without))
            return StepResult(total, left)

        return TrainingTask(change, loss, facts={"images": list(found.digests), "retained": len(kept)})
