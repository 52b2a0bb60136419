"""Decoupling: of what a patch does to what reads the prompt, keep what it does to its own concept (this project).

A patch that some solver trained moves its concept's keys K_i where it should, and those of other concepts as a side effect;
in a sum of such patches the side effects add up. With `way_l` what it does to the concept's own keys at projection l, its
decoupled change is `D_l = way_l K_i^T A^-1`, A the moment of a universe as in `separable.py`: the change nearest to its own at
K_i that leaves every other listed concept, the vocabulary and the preserved prompts where they are, as a least-squares problem
with one A for all.
So decoupled patches of one universe add up to the joint solution of their ways, whatever solved them: the closed-form fusion
of MACE (Lu et al., CVPR 2024), in separable terms. Of another concept, D moves at most half of what it moves of its own,
`|D K_j| <= |way| / 2`, since `|K_i^T A^-1 K_j| <= 1/2` for any two terms of A; in practice a few hundredths.

The rule `exact` also asks `D E_j = 0` of the bare names E_j of all other concepts and of the empty prompt, at every position:
SepME's condition (Zhao et al., arXiv 2402.05947), after training instead of during it. The minimiser is that of the same
problem within their null space, which a text encoder of width d and length n has for about d / (n - 1) concepts.

A change of the text encoder counts by what it does to the embeddings of the concept's sentences, as a text map. What does not
act through the text (queries, convolutions, self-attention) has no keys to be told apart by; it is left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.text_encoder import AnyTextEncoder, TextEncoder, encoders
from overpaint.patches.compose import Term, plan
from overpaint.patches.delta import Delta, LowRank, Sum, TextMap, Xor, joined
from overpaint.solvers import DECOUPLING_RULES
from overpaint.solvers.closed_form.edits import free_of
from overpaint.solvers.closed_form.separable import AS_OF_REVISION_2, Metric, fit
from overpaint.solvers.problem import EditProblem, Solution, Unsolvable, within_memory
from overpaint.solvers.sentences import keys_and_values
from overpaint.solvers.universe import text_encoders, vocabulary_record

RIDGE_RULE, EXACT_RULE = DECOUPLING_RULES
RANK, ENERGY = 16, 0.99
"""Of every tensor's change, the directions that hold this share of its energy are kept, and at most so many of them."""


@own_torch_settings()
def decouple(problem: EditProblem, delta: Delta, rule: str = RIDGE_RULE) -> Solution:
    """What `delta` does to the problem's concept and to nothing else: text maps and low-rank factors.

    The diagnostics say how much of the way is left (`residual`), how far the concept that is moved most goes, relative to the
    own one (`others moved`), and how many tensors were left out because they do not act through the text. Raises Unsolvable
    where nothing does, or where `exact` finds no direction free; PromptTooLong.
    """
    started = time.perf_counter()
    settings, concept, base = AS_OF_REVISION_2, problem.concept, problem.base
    problem.report(0, 1, "decoupling")
    reach = settings.reach_on(base, concept)
    maps: list[Delta] = []
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    sums = _Sums()
    with within_memory("the number of concepts"):
        patched = _patched_encoders(base, delta, problem.device)
        for text_input, encoder in text_encoders(base, problem.device).items():
            known = settings.universe_of(problem, text_input)
            metric = Metric(known.cholesky)
            if rule == EXACT_RULE:
                metric = metric.within(_free(encoder, problem).to(known.cholesky))
            keys, others = known.keys[concept.name], [known.keys[other.name] for other in problem.others]
            for name, way in _ways(problem, delta, text_input, encoder, patched.get(text_input)).items():
                up, down, about = fit(metric, keys, way, RANK, ENERGY, reach)
                sums.add(way, about["residual"], up, down, others)
                up, down = up.float().cpu(), down.float().cpu().contiguous()
                if not name:
                    maps.append(TextMap(text_input, up, down))
                    continue
                placed = down.new_zeros(up.shape[1], base.places[name].shape[1])
                placed[:, base.columns(text_input, name)] = down.T
                if before := factors.get(name):
                    up, placed = joined([before[0], up], 1), joined([before[1], placed], 0)
                factors[name] = up, placed
    parts = [*maps, *([LowRank(factors)] if factors else [])]
    if not parts:
        raise Unsolvable(
            f"this patch does nothing to what is read of {concept.name!r}: it changes no cross-attention keys or values and no "
            "text encoder, so there is nothing to decouple"
        )
    found = parts[0] if len(parts) == 1 else Sum(tuple(parts))
    left_out = len(set(delta.targets(base)) - set(_through_text(base)))
    about = {**sums.numbers, "left_out": left_out, "seconds": time.perf_counter() - started}
    return Solution(found, about, vocabulary_record(base, problem.device))


@dataclass
class _Sums:
    """Squared norms over all tensors: of the ways, of what is left of them, and of what other concepts' keys are moved."""

    way: float = 0.0
    left: float = 0.0
    others: Tensor | None = None

    def add(self, way: Tensor, residual: float, up: Tensor, down: Tensor, others: list[Tensor]) -> None:
        size = float(way.square().sum())
        moved = torch.tensor([float((up @ (down.T @ keys)).square().sum()) for keys in others])
        self.way, self.left = self.way + size, self.left + residual**2 * size
        self.others = moved if self.others is None else self.others + moved

    @property
    def numbers(self) -> dict[str, float]:
        if not self.way:
            return {}
        most = float(self.others.max()) if self.others is not None and len(self.others) else 0.0
        return {"residual": math.sqrt(self.left / self.way), "others moved": math.sqrt(most / self.way)}


def _ways(
    problem: EditProblem, delta: Delta, text_input: str, encoder: AnyTextEncoder, patched: TextEncoder | None
) -> Mapping[str, Tensor]:
    """How far a delta moves the concept's keys: by projection what comes out of it, [out, m]; and under the empty name what
    goes into all of them, [d, m]. Without those that it does not move."""
    base, device = problem.base, problem.device
    before = keys_and_values(encoder, base, problem.concept)[0]
    after = before if patched is None else keys_and_values(patched, base, problem.concept)[0]
    ways = {"": after - before}
    for text_map in delta.text_maps:
        if text_map.encoder == text_input:
            ways[""] = ways[""] + text_map.up.to(after) @ (text_map.down.to(after).T @ after)
    # Residual bits are the last digits of what the other parts compose to, and no way of their own.
    others = [part for part in delta.parts if not isinstance(part, (TextMap, Xor))]
    projections = set(base.projections(text_input))
    changed = [(part, name) for part in others for name in part.targets(base) if name in projections]
    for part, name in changed:
        columns = base.columns(text_input, name)
        if factors := part.thin_factors(base, name):
            up, down = (factor.to(device) for factor in factors)
            moved = up @ (down[:, columns] @ after)
        else:
            moved = part.change(base, name)[:, columns].to(device) @ after
        ways[name] = ways[name] + moved if name in ways else moved
    size = max(float(before.norm()), 1e-30)
    return {name: way for name, way in ways.items() if float(way.norm()) > 1e-9 * size}


def _free(encoder: AnyTextEncoder, problem: EditProblem) -> Tensor:
    """An orthonormal basis of the directions that no bare name of another concept has, nor the empty prompt."""
    if not isinstance(encoder, TextEncoder) or encoder.is_pooled:
        raise Unsolvable(
            "the exact rule needs a text encoder that gives one embedding for each token, and this base has a text input that "
            "does not; leave --exactly out"
        )
    prompts = ["", *(other.name for other in problem.others), *problem.preserved_prompts()]
    basis, rank = free_of(encoder.hidden(prompts))
    if rank >= encoder.width:
        raise Unsolvable(
            f"the bare names of {len(problem.others)} other concepts span all {encoder.width} text directions, so no null space "
            f"is left to decouple in exactly (each takes about {encoder.length - 1}); leave --exactly out"
        )
    return basis


def _through_text(base: Base) -> list[str]:
    """The tensors that decide what is read of a prompt: projections and text encoders."""
    components = {base.text_input(each).encoder for each in base.text_inputs}
    return [*base.projections(), *(name for name in base.names if name.partition("/")[0] in components)]


def _patched_encoders(base: Base, delta: Delta, device: torch.device) -> dict[str, TextEncoder]:
    """By text input, its text encoder with a delta on it; none where it is as it was. Raises Unsolvable for what is read anew
    with every prompt."""
    components = {base.text_input(each).encoder for each in base.text_inputs}
    changed = [name for name in delta.targets(base) if name.partition("/")[0] in components]
    if not changed:
        return {}
    composed = plan(base, [Term("", delta)])
    found = {} if base.layout.is_caught else encoders(base, device)
    held: dict[str, Tensor] = {}
    for text_input, encoder in found.items():
        component = base.text_input(text_input).encoder
        rules = base.layout.components[component]
        parameters = encoder.model.named_parameters()
        held |= {f"{component}/{rules.canonical(key)}": p for key, p in parameters if not p.is_meta}
    if lacking := sorted(set(changed) - held.keys()):
        raise Unsolvable(
            f"this patch changes a text encoder ({lacking[0]}) that is too large here to be held with the change, or that only "
            "its own pipeline runs; decouple it on an accelerator, or use a solver that leaves text encoders as they are"
        )
    for name in changed:
        held[name].data.copy_(composed.tensor(name))
    return {
        text_input: encoder
        for text_input, encoder in found.items()
        if any(name.startswith(f"{base.text_input(text_input).encoder}/") for name in changed)
    }
