"""G-CiRs, the training half of SepME: make what a concept's prompt adds uncorrelated with what it added before.

`sepme.py` has the loss and the equations; here are the two things that are trained, increments in a null space and whole
weights, and the descent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.concepts import Concept
from overpaint.patches.delta import Delta, LowRank
from overpaint.solvers.adapters import Weights, owners
from overpaint.solvers.denoising import Denoiser
from overpaint.solvers.keys import sentences
from overpaint.solvers.problem import EditProblem, finite

if TYPE_CHECKING:
    from overpaint.solvers.sepme import SepME


@torch.no_grad()
def pictures_of(pipe: Any, problem: EditProblem, concept: Concept, settings: SepME) -> Tensor:
    """Latents of what the base makes of a concept's bare name, [n, c, h, w]."""
    problem.report(0, settings.iterations, f"generating pictures of {concept.name}")
    found = []
    for start in range(0, settings.pictures, 8):
        seeds = range(start, min(start + 8, settings.pictures))
        generators = [torch.Generator().manual_seed(problem.seed * 100_003 + s) for s in seeds]
        found.append(
            pipe(
                [concept.name] * len(generators),
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=generators,
                output_type="latent",
            ).images
        )
    return torch.cat(found)


def descend(
    model: Denoiser,
    change: Increments | Whole,
    concepts: Sequence[Concept],
    pictures: Mapping[str, Tensor],
    problem: EditProblem,
    settings: SepME,
) -> list[float]:
    """Train the change in place; the weighted sum of the correlations at every step."""
    optimiser = torch.optim.Adam(change.parameters, lr=settings.lr)
    prompts = {c.name: _trained(problem.base, c, settings) for c in concepts}
    texts = {name: model.encoder.hidden(asked) for name, asked in prompts.items()}
    empty = model.encoder.hidden([""]).expand(settings.batch, -1, -1)
    # A generator each: what one concept is trained on does not depend on which others are.
    random = {c.name: torch.Generator().manual_seed(problem.seed) for c in concepts}
    mean = 0.0
    history: list[float] = []
    for step in range(settings.iterations):
        found = []
        for concept in concepts:
            name = concept.name
            x, t, text = _drawn(model, pictures[name], texts[name], random[name], settings.batch)
            with torch.no_grad(), change.off():
                frozen = _representation(model, x, t, text, empty)
            found.append((_representation(model, x, t, text, empty) * frozen).mean())
        correlations = torch.stack(found)
        size = correlations.detach().abs()
        weighted = (correlations * size.max() / size.clamp_min(1e-30)).sum() if found[1:] else correlations.sum()
        loss = weighted + settings.regulariser * change.norm()
        finite(loss.item(), step, f"lr ({settings.lr:g}) or beta ({settings.beta:g})")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        value = weighted.item()
        mean = value if not history else settings.momentum * mean + (1 - settings.momentum) * value
        history.append(value)
        problem.report(step + 1, settings.iterations, f"correlation {mean:.2e}")
        if step > settings.warm_up and mean <= settings.tau:
            break
    return history


def _drawn(
    model: Denoiser, latents: Tensor, text: Tensor, random: torch.Generator, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents x_t [n, c, h, w], their timesteps [n] and a prompt's embeddings for each [n, length, d]."""
    chosen = torch.randint(len(latents), (batch,), generator=random)
    t = torch.randint(model.levels, (batch,), generator=random).to(latents.device)
    noise = torch.randn((batch, *latents.shape[1:]), generator=random).to(latents)
    asked = text[torch.randint(len(text), (batch,), generator=random)] if len(text) > 1 else text
    return model.pipe.scheduler.add_noise(latents[chosen], noise, t), t, asked.expand(batch, -1, -1)


def _trained(base: Base, concept: Concept, settings: SepME) -> list[str]:
    """The prompts whose representation is made irrelevant: the bare name, or the concept's words in sentences."""
    found = [template.format(word) for template, _ in sentences(base, concept.kind).pairs for word in concept.words]
    count = min(settings.sentences, len(found))
    return [found[i * len(found) // count] for i in range(count)] or [concept.name]


def _representation(model: Denoiser, x: Tensor, t: Tensor, text: Tensor, empty: Tensor) -> Tensor:
    with_concept, without = model.both(x, t, text, empty)
    return with_concept - without


class Increments:
    """Adds `sum_k x (w_k (beta S_k)^T)^T` to the output of every key and value projection; the weights stay as they are."""

    def __init__(self, pipe: Any, base: Base, bases: Mapping[str, Tensor], beta: float) -> None:
        modules, names = owners(pipe, base), base.readers()
        self.scaled = {concept: beta * basis.T for concept, basis in bases.items()}
        self.active = True
        self.w: dict[str, dict[str, nn.Parameter]] = {}
        for concept, scaled in self.scaled.items():
            outs = {name: base.places[name].shape[0] for name in names}
            self.w[concept] = {
                name: nn.Parameter(torch.zeros(out, len(scaled), device=scaled.device)) for name, out in outs.items()
            }
        for name in names:
            modules[name].register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for concept, scaled in self.scaled.items() if self.active else ():
                output = output + (inputs[0] @ scaled.T) @ self.w[concept][name].T
            return output

        return add

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [w for own in self.w.values() for w in own.values()]

    def norm(self) -> Tensor:
        """The L1 norm of the whole increment, averaged over layers."""
        names = next(iter(self.w.values()))
        whole = (sum(self.w[c][name] @ scaled for c, scaled in self.scaled.items()) for name in names)
        return torch.stack([torch.as_tensor(increment).abs().sum() for increment in whole]).mean()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block, the increments are not added."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def delta_of(self, concept: str) -> Delta:
        return LowRank({name: (w.detach(), self.scaled[concept]) for name, w in self.w[concept].items()})


class Whole:
    """All cross-attention weights, trained in place."""

    def __init__(self, pipe: Any, base: Base, names: Sequence[str]) -> None:
        self._weights = Weights(pipe, base, names)
        self.parameters = self._weights.parameters
        self._before = [parameter.detach().clone() for parameter in self.parameters]

    def norm(self) -> Tensor:
        """The L1 norm of the change, averaged over tensors."""
        pairs = zip(self.parameters, self._before, strict=True)
        return torch.stack([(now - before).abs().sum() for now, before in pairs]).mean()

    def off(self) -> Any:
        return self._weights.off()

    def delta_of(self, concept: str) -> Delta:
        return self._weights.delta()
