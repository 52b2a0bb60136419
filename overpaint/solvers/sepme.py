"""SepME: separable multi-concept erasure (Zhao et al., arXiv 2402.05947; follow-up SRS-ME).

*Generating concept-irrelevant representations* (G-CiRs): with `r(theta) = eps(x_t, c; theta) - eps(x_t, ''; theta)`, minimise the
correlation `mean(r(theta0 + dtheta) * r(theta0))` plus `regulariser * ||dtheta||_1 / M` over the M edited layers, on
noised latents of pictures that the base makes of the concept; stop when the momentum average of the correlation falls
to tau. *Weight decoupling*: the increment of every cross-attention key and value projection is `w (beta S)^T` with S a
basis of the null space of all other concepts' prompt embeddings (all positions), the empty prompt's and the kept
prompts', and w zero at the start. Prompts in that stack are therefore not disturbed at all; nothing is promised for
other sentences, and the null space of a text width d is used up after about d / (length - 1) prompts.

Two settings go beyond the paper, and are off by default: `tolerance` counts weak directions of the stack as unused, so that
many more prompts fit into it, each disturbed a little; `sentences` trains on sentences rather than on the bare name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.bases.text import TextEncoder
from overpaint.patches.delta import LowRank
from overpaint.solvers.keys import sentences
from overpaint.solvers.problem import EditProblem, Solution, Unsolvable, setting


@dataclass(frozen=True)
class SepME:
    """Hyper-parameters, with the paper's values as defaults; `keep` lists further prompts, separated by `;`."""

    iterations: int = setting(1000, "most gradient steps", low=1)
    warm_up: int = setting(10, "steps before the stopping rule is asked", low=0)
    lr: float = setting(0.1, "Adam's learning rate for w", low=0.0)
    beta: float = setting(1e-4, "scale of the basis", low=0.0)
    regulariser: float = setting(1e-6, "weight of the mean layer-wise L1 norm of the increment", low=0.0)
    momentum: float = setting(0.9, "alpha of the momentum average", low=0.0, high=1.0)
    tau: float = setting(1e-4, "stop when the averaged correlation is at most this")
    pictures: int = setting(16, "pictures of the concept the base generates to train on", low=1)
    batch: int = setting(1, "noised latents per step", low=1)
    guidance: float = setting(7.5, "guidance scale of those pictures", low=0.0)
    steps: int = setting(20, "sampling steps of those pictures", low=1)
    keep: str = setting("", "further prompts to leave undisturbed, separated by ;")
    tolerance: float = setting(
        0.0, "directions weaker than this share of the others' strongest may be used; 0: only unused ones", 0.0, 1.0
    )
    sentences: int = setting(0, "train on this many sentences that name the concept; 0: on the bare name", low=0)

    def solve(self, problem: EditProblem) -> Solution:
        """A low-rank delta on `attn2.to_k` and `attn2.to_v`, its down factors shared by all layers.

        Raises Unsolvable when no null space is left or the loss is not finite.
        """
        started = time.perf_counter()
        encoder = TextEncoder.of(problem.base, problem.device)
        basis, rank = null_space(encoder, self._prompts(problem), self.tolerance)
        pipe = problem.base.pipeline(device=str(problem.device))
        latents = _pictures(pipe, problem, self)
        names = problem.base.readers("text_encoder")
        up, history = _descend(pipe, encoder, latents, basis, names, problem, self)
        down = (self.beta * basis.T).contiguous().cpu()
        factors = {name: (w.detach().cpu().contiguous(), down) for name, w in zip(names, up, strict=True)}
        return Solution(
            LowRank(factors),
            {
                "null_space": basis.shape[1],
                "rank_of_others": rank,
                "capacity_left": basis.shape[1] // (encoder.length - 1),
                "iterations": len(history),
                "correlation": history[-1],
                "stopped_early": len(history) < self.iterations,
                "seconds": time.perf_counter() - started,
            },
        )

    def _prompts(self, problem: EditProblem) -> list[str]:
        """The empty prompt, every other concept by its bare name (as in the paper), the kept prompts."""
        kept = [prompt.strip() for prompt in self.keep.split(";") if prompt.strip()]
        return ["", *(c.name for c in problem.others), *kept]


def null_space(encoder: TextEncoder, prompts: Sequence[str], tolerance: float = 0.0) -> tuple[Tensor, int]:
    """An orthonormal basis S, float32 [d, d - r], of the directions that no embedding of `prompts` has; and the rank r.

    By singular value decomposition in float64 with NumPy's rank rule; the paper eliminates symbolically, which takes
    minutes to hours. Directions below `tolerance` times the strongest count as unused. Raises Unsolvable when the prompts fill
    the whole width.
    """
    hidden = encoder.hidden(prompts).double().cpu()
    # Begin-of-text is the same in every prompt and larger than all else: it would set the scale of the tolerance.
    begin = hidden[0, 0] / hidden[0, 0].norm()
    rest = hidden[:, 1:].reshape(-1, encoder.width)
    rest = rest - (rest @ begin)[:, None] * begin
    _, size, right = torch.linalg.svd(rest, full_matrices=True)
    # Embeddings come out of a float32 encoder: what is below its rounding is noise, not a direction.
    noise = max(rest.shape) * torch.finfo(torch.float32).eps
    used = torch.cat([begin[None], right[: int((size > size[0] * max(noise, tolerance)).sum())]])
    rank = len(used)
    if rank >= encoder.width:
        raise Unsolvable(
            f"the {len(prompts)} prompts to leave undisturbed span all {encoder.width} text directions, so SepME has no null "
            f"space left (about {encoder.length - 1} directions each); name fewer concepts, raise tolerance, or use `separable`"
        )
    return torch.linalg.qr(used.T, mode="complete").Q[:, rank:].float().contiguous().to(encoder.model.device), rank


@torch.no_grad()
def _pictures(pipe: Any, problem: EditProblem, settings: SepME) -> Tensor:
    """Latents of what the base makes of the concept's bare name, [n, c, h, w]."""
    problem.report(0, settings.iterations, "generating pictures of the concept")
    found = []
    for start in range(0, settings.pictures, 8):
        seeds = range(start, min(start + 8, settings.pictures))
        generators = [torch.Generator().manual_seed(problem.seed * 100_003 + s) for s in seeds]
        found.append(
            pipe(
                [problem.concept.name] * len(generators),
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=generators,
                output_type="latent",
            ).images
        )
    return torch.cat(found)


def _descend(
    pipe: Any,
    encoder: TextEncoder,
    latents: Tensor,
    basis: Tensor,
    names: list[str],
    problem: EditProblem,
    settings: SepME,
) -> tuple[list[nn.Parameter], list[float]]:
    """The coefficients w (out x q) of every projection after training, and the correlation at every step."""
    unet, schedule = pipe.unet.eval().requires_grad_(False), pipe.scheduler
    scaled = settings.beta * basis.T
    increments = _Increments(unet, problem.base, names, scaled)
    optimiser = torch.optim.Adam(increments.w, lr=settings.lr)
    prompts = _trained(problem, settings)
    text, empty = encoder.hidden(prompts), encoder.hidden([""])
    generator = torch.Generator().manual_seed(problem.seed)
    levels = len(schedule.alphas_cumprod)
    mean = 0.0
    history: list[float] = []
    for step in range(settings.iterations):
        chosen = torch.randint(len(latents), (settings.batch,), generator=generator)
        t = torch.randint(levels, (settings.batch,), generator=generator).to(latents.device)
        noise = torch.randn((settings.batch, *latents.shape[1:]), generator=generator).to(latents)
        x = schedule.add_noise(latents[chosen], noise, t)
        twice = {"sample": x.repeat(2, 1, 1, 1), "timestep": t.repeat(2)}
        asked = text[torch.randint(len(prompts), (settings.batch,), generator=generator)] if prompts[1:] else text
        hidden = torch.cat([asked.expand(settings.batch, -1, -1), empty.expand(settings.batch, -1, -1)])
        with torch.no_grad(), increments.off():
            frozen = _representation(unet(**twice, encoder_hidden_states=hidden).sample)
        moving = _representation(unet(**twice, encoder_hidden_states=hidden).sample)
        correlation = (moving * frozen).mean()
        loss = correlation + settings.regulariser * increments.norm()
        value = correlation.item()
        if not torch.isfinite(loss):
            raise Unsolvable(
                f"SepME's loss is not finite at step {step}; lower lr ({settings.lr}) or beta ({settings.beta})"
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        mean = value if not history else settings.momentum * mean + (1 - settings.momentum) * value
        history.append(value)
        problem.report(step + 1, settings.iterations, f"correlation {mean:.2e}")
        if step > settings.warm_up and mean <= settings.tau:
            break
    increments.remove()
    return increments.w, history


def _trained(problem: EditProblem, settings: SepME) -> list[str]:
    """The prompts whose representation is made irrelevant: the bare name, or the concept's words in sentences."""
    pairs = sentences(problem.base, problem.concept.kind).pairs
    found = [template.format(word) for template, _ in pairs for word in problem.concept.words]
    count = min(settings.sentences, len(found))
    return [found[i * len(found) // count] for i in range(count)] or [problem.concept.name]


def _representation(both: Tensor) -> Tensor:
    with_concept, without = both.chunk(2)
    return with_concept - without


class _Increments:
    """Adds `x (w scaled)^T` to the output of each named projection through a hook; the weights stay as they are."""

    def __init__(self, unet: nn.Module, base: Base, names: Sequence[str], scaled: Tensor) -> None:
        self.scaled, self.active = scaled, True
        self.w: list[nn.Parameter] = []
        self._handles = []
        for name in names:
            module: Any = unet.get_submodule(name.partition("/")[2].removesuffix(".weight"))
            w = nn.Parameter(torch.zeros(module.out_features, len(scaled), device=scaled.device))
            self.w.append(w)
            self._handles.append(module.register_forward_hook(self._hook(w)))

    def _hook(self, w: nn.Parameter) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + (inputs[0] @ self.scaled.T) @ w.T if self.active else output

        return add

    def norm(self) -> Tensor:
        """The L1 norm of the increments, averaged over layers."""
        return torch.stack([(w @ self.scaled).abs().sum() for w in self.w]).mean()

    def off(self) -> _Off:
        return _Off(self)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Off:
    """Within the block, the increments are not added."""

    def __init__(self, increments: _Increments) -> None:
        self.increments = increments

    def __enter__(self) -> None:
        self.increments.active = False

    def __exit__(self, *_: object) -> None:
        self.increments.active = True
