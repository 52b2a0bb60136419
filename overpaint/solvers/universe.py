"""The universe: everything a text encoder is known to speak of, as one second-moment matrix and its Cholesky factor.

`A = w sum_j K_j K_j^T + R R^T + lambda I` over all concepts j that the registry knows, with R the keys to preserve: every
other word of the tokenizer's vocabulary in a few neutral sentences, and the empty prompt. The vocabulary speaks for the
concepts that nobody listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.digests import canonical_json
from overpaint.bases.text import TextEncoder
from overpaint.concepts import Concept
from overpaint.solvers.keys import keys_and_values, keys_of, neutral_sentences

EMPTY_WEIGHT = 10.0
SENTENCES_PER_WORD = 3
BEGIN_WEIGHT = 1e4
"""Begin-of-text is constant and by far the largest embedding of CLIP; weighted so, it is preserved to rounding."""


@dataclass(frozen=True, eq=False)
class Universe:
    """The factored second moment (L with `A = L L^T`, float64 d x d) and every concept's keys and values."""

    cholesky: Tensor
    keys: dict[str, Tensor]
    values: dict[str, Tensor]
    ridge: float

    @property
    def condition(self) -> float:
        """The condition number of A."""
        found: float = torch.linalg.cond(self.cholesky).item() ** 2
        return found


class _Memory:
    """What was computed for one opened base: its encoder, its vocabulary's moment, its concepts' keys."""

    def __init__(self, base: Base, device: torch.device) -> None:
        self.encoder = TextEncoder.of(base, device)
        self.vocabulary: list[_Sentence] | None = None
        self.words: dict[tuple[str, str], Tensor] = {}
        self.pairs: dict[bytes, tuple[Tensor, Tensor]] = {}
        self.universes: dict[bytes, Universe] = {}


_memories: WeakKeyDictionary[Base, _Memory] = WeakKeyDictionary()


def universe(base: Base, concepts: tuple[Concept, ...], ridge: float, weight: float, device: torch.device) -> Universe:
    """The universe of `concepts` (in any order) on a base; computed once per opened base and set of concepts.

    `ridge` is lambda relative to the mean eigenvalue of A before it is added; `weight` is w, how much a listed concept counts
    against a word of the vocabulary.
    """
    memory = _memory(base, device)
    ordered = sorted(concepts, key=lambda c: c.name)
    key = canonical_json([[c.as_json() for c in ordered], ridge, weight])
    if key not in memory.universes:
        memory.universes[key] = _build(memory, base, ordered, ridge, weight)
    return memory.universes[key]


def prepare(base: Base, concepts: Iterable[Concept], device: torch.device) -> None:
    """Encode the vocabulary of a base and the concepts of a universe now rather than in the first solve."""
    memory = _memory(base, device)
    _vocabulary(memory, base)
    for concept in concepts:
        _pair(memory, base, concept)


def _memory(base: Base, device: torch.device) -> _Memory:
    if base not in _memories:
        _memories[base] = _Memory(base, device)
    return _memories[base]


def _build(memory: _Memory, base: Base, concepts: list[Concept], ridge: float, weight: float) -> Universe:
    keys, values = {}, {}
    for concept in concepts:
        keys[concept.name], values[concept.name] = _pair(memory, base, concept)
    moment = _preserved(memory, base, {w for c in concepts for w in c.words})
    for k in keys.values():
        moment = moment + weight * k @ k.T
    empty = memory.encoder.hidden([""])[0].double().cpu()
    moment += EMPTY_WEIGHT * empty.T @ empty + BEGIN_WEIGHT * torch.outer(empty[0], empty[0])
    size = ridge * moment.diagonal().mean()
    return Universe(
        torch.linalg.cholesky(moment + size * torch.eye(len(moment), dtype=torch.float64)), keys, values, float(size)
    )


@dataclass(frozen=True, eq=False)
class _Sentence:
    """A neutral sentence, the words it is asked with, and the second moment of their keys, float64 [d, d]."""

    template: str
    words: frozenset[str]
    moment: Tensor


def _pair(memory: _Memory, base: Base, concept: Concept) -> tuple[Tensor, Tensor]:
    name = canonical_json(concept.as_json())
    if name not in memory.pairs:
        memory.pairs[name] = keys_and_values(memory.encoder, base, concept)
    return memory.pairs[name]


def _vocabulary(memory: _Memory, base: Base) -> list[_Sentence]:
    """Every word of the tokenizer in `SENTENCES_PER_WORD` of the neutral sentences, which take turns.

    What matters is that words *and* sentences are many; all words in all sentences would cost several times as much.
    """
    if memory.vocabulary is None:
        words, templates = memory.encoder.words(), neutral_sentences(base)
        turns = max(1, len(templates) // SENTENCES_PER_WORD)
        memory.vocabulary = []
        for j, template in enumerate(templates):
            chosen = words[j % turns :: turns]
            total = torch.zeros(memory.encoder.width, memory.encoder.width, dtype=torch.float64)
            for start in range(0, len(chosen), 256):
                k = keys_of(memory.encoder, chosen[start : start + 256], [template])
                total += turns * k @ k.T
            memory.vocabulary.append(_Sentence(template, frozenset(chosen), total))
    return memory.vocabulary


def _preserved(memory: _Memory, base: Base, known: set[str]) -> Tensor:
    """The vocabulary's second moment without the known concepts, which have keys of their own.

    Left out are their words in every sentence, and whole sentences that name one of them: to preserve "a dog in ink style"
    for every dog would be to preserve the style.
    """
    known = {word.casefold() for word in known}
    total = torch.zeros(memory.encoder.width, memory.encoder.width, dtype=torch.float64)
    turns = max(1, len(neutral_sentences(base)) // SENTENCES_PER_WORD)
    for sentence in _vocabulary(memory, base):
        if known & set(re.findall(r"\w+", sentence.template.casefold())):
            continue
        total += sentence.moment
        for word in sorted(known & sentence.words):
            if (word, sentence.template) not in memory.words:
                memory.words[word, sentence.template] = keys_of(memory.encoder, [word], [sentence.template])
            k = memory.words[word, sentence.template]
            total -= turns * k @ k.T
    return total
