"""Noised latents by partial denoising: the states that a base passes through while it draws a prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from overpaint.core.reporting import Progress
from overpaint.solvers.trained.denoiser import TOGETHER, Conditioning, Denoiser


@dataclass(frozen=True, eq=False)
class Trajectories:
    """x_t by partial denoising under one of several texts, guided as the pipeline guides.

    Without a `bank`, every draw denoises anew down to one random timestep, within the context `acting`, in which the model
    has the weights to denoise with. With one, draws choose among all states of trajectories that were denoised once; that
    costs a small fraction, and t varies within a batch.
    """

    model: Denoiser
    texts: Conditioning
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
            found += [(x.cpu(), torch.full((len(asked),), t), asked) for x, t in self._states(asked, random)]
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

    def _states(self, asked: Tensor, random: torch.Generator, last: int = -1) -> list[tuple[Tensor, float]]:
        """The states of a batch of trajectories with their timesteps, from pure noise to number `last`, or to the end."""
        model, times = self.model, self._sampler.timesteps.tolist()
        x = torch.randn((len(asked), *model.shape), generator=random).to(model.device) * self._sampler.init_noise_sigma
        text = self.texts[asked.to(self.texts.device)]
        found = [(x, times[0])]
        with self.acting():
            for t, after in pairwise(times[: last + 1 or None]):
                predicted = model.guided(x, torch.full((len(x),), t, device=model.device), text, self.guidance)
                x = self._sampler.step(predicted, t, x).prev_sample
                found.append((x, after))
        return found
