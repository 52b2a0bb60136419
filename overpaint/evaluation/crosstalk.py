"""Cross-talk: how much the patch for one concept moves every other one, predicted from its delta and measured on pictures.

For deltas that change nothing but what reads the prompt it has a closed form. A patch i adds `dW_l` to every projection
`W_l` that reads it; over a concept's keys K_j with second moment `S_j = K_j K_j^T`, the change of what is read is
`effect(i, j)^2 = sum_l |dW_l K_j|^2 / sum_l |W_l K_j|^2 = tr(H_i S_j) / tr(G S_j)`, with `H_i = sum_l dW_l^T dW_l` and
`G = sum_l W_l^T W_l`. Where tensors read several text inputs side by side, keys are those of all of them together;
where others read another text input, both traces are sums over these groups. Cross-talk is `effect(i, j) / effect(i, i)`: 0 is
none, 1 is as much as the patch does to its own concept. S_j is kept as a thin factor F, `S_j = F F^T`: encoding a concept's
sentences takes seconds on a large text encoder, F is less than a megabyte, and is read again while base and sentences are
the same.

A delta that changes other tensors has no such form; it is probed on the model instead (`probe`): at a few noise levels,
`|eps_i(x, c_j) - eps_0(x, c_j)|` relative to what the prompt contributes without the patch, `|eps_0(x, c_j) - eps_0(x, '')|`,
with Gaussian x, the same for all.

The suite measures it: each patch alone, every concept drawn and judged, beside what is predicted. For each pair, the share of the
base's accuracy that is lost, and how far the pictures of the same seeds moved, relative to the patch's own concept, which is
what the closed form predicts. Rank correlations say whether the prediction can be believed; where nothing was lost there is no
order to compare, and none is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.text_encoder import AnyTextEncoder, text_sources
from overpaint.core.concepts import Concept
from overpaint.core.encoding import evenly_spaced, json_digest
from overpaint.core.errors import NotFound
from overpaint.evaluation.context import EvalContext, EvaluatedPatch
from overpaint.evaluation.metrics import Measurement, differences, rank_correlation
from overpaint.evaluation.prompts import OBJECT, EvalPrompt
from overpaint.evaluation.report_page import HeatMap, Numbers, Section, percent, plain
from overpaint.evaluation.suites import Suite
from overpaint.patches.compose import Term, plan
from overpaint.patches.live import Overlay
from overpaint.patches.patch import Patch
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.sentences import KEPT_PADDING, PADDING, keys_of, sentence_pairs
from overpaint.solvers.trained.denoiser import Denoiser
from overpaint.solvers.vocabulary import recalled, remember

ENERGY = 1 - 1e-6
"""Share of the second moment's trace that the factor keeps."""
LEVELS = (0.9, 0.6, 0.3)
"""Where to look, as shares of the noise schedule; the first decides the composition, the last the details."""
SENTENCES, SAMPLES = 4, 2
WARN_ABOVE = 0.2
"""Cross-talk from which `patch add` warns."""


class ConceptMoments:
    """Second-moment factors of concepts on one base. `cache` is a folder, or None to keep nothing.

    Sentences that name another of `concepts` are left out: what erasing ink does to "a cat in ink style" says nothing
    about cats.
    """

    def __init__(self, base: Base, concepts: Iterable[Concept], cache: Path | None, device: torch.device) -> None:
        self._base, self._cache, self._device = base, cache, device
        self._named = {word.casefold() for concept in concepts for word in concept.words}
        self._encoders: Mapping[str, AnyTextEncoder] = {}
        self._factors: dict[str, Tensor] = {}

    def factor(self, concept: Concept, text_inputs: tuple[str, ...] = ("text_encoder",)) -> Tensor:
        """F, float64 [d, k], of what comes through text inputs that are read side by side, one below the other.

        Raises PromptTooLong when the concept does not fit into a sentence.
        """
        # By the base's fingerprint, and not by its tokenizer's rules as well: reading a tokenizer would take most of `patch add`.
        identity = {
            "cross-talk": self._base.fingerprint,
            "text_inputs": text_inputs,
            "words": concept.words,
            "sentences": self._templates(concept),
            "padding": [PADDING, KEPT_PADDING],
        }
        name = json_digest(identity)
        if name not in self._factors:
            factor = recalled(identity, self._cache).get("factor")
            if factor is None:
                factor = self._compute(concept, text_inputs)
                remember(identity, {"factor": factor}, self._cache)
            self._factors[name] = factor
        return self._factors[name]

    def _templates(self, concept: Concept) -> list[str]:
        asked = [template for template, _ in sentence_pairs(self._base, concept.kind)]
        return [t for t in asked if not self._named & set(re.findall(r"\w+", t.casefold()))] or asked[:1]

    def _compute(self, concept: Concept, text_inputs: tuple[str, ...]) -> Tensor:
        self._encoders = self._encoders or text_sources(self._base, self._device)
        templates = self._templates(concept)
        count = len(concept.words) * len(templates)
        keys = torch.cat(
            [keys_of(self._encoders[text_input], concept.words, templates).cpu() for text_input in text_inputs]
        )
        left, size, _ = torch.linalg.svd(keys / count**0.5, full_matrices=False)
        share = size.square().cumsum(0) / size.square().sum()
        rank = int((share < ENERGY).sum()) + 1
        factor: Tensor = (left[:, :rank] * size[:rank]).double()
        return factor


@torch.no_grad()
def probe(base: Base, patch: Patch, concepts: Sequence[Concept], device: torch.device) -> list[float]:
    """The relative change of what is predicted for each concept, in their order. Raises Unsolvable for a base whose denoiser
    is not known (`solvers.trained.denoiser`)."""
    denoiser = Denoiser.of(EditProblem(base, patch.concept, (), 0, device), shared=False)
    prompts = [_prompts(base, concept) for concept in concepts]
    before = [_predicted(denoiser, asked) for asked in prompts]
    empty = _predicted(denoiser, [""] * SENTENCES)
    overlay = Overlay(denoiser.pipe, base)
    with overlay.applied([Term(patch.id, patch.delta)]):
        after = [_predicted(denoiser, asked) for asked in prompts]
    return [float((b - a).norm() / (a - empty).norm()) for a, b in zip(before, after, strict=True)]


def _prompts(base: Base, concept: Concept) -> list[str]:
    """`SENTENCES` sentences that name the concept, spread over those the base knows for its kind."""
    known = sentence_pairs(base, concept.kind)
    chosen = [known[i * len(known) // SENTENCES][0] for i in range(SENTENCES)]
    return [template.format(concept.words[i % len(concept.words)]) for i, template in enumerate(chosen)]


def _predicted(denoiser: Denoiser, prompts: list[str]) -> Tensor:
    """What is predicted at every level, float32 [levels, sentences * SAMPLES, c, h, w]."""
    text = denoiser.encode(prompts).map(lambda part: part.repeat_interleave(SAMPLES, 0))
    x = torch.randn((SAMPLES, *denoiser.shape), generator=torch.Generator().manual_seed(0))
    x = x.repeat(len(prompts), 1, 1, 1).to(denoiser.device)
    levels = [int(share * (denoiser.levels - 1)) for share in LEVELS]
    times = [denoiser.time(torch.tensor([level])).expand(len(x)) for level in levels]
    return torch.stack([denoiser(x, t, text) for t in times])


@dataclass(frozen=True)
class Pair:
    """A patch's concept, a concept that it moves, and by how much relative to its own."""

    emitter: str
    receiver: str
    ratio: float


@dataclass(frozen=True, eq=False)
class Crosstalk:
    """`ratios` float64 [patches, concepts]; `patches` holds (patch id, concept), `methods` "closed form" or "probed"."""

    patches: tuple[tuple[str, str], ...]
    concepts: tuple[str, ...]
    methods: tuple[str, ...]
    ratios: NDArray[np.float64]

    def heat_map(self, caption: str) -> HeatMap:
        """The ratios, a row for each patch and a column for each concept."""
        rows = tuple(concept for _, concept in self.patches)
        return HeatMap(rows, self.concepts, tuple(tuple(map(float, row)) for row in self.ratios), caption, "patch")

    def pairs(self) -> list[Pair]:
        """Every pair of two different concepts, the strongest first."""
        pairs = [
            Pair(emitter, receiver, float(self.ratios[i, j]))
            for i, (_, emitter) in enumerate(self.patches)
            for j, receiver in enumerate(self.concepts)
            if emitter != receiver
        ]
        return sorted(pairs, key=lambda pair: (-pair.ratio, pair.emitter, pair.receiver))

    def above(self, threshold: float = WARN_ABOVE) -> list[Pair]:
        """The pairs that a careful person wants to know of, the strongest first."""
        return [pair for pair in self.pairs() if pair.ratio > threshold]


@own_torch_settings()
def crosstalk(
    base: Base,
    patches: Sequence[Patch],
    concepts: Sequence[Concept] = (),
    *,
    cache: Path | None = None,
    device: torch.device | None = None,
) -> Crosstalk:
    """What every patch does to its own and each other's concept, and to those of `concepts`.

    `cache` is a folder where the concepts' second moments are kept between calls. Raises WrongBase for a patch of another
    base, BadDelta for one that does not fit.
    """
    where = device or torch.device("cpu")
    receivers = {patch.concept.name: patch.concept for patch in patches}
    receivers |= {concept.name: concept for concept in concepts if concept.name not in receivers}
    names = tuple(sorted(receivers))
    rows, methods = [], []
    closed = _ClosedForm(base, [receivers[name] for name in names], cache, where)
    for patch in patches:
        patch.check(base)
        in_closed_form = has_closed_form(base, patch)
        moves = closed.effects(patch) if in_closed_form else probe(base, patch, closed.concepts, where)
        methods.append("closed form" if in_closed_form else "probed")
        own = moves[names.index(patch.concept.name)]
        rows.append([move / own if own > 0 else 0.0 for move in moves])
    ratios = np.array(rows, dtype=np.float64).reshape(len(patches), len(names))
    return Crosstalk(tuple((p.id, p.concept.name) for p in patches), names, tuple(methods), ratios)


def disturbances(base: Base, patches: Sequence[Patch], concept: str, *, cache: Path) -> list[Pair]:
    """The strong cross-talk between one concept's patch and the other `patches`, both ways, where it has a closed form."""
    known = [patch for patch in patches if has_closed_form(base, patch)]
    if len(known) < 2:
        return []
    return [pair for pair in crosstalk(base, known, cache=cache).above() if concept in (pair.emitter, pair.receiver)]


def has_closed_form(base: Base, patch: Patch) -> bool:
    """Whether a patch changes nothing but projections that read the prompt."""
    return set(patch.delta.targets(base)) <= set(base.projections())


class _ClosedForm:
    """The second moments of a base's projections (G) and of the concepts' keys (S_j), computed when first asked for."""

    def __init__(self, base: Base, concepts: list[Concept], cache: Path | None, device: torch.device) -> None:
        self.base, self.concepts = base, concepts
        self._groups = [_Group(base, text_inputs) for text_inputs in _side_by_side(base)]
        self._moments = ConceptMoments(base, concepts, cache, device)

    def effects(self, patch: Patch) -> list[float]:
        """`effect(i, j)` for every concept j."""
        changes = [group.change(patch) for group in self._groups]
        effects = []
        for concept in self.concepts:
            moved = read = 0.0
            for group, change in zip(self._groups, changes, strict=True):
                thin = self._moments.factor(concept, group.text_inputs)
                moved += float(torch.einsum("dk,de,ek->", thin, change, thin))
                read += float(torch.einsum("dk,de,ek->", thin, group.gram, thin))
            effects.append((max(0.0, moved) / read) ** 0.5)
        return effects


def _side_by_side(base: Base) -> list[tuple[str, ...]]:
    """The text inputs of a base, those together that the same tensors read, in the order of their columns."""
    by_projections: dict[tuple[str, ...], list[str]] = {}
    for text_input in base.text_inputs:
        by_projections.setdefault(tuple(base.projections(text_input)), []).append(text_input)
    return [
        tuple(sorted(text_inputs, key=lambda text_input: base.columns(text_input, names[0]).start))
        for names, text_inputs in by_projections.items()
    ]


class _Group:
    """Text inputs that the same tensors read, and the columns of these tensors that belong to them."""

    def __init__(self, base: Base, text_inputs: tuple[str, ...]) -> None:
        self.base, self.text_inputs = base, text_inputs
        self._names = base.projections(text_inputs[0])
        self._columns = {text_input: base.columns(text_input, self._names[0]) for text_input in text_inputs}
        self._width = max(columns.stop for columns in self._columns.values())

    @cached_property
    def gram(self) -> Tensor:
        """G, float64 [d, d]."""
        weights = (weight[:, : self._width].double() for weight in self.base.tensors(self._names).values())
        return torch.stack([weight.T @ weight for weight in weights]).sum(0)

    def change(self, patch: Patch) -> Tensor:
        """H of a patch, float64 [d, d]; for text maps from their factors, without touching a weight."""
        total = torch.zeros_like(self.gram)
        if patch.delta.parts == patch.delta.text_maps:
            maps = [part for part in patch.delta.text_maps if part.encoder in self.text_inputs]
            if maps:
                up = torch.cat([self._placed(text_map.encoder, text_map.up) for text_map in maps], 1)
                down = torch.cat([self._placed(text_map.encoder, text_map.down) for text_map in maps], 1)
                total = down @ (up.T @ self.gram @ up) @ down.T
            return total
        planned = plan(self.base, [Term(patch.id, patch.delta)])
        for name in (name for name in self._names if name in planned.stacks):
            step = planned.change(name)[:, : self._width]
            total += step.T @ step
        return total

    def _placed(self, text_input: str, factor: Tensor) -> Tensor:
        """A factor of one text input among the columns of all."""
        whole = torch.zeros(self._width, factor.shape[1], dtype=torch.float64)
        whole[self._columns[text_input]] = factor.double()
        return whole


LOST, MOVED, PREDICTED = "accuracy lost", "relative change of the pictures", "predicted relative effect"
ALL_PAIRS, RANKED, PAIRS_LOST = "all pairs", "rank correlation of prediction and ", "pairs that lost accuracy"
BELIEVED = 0.7
"""A rank correlation from which the closed form may stand for the measurement."""


@dataclass(frozen=True)
class MeasuredPair:
    """What one patch did to another concept: lost accuracy, the pictures' change relative to its own, the prediction."""

    emitter: str
    receiver: str
    lost: float
    moved: float
    predicted: float


@dataclass(frozen=True)
class CrosstalkSuite(Suite):
    """How many pictures of each concept are judged, and how many unlisted objects are looked at beside the registry's."""

    pictures: int = 6
    unlisted: int = 4

    heading = "Cross-talk"

    def run(self, context: EvalContext) -> list[Measurement]:
        receivers = self._receivers(context)
        prompts = {name: self._neutral(context, concept) for name, concept in receivers.items()}
        context.image_generator.expect((1 + len(context.patches)) * sum(map(len, prompts.values())))
        where = context.image_generator.image_cache.folder
        predicted = crosstalk(
            context.base,
            [each.patch for each in context.patches],
            list(receivers.values()),
            cache=where.parent / "moments" if where else None,
            device=context.device,
        )
        pairs: list[MeasuredPair] = []
        for i, patch in enumerate(context.patches):
            ratios = dict(zip(predicted.concepts, predicted.ratios[i], strict=True))
            pairs += self._pairs(context, patch, receivers, prompts, ratios)
        return [*_pair_rows(pairs, self.pictures), *_correlations(pairs)]

    def _receivers(self, context: EvalContext) -> dict[str, Concept]:
        """The concepts of the patches, those of the registry that can be judged, and a few that it does not list."""
        receivers = {patch.concept.name: patch.concept for patch in context.patches}
        for concept in context.known:
            try:
                context.class_of(concept)
            except NotFound:
                continue
            receivers.setdefault(concept.name, concept)
        classes = {context.class_of(concept)[1] for concept in receivers.values()}
        free = [name for name in context.others(OBJECT) if name not in classes]
        return receivers | {name: Concept(name) for name in evenly_spaced(free, self.unlisted)}

    def _neutral(self, context: EvalContext, concept: Concept) -> list[EvalPrompt]:
        """Prompts for a concept; of two concepts in one sentence nobody could say which was hurt."""
        prompts = context.prompts(*context.class_of(concept), self.pictures)
        others = [each for each in prompts if len(each.shows) == 1]
        return others or prompts

    def _pairs(
        self,
        context: EvalContext,
        patch: EvaluatedPatch,
        receivers: dict[str, Concept],
        prompts: dict[str, list[EvalPrompt]],
        ratios: dict[str, float],
    ) -> Iterable[MeasuredPair]:
        moved, lost = {}, {}
        for name, concept in receivers.items():
            head, _ = context.class_of(concept)
            before = context.on_base(prompts[name], head, name)
            after = context.verdicts([patch.term], prompts[name], head)
            lost[name] = 1 - float(after.right.mean() / before.right.mean())
            pictures = (
                context.image_generator.draw([patch.term], prompts[name]),
                context.image_generator.draw((), prompts[name]),
            )
            moved[name] = float(differences(*pictures).mean())
        own = max(moved[patch.concept.name], 1e-9)
        return [
            MeasuredPair(patch.concept.name, name, lost[name], moved[name] / own, ratios[name])
            for name in receivers
            if name != patch.concept.name
        ]

    @classmethod
    def section(cls, numbers: Numbers) -> Section:
        """Three matrices, how far prediction and measurement agree, and why where they do not."""
        ranked = _ranked(numbers)
        correlations = [f"{each.metric}: {each.value:.2f} over {each.n} pairs" for each in ranked]
        lost = numbers.get(ALL_PAIRS, PAIRS_LOST)
        text = "Rows are patches, each alone on the base; columns are concepts that it should leave alone. 0 is no effect.\n\n"
        if lost is not None:
            text += f"{plain(lost.value)} of {lost.n} pairs lost accuracy. "
        text += "; ".join(correlations) or "No pair differs from another, so that there is no order to compare."
        heats = (
            _pair_matrix(numbers, LOST, "Share of the base's accuracy that is lost", "crosstalk-measured"),
            _pair_matrix(numbers, MOVED, "Change of the pictures, relative to the patch's own concept"),
            _pair_matrix(
                numbers,
                PREDICTED,
                "Predicted in closed form, relative to the patch's own concept",
                "crosstalk-predicted",
            ),
        )
        return Section(cls.heading, text + _doubt(numbers), heats=heats)


def _ranked(numbers: Numbers) -> list[Measurement]:
    """The rank correlations of a run."""
    return [each for each in numbers.measurements if each.subject == ALL_PAIRS and each.metric.startswith(RANKED)]


def _pair_matrix(numbers: Numbers, metric: str, caption: str, file: str = "") -> HeatMap:
    """A matrix of the pairs "emitter -> receiver"."""
    pairs = [tuple(subject.split(" -> ")) for subject in numbers.subjects() if " -> " in subject]
    rows = tuple(dict.fromkeys(pair[0] for pair in pairs))
    columns = tuple(dict.fromkeys([*rows, *(pair[1] for pair in pairs)]))
    values = tuple(tuple(numbers.value(f"{row} -> {column}", metric) for column in columns) for row in rows)
    return HeatMap(rows, columns, values, caption, "patch", file)


def _doubt(numbers: Numbers) -> str:
    """Why predicted and measured cross-talk are ordered differently, where they are."""
    ranked = [each.value for each in _ranked(numbers)]
    if not ranked or max(ranked) >= BELIEVED:
        return ""
    most = max((each.value for each in numbers.measurements if each.metric == PREDICTED), default=0.0)
    if most < WARN_ABOVE:
        why = "so small a change of what is read ends in a picture's chance details, and there is little to rank but those"
    else:
        why = "the prediction knows how much of what is read changes, and not what the model makes of it"
    return f". The largest predicted effect is {percent(most)} of what a patch does to its own concept: {why}."


def _pair_rows(pairs: Iterable[MeasuredPair], pictures: int) -> Iterable[Measurement]:
    for pair in pairs:
        subject = f"{pair.emitter} -> {pair.receiver}"
        yield Measurement(subject, LOST, pair.lost, pictures)
        yield Measurement(subject, MOVED, pair.moved, pictures)
        yield Measurement(subject, PREDICTED, pair.predicted, pictures)


def _correlations(pairs: list[MeasuredPair]) -> Iterable[Measurement]:
    predicted = [pair.predicted for pair in pairs]
    for what, measured in ((MOVED, [pair.moved for pair in pairs]), (LOST, [pair.lost for pair in pairs])):
        correlation = rank_correlation(predicted, measured)
        if correlation is not None:
            yield Measurement(ALL_PAIRS, f"{RANKED}{what}", correlation, len(pairs))
    lost = np.array([pair.lost for pair in pairs])
    yield Measurement(ALL_PAIRS, PAIRS_LOST, float((lost > 0).sum()), len(pairs))
