"""Sentences that name a concept, and its keys and values: the embeddings that speak of it, and what should replace them.

Embeddings are contextual, so a concept's keys come from several sentences; and the text encoder is causal, so they are
taken from every position at and after the concept's first token: later tokens and the padding carry the concept too. Where a
pipeline hands its own text on (`overpaint.bases.capture`), they are taken wherever a prompt differs.

Every key is scaled by the square root of its weight. A sentence weighs the same whatever its length, and so does a concept
whatever the number of its sentences; within a sentence, tokens weigh the same, and all of the padding together as much as
`PADDING` tokens at most, so that an encoder that pads to 77 does not learn of padding alone. The first `KEPT_PADDING` positions
stand for all of the padding (on the embedded base, one position or all of them erase and preserve the same); what comes
after them is never encoded.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import AnyTextEncoder, FeedForward, PipelineTextInput, TextEncoder
from overpaint.core.concepts import HOLE, Concept
from overpaint.core.encoding import by_digest, evenly_spaced, json_digest
from overpaint.solvers.problem import EditProblem

PADDING = 4.0
"""Tokens. Less would leave the concept in the padding, which it fills as well; more lets padding drown the subject."""
KEPT_PADDING = 2
STEP = 4
"""What concepts are sent to is encoded to multiples of so many positions, so that most share it: it is encoded once."""


@dataclass(frozen=True)
class Phrasing:
    """A sentence with `{}`, the concept's word that stands there, and the whole sentence that should replace it."""

    template: str
    word: str
    replacement: str

    @property
    def prompt(self) -> str:
        """The sentence with the word in it."""
        return self.template.format(self.word)


def phrasings(base: Base, concept: Concept, *, bare: bool = False) -> list[Phrasing]:
    """Every prompt that names a concept: its own ones first, then each of its words in each sentence for its kind.

    `bare`: by its words alone instead of in sentences. What replaces a prompt is the same with the anchor, or, without an
    anchor, with the concept left out.
    """
    own = [(template, word, _without(template)) for template, word in concept.phrases]
    pairs = ((HOLE, ""),) if bare else sentence_pairs(base, concept.kind)
    plain = [(template, word, without) for template, without in pairs for word in concept.words]
    return [
        Phrasing(template, word, template.format(concept.anchor) if concept.anchor else without)
        for template, word, without in (*own, *plain)
    ]


def _without(template: str) -> str:
    """A sentence with nothing where the word stands."""
    return " ".join(template.format("").split())


def sentence_pairs(base: Base, kind: str) -> tuple[tuple[str, str], ...]:
    """For a kind of concept, sentences with `{}` and the same without it: the base's own (`overpaint.json`) or the package's."""
    return tuple((pair[0], pair[1]) for pair in _sentences(base)["style" if kind == "style" else "object"])


def neutral_sentences(base: Base) -> tuple[str, ...]:
    """Sentences in which every word of the vocabulary is preserved."""
    return tuple(_sentences(base)["neutral"])


def _sentences(base: Base) -> dict[str, Any]:
    return {**_defaults(), **base.extras.get("sentences", {})}


@cache
def _defaults() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(files("overpaint.solvers").joinpath("sentences.json").read_text("utf-8"))
    return raw


def training_prompts(problem: EditProblem, encoder: AnyTextEncoder, count: int) -> list[tuple[str, str]]:
    """Prompts that name the concept, each with the prompt that should replace it.

    The concept's own prompts and, with `count` 0, its bare words, as most papers have it; else that many sentences, spread
    evenly over all sentences and words. Raises PromptTooLong when the text encoder would not read a word to its end.
    """
    concept = problem.concept
    every = phrasings(problem.base, concept, bare=not count)
    own, plain = every[: len(concept.phrases)], every[len(concept.phrases) :]
    for phrasing in every:
        encoder.first_position(phrasing.template, phrasing.word)
    return [(each.prompt, each.replacement) for each in (*own, *(evenly_spaced(plain, count) if count else plain))]


def retained_prompts(problem: EditProblem, encoder: AnyTextEncoder, count: int) -> list[str]:
    """The empty prompt, the prompts that the problem preserves, and `count` more in which the concept does not occur.

    Half of these name the other concepts of the universe, as far as there are any; the rest, words of the tokenizer's
    vocabulary in neutral sentences.
    """
    named = [
        pair[0].format(word)
        for other in problem.others
        for word in other.words
        for pair in sentence_pairs(problem.base, other.kind)
    ]
    plain = [template.format(word) for word in encoder.words() for template in neutral_sentences(problem.base)]
    own = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in problem.concept.words), re.IGNORECASE)
    others = evenly_spaced([prompt for prompt in named if not own.search(prompt)], count // 2)
    vocabulary = evenly_spaced([prompt for prompt in plain if not own.search(prompt)], count - len(others))
    return ["", *problem.preserved_prompts(), *others, *vocabulary]


@dataclass(frozen=True, eq=False)
class KeyPositions:
    """Which embeddings of a prompt are keys: those from position `start` on, as many as `weights`, which together are 1.

    So many embeddings as `end` must be encoded; those `before` the first token that counts need not be handed out.
    """

    start: int
    weights: Tensor
    end: int
    before: int

    @classmethod
    def of(cls, encoder: TextEncoder, template: str, word: str, *, whole: bool = False) -> KeyPositions:
        """From the word's first token on; of the `whole` prompt, from begin-of-text on. Raises PromptTooLong."""
        start = 0 if whole else encoder.first_position(template, word)
        before = 1 + len(encoder.tokens(template.partition(HOLE)[0].strip()))
        tokens = len(encoder.tokens(word)) + len(encoder.tokens(template.partition(HOLE)[2].strip())) + 1
        tokens = min(before + tokens, encoder.length)
        kept = min(encoder.length - tokens, KEPT_PADDING)
        if encoder.is_pooled:
            return cls(0, torch.ones(1, dtype=torch.float64), tokens + kept, 0 if whole else before)
        weights = torch.ones(tokens - start + kept, dtype=torch.float64)
        weights[tokens - start :] = min(PADDING, encoder.length - tokens) / max(1, kept)
        return cls(start, weights / weights.sum(), tokens + kept, start)


def keys_of(encoder: AnyTextEncoder, words: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Weighted embeddings of every word in every template, from its first token on: float64 [d, m].

    A sentence weighs 1: `K K^T` is the sum of the sentences' second moments. Raises PromptTooLong.
    """
    pairs = [(template, word) for word in words for template in templates]
    if isinstance(encoder, PipelineTextInput):
        without = {template: _without(template) for template in templates}
        return encoder.keys_and_values([(t.format(word), without[t]) for t, word in pairs], PADDING)[0]
    positions = [KeyPositions.of(encoder, template, word) for template, word in pairs]
    return _weighted(encoder, [template.format(word) for template, word in pairs], positions)


def keys_of_prompts(encoder: AnyTextEncoder, prompts: Sequence[str]) -> Tensor:
    """Weighted embeddings of whole prompts: float64 [d, m], every prompt weighing 1."""
    if isinstance(encoder, PipelineTextInput):
        return encoder.keys_and_values([(prompt, "") for prompt in prompts], PADDING)[0]
    return _weighted(encoder, prompts, [KeyPositions.of(encoder, HOLE, prompt, whole=True) for prompt in prompts])


def keys_and_values(
    encoder: AnyTextEncoder, base: Base, concept: Concept, averages: AverageWord | None = None
) -> tuple[Tensor, Tensor]:
    """K and V of a concept, float64 [d, m] each: where its words are now, and where they should be sent.

    With an anchor, V are the anchor's embeddings in the same sentence at the same positions; without one, those of the average
    word there, or, without `averages`, those of the sentence with the concept left out. All sentences together weigh 1.
    Raises PromptTooLong.
    """
    every = phrasings(base, concept)
    averages = _that_apply(averages, concept)
    if isinstance(encoder, PipelineTextInput):
        keys, values = _caught_keys_and_values(encoder, every, averages)
        return keys / len(every) ** 0.5, values / len(every) ** 0.5
    positions = _positions(encoder, every)
    keys = _weighted(encoder, [each.prompt for each in every], positions)
    if averages is not None:
        return keys, torch.cat([averages.values(encoder, *pair) for pair in zip(every, positions, strict=True)], 1)
    return keys, _weighted(encoder, [each.replacement for each in every], positions, STEP)


def _caught_keys_and_values(
    encoder: PipelineTextInput, every: Sequence[Phrasing], averages: AverageWord | None
) -> tuple[Tensor, Tensor]:
    """The same where prompts are caught; every phrasing weighs 1."""
    for each in every:
        encoder.first_position(each.template, each.word)
    if averages is None:
        return encoder.keys_and_values([(each.prompt, each.replacement) for each in every], PADDING)
    among = [(each.prompt, [each.template.format(word) for word in averages.words]) for each in every]
    return encoder.keys_and_mean_values(among, PADDING)


def keys_and_ways(
    matrix: FeedForward, base: Base, concept: Concept, averages: AverageWord | None = None
) -> tuple[Tensor, Tensor]:
    """What a matrix inside of a text encoder reads where a prompt names a concept, float64 [d, m], and how far what its layer
    gives there is from what it should be, float64 [o, m]; sentences, positions and weights as in `keys_and_values`.

    Raises PromptTooLong.
    """
    every = phrasings(base, concept)
    if isinstance(matrix.reads, PipelineTextInput):
        assert isinstance(matrix.gives, PipelineTextInput)
        averages = _that_apply(averages, concept)
        all_keys, ways = list[Tensor](), list[Tensor]()
        for each in every:  # one by one, both are caught at once
            now, values = _caught_keys_and_values(matrix.gives, [each], averages)
            all_keys.append(_caught_keys_and_values(matrix.reads, [each], averages)[0])
            ways.append(values - now)
        return torch.cat(all_keys, 1) / len(every) ** 0.5, torch.cat(ways, 1) / len(every) ** 0.5
    now, values = keys_and_values(matrix.gives, base, concept, averages)
    return _weighted(matrix.reads, [each.prompt for each in every], _positions(matrix.reads, every)), values - now


def _that_apply(averages: AverageWord | None, concept: Concept) -> AverageWord | None:
    """The average word, where it is what a concept is sent to: not one with an anchor."""
    return None if averages is None or concept.anchor or not averages.words else averages


def _positions(encoder: TextEncoder, every: Sequence[Phrasing]) -> list[KeyPositions]:
    """Which embeddings of each phrasing are keys; all of them weigh 1 together. Raises PromptTooLong."""
    each_alone = [KeyPositions.of(encoder, each.template, each.word) for each in every]
    return [replace(each, weights=each.weights / len(every)) for each in each_alone]


AVERAGED, AVERAGED_CAUGHT = 64, 16
"""Words of the vocabulary whose mean is the average word; fewer where every prompt goes through a whole pipeline."""
AVERAGED_SENTENCES = 256
"""Sentences for which the average word is kept."""


class AverageWord:
    """What a text encoder gives on average for a word of its vocabulary, in any sentence: embeddings that name nothing.

    The words are the first of one fixed order (by digest, so without any pattern), whatever the concept: its own may be one of
    them. Where the tokenizer knows fewer than two there are none, and a concept goes to the sentence without it.
    """

    def __init__(self, encoder: AnyTextEncoder) -> None:
        single = (word for word in by_digest(encoder.words()) if len(encoder.tokens(word)) == 1)
        words = list(islice(single, AVERAGED_CAUGHT if isinstance(encoder, PipelineTextInput) else AVERAGED))
        self.words = words if len(words) > 1 else []
        self.means: OrderedDict[str, Tensor] = OrderedDict()
        """By the digest of a sentence, the newest mean embeddings, float64 [positions, d]; what was stored may be put here."""

    def values(self, encoder: TextEncoder, phrasing: Phrasing, positions: KeyPositions) -> Tensor:
        """V of a phrasing: the average word where its word is, float64 [d, m].

        All tokens of a word of several go to the one embedding that the average word has; later positions follow.
        """
        mean, weights = self._mean(encoder, phrasing.template), positions.weights
        extra = 0 if encoder.is_pooled else len(encoder.tokens(phrasing.word)) - 1
        places = (torch.arange(len(weights)) - extra).clamp(0, len(mean) - 1).to(mean.device)
        return (weights.sqrt().to(mean.device)[:, None] * mean[places]).T

    def _mean(self, encoder: TextEncoder, template: str) -> Tensor:
        """The mean embedding at every position of a sentence from the word on, float64 [positions, d].

        Each sentence is encoded by itself, so that its last bits do not depend on what others were asked about.
        """
        name = json_digest(template)
        if name not in self.means:
            own = KeyPositions.of(encoder, template, self.words[0])
            prompts = [template.format(word) for word in self.words]
            hidden = encoder.hidden(prompts, own.end).double().mean(0)
            self.means[name] = hidden[own.start : own.start + len(own.weights)].clone()
        self.means.move_to_end(name)
        while len(self.means) > AVERAGED_SENTENCES:
            self.means.popitem(last=False)
        return self.means[name]


def _weighted(encoder: TextEncoder, prompts: Sequence[str], positions: Sequence[KeyPositions], step: int = 1) -> Tensor:
    """The embeddings of prompts at positions, scaled by the roots of their weights: float64 [d, m].

    As many positions of each are encoded as are needed, rounded up to a multiple of `step`.
    """
    ends = [-(-each.end // step) * step for each in positions]
    hidden = encoder.hidden(prompts, ends, [each.before for each in positions])
    # Written in place: lists of parts and their sum would take twice what a large text encoder leaves room for.
    keys = hidden.new_empty((sum(len(each.weights) for each in positions), hidden.shape[-1]), dtype=torch.float64)
    rows = keys.split([len(each.weights) for each in positions])
    for embeddings, each, row in zip(hidden, positions, rows, strict=True):
        torch.mul(
            embeddings[each.start : each.start + len(each.weights)],
            each.weights.sqrt()[:, None].to(embeddings.device),
            out=row,
        )
    return keys.T
