"""The prompts on which solvers train: those that name a concept, and those that others should go on understanding."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import HOLE, Concept
from overpaint.solvers.problem import EditProblem

# Keys and values: the text embeddings that speak of a concept, and those that should stand in their place.
#
# Embeddings are contextual, so a concept's keys come from several sentences; and the text encoder is causal, so they are
# taken from every position at and after the concept's first token: later tokens and the padding carry the concept too.
#
# Every key is scaled by the square root of its weight. A sentence weighs the same whatever its length, and so does a concept
# whatever the number of its sentences; within a sentence, tokens weigh the same, and all of the padding together as much as
# `PADDING` tokens at most, so that an encoder that pads to 77 does not hear padding alone.


PADDING = 4.0
"""Tokens. Less would leave the concept in the padding, which it fills as well; more lets padding drown the subject."""


@dataclass(frozen=True)
class Sentences:
    """For one kind of concept: pairs of a sentence with `{}` for the concept, and the same sentence without it."""

    pairs: tuple[tuple[str, str], ...]


@cache
def _defaults() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(files("overpaint.solvers").joinpath("sentences.json").read_text("utf-8"))
    return raw


def sentences(base: Base, kind: str) -> Sentences:
    """The sentences for a kind of concept: the base's own (`overpaint.json`) or the package's."""
    table = {**_defaults(), **base.extras.get("sentences", {})}
    found = table["style" if kind == "style" else "object"]
    return Sentences(tuple((pair[0], pair[1]) for pair in found))


def neutral_sentences(base: Base) -> tuple[str, ...]:
    """Sentences in which every word of the vocabulary is preserved."""
    table = {**_defaults(), **base.extras.get("sentences", {})}
    return tuple(table["neutral"])


def keys_of(encoder: TextEncoder, words: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Weighted embeddings of every word in every template, from its first token on: float64 [d, m].

    A sentence weighs 1: `K K^T` is the sum of the sentences' second moments. Raises PromptTooLong.
    """
    asked = [(template, word) for word in words for template in templates]
    weights = [_weights(encoder, template, word) for template, word in asked]
    return _weighted(encoder.hidden([template.format(word) for template, word in asked]), weights)


def keys_of_prompts(encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Weighted embeddings of whole prompts: float64 [d, m], every prompt weighing 1."""
    weights = [_weights(encoder, "{}", prompt, from_begin=True) for prompt in prompts]
    return _weighted(encoder.hidden(prompts), weights)


def keys_and_values(encoder: TextEncoder, base: Base, concept: Concept) -> tuple[Tensor, Tensor]:
    """K and V of a concept, float64 [d, m] each: where its words are now, and where they should be sent.

    With an anchor, V are the anchor's embeddings in the same sentence at the same positions; without one, those of the
    sentence with the concept left out. All sentences together weigh 1. Raises PromptTooLong.
    """
    asked = list(_questions(base, concept))
    weights = [_weights(encoder, template, word) / len(asked) for template, word, _ in asked]
    keys = encoder.hidden([template.format(word) for template, word, _ in asked])
    values = encoder.hidden([instead for _, _, instead in asked])
    return _weighted(keys, weights), _weighted(values, weights)


def _questions(base: Base, concept: Concept) -> Iterable[tuple[str, str, str]]:
    """A sentence with `{}`, the concept's word in it, and the whole sentence that should stand in its place."""
    pairs = sentences(base, concept.kind).pairs
    plain = [(template, word, without) for word in concept.words for template, without in pairs]
    own = [(template, word, " ".join(template.format("").split())) for template, word in concept.phrases]
    for template, word, without in (*plain, *own):
        yield template, word, template.format(concept.anchor) if concept.anchor else without


def _weights(encoder: TextEncoder, template: str, word: str, *, from_begin: bool = False) -> Tensor:
    """The weight of each embedding from the word's first token on (or from begin-of-text), together 1."""
    start = 0 if from_begin else encoder.first_position(template, word)
    if encoder.is_pooled:
        return torch.ones(1, dtype=torch.float64)
    phrases = len(encoder.tokens(word)) + len(encoder.tokens(template.partition("{}")[2].strip())) + 1 + from_begin
    weights = torch.ones(encoder.length - start, dtype=torch.float64)
    padding = weights[phrases:]
    padding *= min(1.0, PADDING / max(1, len(padding)))
    return weights / weights.sum()


def _weighted(hidden: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The last embeddings of each sentence, as many as it has weights, scaled by their roots: float64 [d, m]."""
    # Written in place: lists of parts and their sum would take twice what a large text encoder leaves room for.
    found = hidden.new_empty((sum(map(len, weights)), hidden.shape[-1]), dtype=torch.float64)
    rows = found.split([len(w) for w in weights])
    for h, w, row in zip(hidden, weights, rows, strict=True):
        torch.mul(h[len(h) - len(w) :], w.sqrt()[:, None].to(h.device), out=row)
    return found.T


Item = TypeVar("Item")


def asked(problem: EditProblem, encoder: TextEncoder, count: int) -> list[tuple[str, str]]:
    """Prompts that name the concept, each with the same prompt without it: with its anchor, or with it left out.

    The concept's own prompts and, with `count` 0, its bare words, as most papers have it; else that many sentences, spread
    evenly over all sentences and words. Raises PromptTooLong when the text encoder would not read a word to its end.
    """
    concept = problem.concept
    pairs = sentences(problem.base, concept.kind).pairs if count else ((HOLE, ""),)
    plain = [(template, word, without) for template, without in pairs for word in concept.words]
    own = [(template, word, " ".join(template.format("").split())) for template, word in concept.phrases]
    for template, word, _ in (*own, *plain):
        encoder.first_position(template, word)
    return [
        (template.format(word), template.format(concept.anchor) if concept.anchor else without)
        for template, word, without in (*own, *(spread(plain, count) if count else plain))
    ]


def retained(problem: EditProblem, encoder: TextEncoder, count: int) -> list[str]:
    """The empty prompt, the prompts that the problem keeps, and `count` more in which the concept does not occur.

    Half of these name the other concepts of the universe, as far as there are any; the rest, words of the tokenizer's
    vocabulary in neutral sentences.
    """
    named = [
        template.format(word)
        for other in problem.others
        for word in other.words
        for template, _ in sentences(problem.base, other.kind).pairs
    ]
    plain = [template.format(word) for word in encoder.words() for template in neutral_sentences(problem.base)]
    own = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in problem.concept.words), re.IGNORECASE)
    listed = spread([prompt for prompt in named if not own.search(prompt)], count // 2)
    return [
        "",
        *problem.keep,
        *listed,
        *spread([prompt for prompt in plain if not own.search(prompt)], count - len(listed)),
    ]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items at equal distances; all, where there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
