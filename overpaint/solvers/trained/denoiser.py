"""A working copy of a base's denoiser, and where the noised latents come from on which solvers train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.loading import quiet_loading
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.progress import Progress
from overpaint.solvers.problem import EditProblem, Unsolvable

TOGETHER = 16
"""At most so many latents are denoised at once while nothing is trained."""


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A base's models, loaded anew: frozen, in float32, computing in `dtype`. What is trained here changes no other copy.

    `encoder` is a second copy of the text encoder, which stays the base's while the pipeline's own may be trained.
    """

    pipe: Any
    encoder: TextEncoder
    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, problem: EditProblem, *, precision: str = "fp32", checkpoint: bool = False) -> Denoiser:
        """The models of a problem's base on its device. Raises Unsolvable for one that is no Stable Diffusion 1.x or 2.x."""
        if len(problem.base.text_inputs) > 1:
            raise Unsolvable(
                f"training solvers work with one text input; this {problem.base.layout.name} base has "
                f"{len(problem.base.text_inputs)} ({', '.join(problem.base.text_inputs)}): use `separable`, which knows them all"
            )
        if problem.base.layout.is_caught:
            raise Unsolvable(
                f"solvers that train know the U-Net of Stable Diffusion 1.x and 2.x; this is a {problem.base.layout.name} base: "
                "use `separable`, which knows all bases"
            )
        pipe = problem.base.pipeline(device=str(problem.device))
        if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise Unsolvable(
                "solvers that train know denoisers that draw from a prompt alone, and this base also reads a picture "
                f"({problem.base.pipeline_class}): use `separable`, whose patches fit it as they fit any"
            )
        for module in (pipe.unet, pipe.text_encoder, pipe.vae):
            module.eval().requires_grad_(False)
        if checkpoint:
            pipe.unet.enable_gradient_checkpointing()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return cls(pipe, TextEncoder.of(problem.base, problem.device), problem.device, dtype)

    @property
    def levels(self) -> int:
        """Timesteps of the noise schedule; 0 has the least noise."""
        return len(self.pipe.scheduler.alphas_cumprod)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        config = self.pipe.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """What the U-Net predicts (noise, or velocity where the base was trained so): float32, of the shape of x.

        `x` is [n, c, h, w], `t` timesteps [n], `text` embeddings [n, length, d].
        """
        # Without the cache: a weight cast while nothing was recorded would be used again where gradients are wanted.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            found: Tensor = self.pipe.unet(x, t, encoder_hidden_states=text).sample
        return found.float()

    def both(self, x: Tensor, t: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The predictions under two texts, in one pass."""
        found = self(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([first, second]))
        return found[: len(x)], found[len(x) :]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [n, length, d] by the pipeline's own text encoder, with gradients where it is trained."""
        tokens = self.pipe.tokenizer(
            list(prompts), padding="max_length", max_length=self.encoder.length, truncation=True, return_tensors="pt"
        )
        hidden: Tensor = self.pipe.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state
        return hidden

    def noised(self, latents: Tensor, random: torch.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """`batch` of the latents with noise of random levels: x_t, t, what the U-Net should predict, and which they are.

        No latent comes twice before all have come once.
        """
        order = torch.cat([torch.randperm(len(latents), generator=random) for _ in range(-(-batch // len(latents)))])
        which = order[:batch].tolist()
        chosen = latents[which]
        t = torch.randint(self.levels, (batch,), generator=random).to(self.device)
        noise = torch.randn(chosen.shape, generator=random).to(self.device)
        schedule = self.pipe.scheduler
        velocity = schedule.config.prediction_type == "v_prediction"
        goal = schedule.get_velocity(chosen, noise, t) if velocity else noise
        return schedule.add_noise(chosen, noise, t), t, goal, which

    def sampler(self, steps: int) -> Any:
        """A DDIM scheduler (Song et al., arXiv 2010.02502) of the base's noise schedule with so many timesteps."""
        with quiet_loading():
            from diffusers import DDIMScheduler

            found: Any = DDIMScheduler.from_config(self.pipe.scheduler.config)
        # With the offset that published schedules have, as many timesteps as levels would end beyond the last level.
        found.set_timesteps(min(steps, self.levels - 1))
        return found


@dataclass(frozen=True, eq=False)
class Trajectories:
    """x_t by partial denoising under one of several texts, with classifier-free guidance against the empty prompt.

    Without a `bank`, every draw denoises anew down to one random timestep, within `acting` (which makes the model what it
    should be then). With one, draws choose among all states of trajectories that were denoised once; that costs a small
    fraction, and t varies within a batch.
    """

    model: Denoiser
    texts: Tensor
    guidance: float
    steps: int
    acting: Callable[[], AbstractContextManager[Any]] = nullcontext
    bank: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def with_bank(self, size: int, random: torch.Generator, report: Progress) -> Trajectories:
        """The same with a bank of `size` trajectories, denoised now; as it is for 0."""
        if not size:
            return self
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, size, TOGETHER):
            report(0, size, f"denoising {start} of {size} trajectories")
            asked = torch.randint(len(self.texts), (min(TOGETHER, size - start),), generator=random)
            found += [(x.cpu(), torch.full_like(asked, t), asked) for x, t in self._states(asked, random)]
        states, times, texts = (torch.cat(parts) for parts in zip(*found, strict=True))
        return replace(self, bank=(states, times, texts))

    @torch.no_grad()
    def draw(self, random: torch.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_t [n, c, h, w], t [n], and which of the texts each was drawn under [n]."""
        device = self.model.device
        if self.bank is not None:
            chosen = torch.randint(len(self.bank[0]), (batch,), generator=random)
            states, times, texts = (part[chosen].to(device) for part in self.bank)
            return states, times, texts
        texts = torch.randint(len(self.texts), (batch,), generator=random)
        stop = int(torch.randint(len(self._sampler.timesteps), (1,), generator=random))
        x, t = self._states(texts, random, stop)[-1]
        return x, torch.full((batch,), t, device=device), texts.to(device)

    @cached_property
    def _sampler(self) -> Any:
        return self.model.sampler(self.steps)

    @cached_property
    def _empty(self) -> Tensor:
        return self.model.encoder.hidden([""])

    def _states(self, asked: Tensor, random: torch.Generator, last: int = -1) -> list[tuple[Tensor, int]]:
        """The states of a batch of trajectories with their timesteps, from pure noise to number `last`, or to the end."""
        model, times = self.model, self._sampler.timesteps.tolist()
        x = torch.randn((len(asked), *model.shape), generator=random).to(model.device) * self._sampler.init_noise_sigma
        text, empty = self.texts[asked.to(self.texts.device)], self._empty.expand(len(asked), -1, -1)
        found = [(x, times[0])]
        with self.acting():
            for t, after in pairwise(times[: last + 1 or None]):
                named, unnamed = model.both(x, torch.full((len(x),), t, device=model.device), text, empty)
                x = self._sampler.step(unnamed + self.guidance * (named - unnamed), t, x).prev_sample
                found.append((x, after))
        return found
