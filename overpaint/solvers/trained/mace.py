"""MACE: mass concept erasure (Lu et al., CVPR 2024, arXiv 2403.06135), from the published equations alone, our formulation.

Three steps, all on the projections W0 that read the prompt:
1. *Closed-form refinement*: what the words and the padding after a concept have taken in of it is sent where they would be with
   its anchor (or nothing) in its place, `min |W E_f - W0 E_g|^2 + |W P - W0 P|^2 + lambda |W - W0|^2`. As in `uce.py` that is one
   text map T for all layers.
2. *One direction per projection*: factors `u v^T` beside each refined projection are trained, on noised pictures of the
   concept, to lower the attention that the concept's tokens S get where it is to be seen, `sum_l |A_l[:, S] M_l|_F`; t is drawn
   with the weights `sigmoid((t - 200) / 20) - sigmoid((t - 400) / 20)`. The paper masks with a segmentation model; here M_l is
   where the base itself attends to these tokens more than on average.
3. *Closed-form fusion*: `min |W E - (W0 T + u v^T) E|^2 + mu |W P - W0 T P|^2` over the concept's embeddings E and what is
   preserved, P: `v` becomes `v E E^T (E E^T + mu P P^T)^-1`, so that the direction acts on the concept alone.

The first step alone (`steps=0`) is a text map for every text input, and serves every base.

A patch holds one concept; what the paper fuses over concepts at once is here a sum of patches, each of which preserves the
others. The paper's prior, of image captions, is the tokenizer's vocabulary.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from overpaint.bases.layout import Layout
from overpaint.bases.text_encoder import PipelineTextInput, TextEncoder
from overpaint.core.encoding import evenly_spaced
from overpaint.patches.delta import Delta, LowRank
from overpaint.solvers.closed_form.edits import (
    ALL,
    Diagnostics,
    KeyChoice,
    MapEdit,
    TextEdit,
    least_squares,
    over_text_inputs,
    text_maps,
)
from overpaint.solvers.problem import EditProblem, Solution, Unsolvable, setting
from overpaint.solvers.sentences import PADDING, phrasings
from overpaint.solvers.trained.adapters import LowRankAdapter, own_parameters
from overpaint.solvers.trained.denoiser import Conditioning, Denoiser, unserved
from overpaint.solvers.trained.training import BEFORE, StepResult, Training, TrainingTask, gathered, generator
from overpaint.solvers.universe import vocabulary_record

TEXT_INPUT = "text_encoder"
ATTENDED = ("stable-diffusion",)
"""Layouts in which attention to each token of the prompt can be looked at as the paper does."""
CHOICE = KeyChoice(ALL, in_sentences=True)


@dataclass(frozen=True)
class MACE(Training):
    """Refine what other words took in, train one direction per projection on attention, fuse; defaults are the paper's."""

    PRESETS: ClassVar = MappingProxyType(
        {"emoji": {"lr": 1e-2, "batch": 8, "sampling_steps": 20, "padding": True, "rank": 8, "mu": 1.0}}
    )

    revision = 2

    steps: int = setting(50, "gradient steps; 0: the closed-form refinement alone, at every text input", low=0)
    lr: float = setting(1e-5, "Adam's learning rate; the paper has 1e-4 for people and styles", low=0.0)
    guidance: float = setting(7.5, "guidance scale of the pictures that the base draws", low=0.0)
    sentences: int = setting(8, "sentences that name the concept, to draw and to train on", low=1)
    images: str = setting("", "folder with pictures of the concept; empty: the base draws them")
    pictures: int = setting(8, "pictures of the concept", low=1)
    padding: bool = setting(False, "lower the attention to all that follows the concept too, padding included")
    ridge: float = setting(0.1, "lambda of the refinement, on the scale of squared embeddings", low=1e-9)
    prior: float = setting(1.0, "weight of the vocabulary among what is preserved", low=0.0)
    rank: int = setting(0, "most directions of the refinement to keep; 0: all", low=0)
    mu: float = setting(1e-4, "weight of what is preserved in the fusion", low=0.0)
    keep: str = setting("", "further prompts to preserve, separated by ;")

    def supports(self, layout: Layout) -> str | None:
        reason = unserved(layout, ATTENDED) if self.steps else None
        return reason and f"{reason}, or steps=0, with which only the refinement of `mace` is solved for"

    def solve(self, problem: EditProblem) -> Solution:
        """The refinement and the trained directions, fused; with `steps` 0, the refinement of every text input alone."""
        if self.steps:
            return super().solve(problem)
        started = time.perf_counter()
        edits, numbers = over_text_inputs(problem, CHOICE, self._refinement)
        record = vocabulary_record(problem.base, problem.device) if self.prior else {}
        return Solution(text_maps(edits), {**numbers, "seconds": time.perf_counter() - started}, record)

    def _refinement(self, edit: TextEdit) -> tuple[MapEdit, Diagnostics]:
        """What other words and padding took in of the concept, sent where it would be without; what is pooled took in all."""
        chosen = evenly_spaced(phrasings(edit.problem.base, edit.problem.concept), self.sentences)
        encoder = edit.encoder
        if isinstance(encoder, PipelineTextInput):
            pairs = [(each.prompt, each.replacement) for each in chosen]
            keys, values = (side / len(pairs) ** 0.5 for side in encoder.keys_and_values(pairs, PADDING, own=False))
        elif encoder.is_pooled:
            sides = [each.prompt for each in chosen], [each.replacement for each in chosen]
            keys, values = (encoder.hidden(side)[:, 0].double().T / len(chosen) ** 0.5 for side in sides)
        else:
            concept = _ConceptEmbeddings.of(encoder, edit.problem, self.sentences)
            keys, values = concept.others, concept.instead
        if not keys.shape[1]:
            raise Unsolvable(
                f"no word and no padding follows {edit.problem.concept.name!r} in what {edit.text_input} reads, so there is "
                "nothing to refine; use `separable`"
            )
        moment, eye = self._preserved(edit)
        change, condition = least_squares(keys, values - keys, moment + eye, self.rank)
        return change, {"refined directions": change.up.shape[1], "condition": condition}

    def _preserved(self, edit: TextEdit) -> tuple[Tensor, Tensor]:
        """The second moment of what is preserved, and the ridge, float64 [d, d] each."""
        moment = edit.preserved([edit.problem.concept], edit.problem.preserved_prompts(self.keep), self.prior)
        return moment, self.ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)

    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        """A text map (the refinement) and one direction for every projection that reads the prompt."""
        assert isinstance(model.encoder, TextEncoder)  # `supports` takes no other base
        concept = _ConceptEmbeddings.of(model.encoder, problem, self.sentences)
        drawn = gathered(
            model,
            problem,
            concept.prompts,
            folder=self.images,
            count=self.pictures,
            steps=self.sampling_steps,
            guidance=self.guidance,
        )
        edit = TextEdit(problem.within(0, self.steps), TEXT_INPUT, model.encoder, CHOICE)
        moment, eye = self._preserved(edit)
        refined, condition = least_squares(concept.others, concept.instead - concept.others, moment + eye, self.rank)
        change = _Fused(model.pipe, problem, refined, concept.fusion(self.mu * moment, eye))
        attention = _Attention(model.network)
        hidden = model.hidden(concept.prompts)
        tokens = concept.tokens(self.padding, model.encoder.length, model.device)
        likely = _importance(model.levels)

        def loss(random: torch.Generator) -> StepResult:
            latents = drawn.latents[torch.randint(len(drawn.latents), (self.batch,), generator=random)]
            t = torch.multinomial(likely, self.batch, replacement=True, generator=random).to(model.device)
            noise = torch.randn(latents.shape, generator=random).to(model.device)
            x = model.add_noise(latents, noise, t)
            which = torch.randint(len(hidden), (self.batch,), generator=random)
            with torch.no_grad(), change.off():
                seen = attention.paid(model, x, t, hidden[which], tokens[which])
            masks = [paid > paid.mean(1, keepdim=True) for paid in seen]
            now = attention.paid(model, x, t, hidden[which], tokens[which])
            sizes = [(paid * mask).flatten(1).norm(dim=1).mean() for paid, mask in zip(now, masks, strict=True)]
            return StepResult(torch.stack(sizes).sum())

        facts = {"refined directions": refined.up.shape[1], "condition": condition}
        record = vocabulary_record(problem.base, problem.device) if self.prior else {}
        return TrainingTask(change, loss, facts=facts, record=record)


@dataclass(frozen=True, eq=False)
class _ConceptEmbeddings:
    """Embeddings of sentences that name a concept, [d, m]: of its own tokens, of those after it, and of these with its anchor."""

    prompts: list[str]
    spans: list[tuple[int, int]]
    own: Tensor
    others: Tensor
    instead: Tensor

    @classmethod
    def of(cls, encoder: TextEncoder, problem: EditProblem, count: int) -> _ConceptEmbeddings:
        concept = problem.concept
        chosen = evenly_spaced(phrasings(problem.base, concept), count)
        starts = [encoder.first_position(each.template, each.word) for each in chosen]
        spans = [(start, start + len(encoder.tokens(each.word))) for start, each in zip(starts, chosen, strict=True)]
        prompts = [each.prompt for each in chosen]
        named = encoder.hidden(prompts).double()
        unnamed = encoder.hidden([each.replacement for each in chosen]).double()
        own, others, instead = [], [], []
        stand_in = len(encoder.tokens(concept.anchor)) if concept.anchor else 0
        for rows, plain, (start, end) in zip(named, unnamed, spans, strict=True):
            after, before = rows[end:], plain[start + stand_in :]
            length = min(len(after), len(before))
            own.append(rows[start:end])
            others.append(after[:length])
            instead.append(before[:length])
        weight = sum(map(len, others)) ** -0.5
        return cls(prompts, spans, torch.cat(own).T, weight * torch.cat(others).T, weight * torch.cat(instead).T)

    def fusion(self, preserved: Tensor, eye: Tensor) -> Tensor:
        """`E E^T (E E^T + mu P P^T)^-1`, [d, d], over everything from the concept on; `eye` is the refinement's ridge."""
        e = torch.cat([self.own / self.own.shape[1] ** 0.5, self.others], 1)
        moment = e @ e.T
        found: Tensor = torch.linalg.solve(moment + preserved + eye, moment).T
        return found

    def tokens(self, padding: bool, length: int, device: torch.device) -> Tensor:
        """Which tokens are S, by prompt: bool [n, length]."""
        found = torch.zeros(len(self.spans), length, dtype=torch.bool)
        for row, (start, end) in zip(found, self.spans, strict=True):
            row[start : None if padding else end] = True
        return found.to(device)


class _Fused:
    """The refinement, already in the working copy, and the trained directions, fused when they are handed back."""

    def __init__(self, pipe: Any, problem: EditProblem, refined: MapEdit, fusion: Tensor) -> None:
        self._refined, self._fusion = refined, fusion
        names = problem.base.projections(TEXT_INPUT)
        for weight in own_parameters(pipe, problem.base, names)[0].values():
            weight.add_((weight.double() @ refined.up @ refined.down.T).float())
        self._directions = LowRankAdapter(pipe, problem.base, names, 1, generator(problem.seed, BEFORE))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self._directions.parameters

    def off(self) -> AbstractContextManager[None]:
        return self._directions.off()

    def delta(self) -> Delta:
        trained = self._directions.delta()
        assert isinstance(trained, LowRank)
        fused = {
            name: (up, (down.double() @ self._fusion.cpu()).float()) for name, (up, down) in trained.factors.items()
        }
        return self._refined.text_map(TEXT_INPUT) + LowRank(fused)


class _Attention:
    """Computes cross-attention in the open, and keeps what every layer pays to chosen tokens."""

    def __init__(self, unet: Any) -> None:
        self._seen: list[Tensor] = []
        for path, module in unet.named_modules():
            if path.endswith("attn2"):
                module.set_processor(self)

    def paid(self, model: Denoiser, x: Tensor, t: Tensor, text: Conditioning, tokens: Tensor) -> list[Tensor]:
        """By layer, the attention that each place pays to each prompt's `tokens`, averaged over heads: [n, places]."""
        self._seen.clear()
        model(x, t, text)
        found = [(layer * tokens[:, None]).sum(-1) for layer in self._seen]
        self._seen.clear()
        return found

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: object, **__: object
    ) -> Tensor:
        """An attention processor of diffusers: the plain computation, the probabilities kept."""
        query, key, value = (
            attn.head_to_batch_dim(side)
            for side in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        paid = attn.get_attention_scores(query, key)
        self._seen.append(paid.unflatten(0, (len(hidden_states), -1)).mean(1))
        found: Tensor = attn.to_out[0](attn.batch_to_head_dim(paid @ value))
        return found


def _importance(levels: int) -> Tensor:
    """How likely each timestep is (step 2), for noise schedules of any length."""
    t = torch.arange(levels) * (1000 / levels)
    return torch.sigmoid((t - 200) / 20) - torch.sigmoid((t - 400) / 20)
