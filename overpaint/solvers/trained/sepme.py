"""SepME: separable multi-concept erasure (Zhao et al., arXiv 2402.05947; follow-up SRS-ME).

*Generating concept-irrelevant representations* (G-CiRs): with `r_c(theta) = eps(x_t, c; theta) - eps(x_t, ''; theta)`, minimise
`sum_i eta_i mean(r_i(theta0 + dtheta) * r_i(theta0)) + regulariser * ||dtheta||_1 / M` (SRS-ME eq. 28, 34) over the M edited
layers, on noised latents of pictures that the base makes of each concept, with `eta_i = max_k |L_k| / |L_i|` (eq. 35); stop
when the momentum average of the weighted sum falls to tau (eq. 37).

*Weight decoupling*: the increment of every cross-attention key and value projection (of every projection that reads a
prompt, on other bases) is `w (beta S)^T` with S a
basis of the null space of all other concepts' prompt embeddings (all positions), the empty prompt's and the kept
prompts' (watermarks, say), and w zero at the start (eq. 22 to 26). Prompts in that stack are therefore not disturbed at all;
nothing is promised for other sentences, and the null space of a text width d is used up after about d / (length - 1)
prompts. As increments do not disturb each other's prompts, each can be trained alone (eq. 29 to 33); `joint=true` trains those
of the whole universe together (SRS-ME's dagger), `decouple=false` trains all cross-attention weights without a null space
(its double dagger: G-CiRs alone; use the preset `whole`).

Where the universe is larger than the room, the concepts whose names are nearest to the erased one's are left undisturbed, as many
as leave one prompt's worth of directions free, and the patch says which (`undisturbed`): name those that matter instead with a
smaller universe.

Which basis of the null space S is, the paper leaves open; for Adam, which moves every number of w by about as much, it decides in
which directions an increment grows. By default S is orthonormal. With `balance`, its columns are scaled so that prompts that are
to be retained have equally much of each direction: the increment grows where other prompts have little, and what no universe
lists is disturbed less, while the space is the same.

Three settings go beyond the paper, and are off by default: `tolerance` counts weak directions of the stack as unused, so that
many more prompts fit into it, each disturbed a little; `sentences` trains on sentences rather than on the bare name; `shared`
divides beta by the number of columns of S, so that one step size serves large and small null spaces.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.bases.layout import Layout
from overpaint.core.concepts import Concept
from overpaint.core.encoding import evenly_spaced
from overpaint.patches.delta import Delta, LowRank
from overpaint.solvers.closed_form.edits import free_of
from overpaint.solvers.problem import EditProblem, Solution, Solver, Unsolvable, finite, setting, within_memory
from overpaint.solvers.sentences import phrasings, retained_prompts
from overpaint.solvers.trained.adapters import CROSS_ATTENTION, DenseAdapter, modules_by_parameter, tensors
from overpaint.solvers.trained.denoiser import Conditioning, Denoiser, unserved
from overpaint.solvers.trained.training import training_bytes


@torch.no_grad()
def pictures_of(model: Denoiser, problem: EditProblem, concept: Concept, settings: SepME) -> Tensor:
    """Latents of what the base makes of a concept's bare name, [n, c, h, w]."""
    problem.report(0, settings.iterations, f"generating pictures of {concept.name}")
    found = []
    for start in range(0, settings.pictures, 8):
        seeds = range(start, min(start + 8, settings.pictures))
        generators = [torch.Generator().manual_seed(problem.seed * 100_003 + s) for s in seeds]
        found.append(model.drawn([concept.name] * len(generators), settings.steps, settings.guidance, generators))
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
    texts = {name: model.hidden(asked) for name, asked in prompts.items()}
    empty = model.unconditional.expand(settings.batch)
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
    model: Denoiser, latents: Tensor, text: Conditioning, random: torch.Generator, batch: int
) -> tuple[Tensor, Tensor, Conditioning]:
    """Noised latents x_t [n, c, h, w], their timesteps [n] and a prompt's embeddings for each."""
    chosen = torch.randint(len(latents), (batch,), generator=random)
    t = model.time(torch.randint(model.levels, (batch,), generator=random))
    noise = torch.randn((batch, *latents.shape[1:]), generator=random).to(latents)
    asked = text[torch.randint(len(text), (batch,), generator=random)] if len(text) > 1 else text
    return model.add_noise(latents[chosen], noise, t), t, asked.expand(batch)


def _trained(base: Base, concept: Concept, settings: SepME) -> list[str]:
    """The prompts whose representation is made irrelevant: the bare name, or the concept's words in sentences."""
    return [each.prompt for each in evenly_spaced(phrasings(base, concept), settings.sentences)] or [concept.name]


def _representation(model: Denoiser, x: Tensor, t: Tensor, text: Conditioning, empty: Conditioning) -> Tensor:
    with_concept, without = model.both(x, t, text, empty)
    return with_concept - without


@dataclass(frozen=True, eq=False)
class _Reading:
    """What reads the sequence of a conditioning, or its pooled embeddings: tensors by name, and their columns that do."""

    name: str
    projections: tuple[str, ...]
    columns: slice

    def of(self, text: Conditioning) -> Tensor:
        """The embeddings of prompts, [n, length, d]."""
        return text.sequence if text.pooled is None or self.name == SEQUENCE else text.pooled[:, None]


SEQUENCE, POOLED = "sequence", "pooled"


def _readings(model: Denoiser) -> list[_Reading]:
    """The sequence, which text encoders share as it is read, and the pooled embeddings where there are some."""
    found = []
    for is_pooled in (False, True):
        places = {name: place.columns for name, place in model.inputs.items() if place.is_pooled == is_pooled}
        if places:
            columns = slice(min(each.start for each in places.values()), max(each.stop for each in places.values()))
            names = sorted({name for each in places for name in model.base.projections(each)})
            found.append(_Reading(POOLED if is_pooled else SEQUENCE, tuple(names), columns))
    return found


class Increments:
    """Adds `sum_k x (w_k (beta S_k)^T)^T` to the output of every projection that reads a prompt; the weights stay as they are.

    `bases` has S_k by concept, for each of the `readings`. With `shared`, beta is divided by the number of directions.
    """

    def __init__(
        self,
        model: Denoiser,
        readings: Sequence[_Reading],
        bases: Mapping[str, Sequence[Tensor]],
        beta: float,
        *,
        shared: bool = False,
    ) -> None:
        self._places, modules = model.base.places, modules_by_parameter(model.pipe, model.base)
        self._reading = {name: number for number, each in enumerate(readings) for name in each.projections}
        self._columns = [each.columns for each in readings]
        self.scaled = {
            concept: [beta / (basis.shape[1] if shared else 1) * basis.T for basis in own]
            for concept, own in bases.items()
        }
        self.active = True
        self.w: dict[str, dict[str, nn.Parameter]] = {
            concept: {
                name: nn.Parameter(
                    torch.zeros(self._places[name].shape[0], len(scaled[number]), device=scaled[number].device)
                )
                for name, number in sorted(self._reading.items())
            }
            for concept, scaled in self.scaled.items()
        }
        for name in self._reading:
            modules[name].register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        number = self._reading[name]

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            read = inputs[0][..., self._columns[number]]
            for concept, scaled in self.scaled.items() if self.active else ():
                output = output + (read @ scaled[number].T) @ self.w[concept][name].T
            return output

        return add

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [w for own in self.w.values() for w in own.values()]

    def norm(self) -> Tensor:
        """The L1 norm of the whole increment, averaged over layers."""
        names = next(iter(self.w.values()))
        whole = (
            sum(self.w[c][name] @ scaled[self._reading[name]] for c, scaled in self.scaled.items()) for name in names
        )
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
        """The increments in as few numbers as they need: a null space may have more directions than a projection has rows."""
        factors = {name: (w.detach(), self._down(concept, name)) for name, w in self.w[concept].items()}
        return LowRank(
            {
                name: (up, down) if len(down) < len(up) else (torch.eye(len(up), device=up.device), up @ down)
                for name, (up, down) in factors.items()
            }
        )

    def _down(self, concept: str, name: str) -> Tensor:
        """`(beta S)^T` over all input columns of a tensor."""
        number = self._reading[name]
        scaled, width = self.scaled[concept][number], self._places[name].shape[-1]
        if scaled.shape[1] == width:
            return scaled
        down = scaled.new_zeros(len(scaled), width)
        down[:, self._columns[number]] = scaled
        return down


class Whole:
    """All cross-attention weights, trained in place."""

    def __init__(self, pipe: Any, base: Base, names: Sequence[str]) -> None:
        self._weights = DenseAdapter(pipe, base, names)
        self.parameters = self._weights.parameters

    def norm(self) -> Tensor:
        """The L1 norm of the change, averaged over tensors."""
        return torch.stack([(now - before).abs().sum() for now, before in self._weights.pairs()]).mean()

    def off(self) -> Any:
        return self._weights.off()

    def delta_of(self, concept: str) -> Delta:
        return self._weights.delta()


@dataclass(frozen=True)
class SepME(Solver):
    """Train increments in the null space of everything else that is listed; defaults are the paper's."""

    PRESETS: ClassVar = MappingProxyType(
        {
            "emoji": {
                "iterations": 300,
                # Adam moves every number of w by about lr at a step, whether the concept needs it or not: with large steps, few
                # are made, and the increment holds much that nobody asked for.
                "beta": 3.0,
                "shared": True,
                "balance": 400,
                "batch": 8,
                "guidance": 3.0,
            },
            "whole": {"decouple": False, "lr": 1e-5},
        }
    )

    revision = 4

    iterations: int = setting(1000, "most gradient steps", low=1)
    warm_up: int = setting(10, "steps before the stopping rule is asked", low=0)
    lr: float = setting(0.1, "Adam's learning rate for w (the paper has 1e-5 for whole weights)", low=0.0)
    beta: float = setting(1e-4, "scale of the basis", low=0.0)
    regulariser: float = setting(1e-6, "weight of the mean layer-wise L1 norm of the increment", low=0.0)
    momentum: float = setting(0.9, "alpha of the momentum average", low=0.0, high=1.0)
    tau: float = setting(1e-4, "stop when the averaged correlation is at most this")
    pictures: int = setting(16, "pictures of the concept the base generates to train on", low=1)
    batch: int = setting(1, "noised latents per step and concept", low=1)
    guidance: float = setting(7.5, "guidance scale of those pictures", low=0.0)
    steps: int = setting(20, "sampling steps of those pictures", low=1)
    keep: str = setting("", "further prompts to leave undisturbed, such as watermarks, separated by ;")
    tolerance: float = setting(
        0.0, "directions weaker than this share of the others' strongest may be used; 0: only unused ones", 0.0, 1.0
    )
    sentences: int = setting(0, "train on this many sentences that name the concept; 0: on the bare name", low=0)
    joint: bool = setting(False, "train the increments of all concepts of the universe together, and keep one's own")
    decouple: bool = setting(True, "train in the null space; false: all cross-attention weights, disturbing whatever")
    shared: bool = setting(
        False,
        "divide beta by the number of directions of the null space, so that one step size serves large and small ones",
        added_later=True,
    )

    balance: int = setting(
        0,
        "scale the basis of the null space so that so many prompts to retain have equally much of each direction; 0: orthonormal",
        low=0,
        added_later=True,
    )

    @property
    def uses_universe(self) -> bool:
        return self.decouple or self.joint

    @property
    def uses_preserved_prompts(self) -> bool:
        return self.decouple

    def supports(self, layout: Layout) -> str | None:
        return unserved(layout)

    def touches(self, base: Base) -> Sequence[str]:
        return base.projections() if self.decouple else tensors(base, CROSS_ATTENTION)

    def peak_bytes(self, base: Base) -> int:
        # Together, as many concepts as the universe has are in one step.
        return 0 if self.joint else training_bytes(base, self.touches(base), 2 * self.batch)

    def solve(self, problem: EditProblem) -> Solution:
        """Low-rank on every projection that reads the prompt; dense on all of cross-attention without decoupling.

        Raises Unsolvable when no null space is left, or for a base that it does not support; TrainingDiverged; OutOfMemory.
        """
        concepts = (problem.concept, *(problem.others if self.joint else ()))
        return self.together(problem, concepts)[problem.concept.name]

    def together(self, problem: EditProblem, concepts: Sequence[Concept]) -> dict[str, Solution]:
        """The increments of several concepts, trained together (in any order), by concept.

        Without decoupling they are one change of all, which every concept is given.
        """
        started = time.perf_counter()
        ordered = sorted(concepts, key=lambda concept: concept.name)
        with within_memory(f"batch ({self.batch}) or pictures ({self.pictures})"):
            model = Denoiser.of(problem)
            readings = _readings(model)
            undisturbed = {c.name: self._undisturbed(problem, model, c) for c in ordered}
            every = (problem.concept, *problem.others)
            bases = (
                {
                    c.name: self._null_spaces(
                        replace(problem, concept=c, universe=every), model, undisturbed[c.name], readings
                    )
                    for c in ordered
                }
                if self.decouple
                else {}
            )
            pictures = {c.name: pictures_of(model, problem, c, self) for c in ordered}
            change = (
                Increments(model, readings, bases, self.beta, shared=self.shared)
                if self.decouple
                else Whole(model.pipe, problem.base, self.touches(problem.base))
            )
            history = descend(model, change, ordered, pictures, problem, self)
        found = {
            "iterations": len(history),
            "correlation": history[-1],
            "stopped_early": len(history) < self.iterations,
            "seconds": time.perf_counter() - started,
        }
        return {
            c.name: _with_note(
                Solution(change.delta_of(c.name), {**_room(model, readings, bases.get(c.name, ())), **found}),
                c,
                undisturbed[c.name],
                len({each.name for each in (problem.concept, *problem.others)}) - 1 if self.decouple else 0,
            )
            for c in ordered
        }

    def _null_spaces(
        self, problem: EditProblem, model: Denoiser, undisturbed: Sequence[str], readings: Sequence[_Reading]
    ) -> list[Tensor]:
        """What is free of the empty prompt, of other concepts' bare names (as in the paper) and of the kept prompts."""
        text = model.hidden(["", *problem.preserved_prompts(self.keep), *undisturbed])
        bases = [null_space(each.of(text), self.tolerance)[0] for each in readings]
        if self.balance:
            prompts = retained_prompts(problem, model.encoder, self.balance)
            moments = [torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64) for basis in bases]
            for start in range(0, len(prompts), RETAINED_AT_ONCE):
                retained = model.hidden(prompts[start : start + RETAINED_AT_ONCE])
                for basis, moment, each in zip(bases, moments, readings, strict=True):
                    moment += moment_within(basis, each.of(retained))
            bases = [balanced(basis, moment) for basis, moment in zip(bases, moments, strict=True)]
        return [basis.to(model.device) for basis in bases]

    def _undisturbed(self, problem: EditProblem, model: Denoiser, concept: Concept) -> list[str]:
        """The names of the other concepts for which there is room, sorted."""
        names = sorted({c.name for c in (problem.concept, *problem.others)} - {concept.name})
        if not self.decouple or not names:
            return []
        own, always, others = (
            model.hidden(prompts).sequence
            for prompts in ([concept.name], ["", *problem.preserved_prompts(self.keep)], names)
        )
        chosen = that_fit(own[0], always, others, self.tolerance)
        return [names[i] for i in chosen]


def _with_note(solution: Solution, concept: Concept, undisturbed: Sequence[str], others: int) -> Solution:
    """A solution that says which of the other concepts it leaves undisturbed, where there is no room for all."""
    if len(undisturbed) == others:
        return solution
    note = (
        f"{concept.name}: there is room for {len(undisturbed)} of {others} other concepts; the nearest are left undisturbed "
        f"({', '.join(undisturbed) or 'none'}). Name those that matter with --universe, or use `separable`"
    )
    return replace(
        solution, diagnostics={**solution.diagnostics, "note": note}, record={"undisturbed": list(undisturbed)}
    )


def that_fit(own: Tensor, always: Tensor, others: Tensor, tolerance: float = 0.0) -> list[int]:
    """Which of `others` [n, length, d] can be left undisturbed beside `always` [m, length, d]: all, or the nearest to `own`
    [length, d], so many that directions for one more prompt are free.

    Nearest is what has most in common: `|K_j K^T| / (|K_j| |K|)` of the embeddings after begin-of-text.
    """

    def fits(chosen: Sequence[int]) -> bool:
        free = free_of(torch.cat([always, others[list(chosen)]]), tolerance)[0].shape[1]
        return free >= max(1, len(own) - 1)

    every = list(range(len(others)))
    if fits(every):
        return every
    begin = always[0, 0] / always[0, 0].norm()
    mine, theirs = (rows - (rows @ begin)[..., None] * begin for rows in (own[1:], others[:, 1:]))
    overlap = (theirs @ mine.T).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1).clamp_min(1e-30)
    order = overlap.argsort(descending=True, stable=True).tolist()
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(order[:middle]) else (low, middle - 1)
    return sorted(order[:low])


def null_space(hidden: Tensor, tolerance: float = 0.0) -> tuple[Tensor, int]:
    """An orthonormal basis S, float32 [d, d - r], of the directions that no embedding of `hidden` [n, length, d] has; and r.

    Raises Unsolvable when the prompts fill the whole width.
    """
    basis, rank = free_of(hidden, tolerance)
    count, length, width = hidden.shape
    if rank >= width:
        raise Unsolvable(
            f"the {count} prompts to leave undisturbed span all {width} text directions, so SepME has no null "
            f"space left (about {max(1, length - 1)} directions each); name fewer concepts, raise tolerance, or use `separable`"
        )
    return basis, rank


WEAKEST = 0.03
"""Of what prompts have of a direction on average, what is taken for the least: it bounds how far a column is scaled up."""


RETAINED_AT_ONCE = 32
"""Prompts to retain that are encoded at once: of FLUX.1's, 270 MB."""


def moment_within(basis: Tensor, hidden: Tensor) -> Tensor:
    """The second moment, float64 [q, q], of embeddings `hidden` [n, length, d] in the directions of a basis [d, q]."""
    rows = hidden[:, 1:] if hidden.shape[1] > 1 else hidden  # begin-of-text is the same in all of them
    inside = rows.reshape(-1, hidden.shape[-1]).double().cpu() @ basis.double()
    return inside.T @ inside


def balanced(basis: Tensor, moment: Tensor) -> Tensor:
    """A basis, float32 [d, q], of the same space, with columns along which prompts vary apart and so long that they have equally
    much of each; their mean squared length is that of the orthonormal `basis` [d, q].

    `moment`, float64 [q, q], is the prompts' (`moment_within`).
    """
    size, directions = torch.linalg.eigh(moment / moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny))
    scale = (size.clamp_min(0) + WEAKEST).rsqrt()
    scale = scale / scale.square().mean().sqrt()
    found: Tensor = (basis.double() @ directions * scale).float().contiguous()
    return found


def _room(model: Denoiser, readings: Sequence[_Reading], bases: Sequence[Tensor]) -> dict[str, int]:
    """How much of the text width is used, and how many prompts' worth of directions the width has and has left."""
    found: dict[str, int] = {}
    for reading, basis in zip(readings, bases, strict=False):
        if reading.name == POOLED:
            found["pooled null_space"] = basis.shape[1]
            continue
        each, width = model.unconditional.sequence.shape[1] - 1, len(basis)
        found |= {
            "null_space": basis.shape[1],
            "rank_of_others": width - basis.shape[1],
            "capacity": (width - 1) // each,
            "capacity_left": basis.shape[1] // each,
        }
    return found
