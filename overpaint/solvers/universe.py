"""The universe: everything a text encoder is known to speak of, as one second-moment matrix and its Cholesky factor.

`A = w sum_j K_j K_j^T + R R^T + lambda I` over all concepts j that the registry knows, with R the keys to preserve: every
other word of the tokenizer's vocabulary in a few neutral sentences, and the empty prompt. The vocabulary speaks for the
concepts that nobody listed.
"""

from __future__ import annotations

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
        self.vocabulary: Tensor | None = None
        self.words: dict[str, Tensor] = {}
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


def prepare(base: Base, device: torch.device) -> None:
    """Read the vocabulary of a base now rather than in the first solve; it is the same for all concepts."""
    _vocabulary(_memory(base, device), base)


def _memory(base: Base, device: torch.device) -> _Memory:
    if base not in _memories:
        _memories[base] = _Memory(base, device)
    return _memories[base]


def _build(memory: _Memory, base: Base, concepts: list[Concept], ridge: float, weight: float) -> Universe:
    keys, values = {}, {}
    for concept in concepts:
        name = canonical_json(concept.as_json())
        if name not in memory.pairs:
            memory.pairs[name] = keys_and_values(memory.encoder, base, concept)
        keys[concept.name], values[concept.name] = memory.pairs[name]
    moment = _preserved(memory, base, {w for c in concepts for w in c.words})
    for k in keys.values():
        moment = moment + weight * k @ k.T
    empty = memory.encoder.hidden([""])[0].double().cpu()
    moment += EMPTY_WEIGHT * empty.T @ empty + BEGIN_WEIGHT * torch.outer(empty[0], empty[0])
    size = ridge * moment.diagonal().mean()
    return Universe(
        torch.linalg.cholesky(moment + size * torch.eye(len(moment), dtype=torch.float64)), keys, values, float(size)
    )


def _vocabulary(memory: _Memory, base: Base) -> Tensor:
    """The second moment of every word of the tokenizer in the neutral sentences, float64 [d, d]."""
    if memory.vocabulary is None:
        words, templates = memory.encoder.words(), neutral_sentences(base)
        total = torch.zeros(memory.encoder.width, memory.encoder.width, dtype=torch.float64)
        for start in range(0, len(words), 256):
            k = keys_of(memory.encoder, words[start : start + 256], templates)
            total += k @ k.T
        memory.vocabulary = total
    return memory.vocabulary


def _preserved(memory: _Memory, base: Base, erased: set[str]) -> Tensor:
    """The vocabulary's second moment without the words of known concepts, which have keys of their own."""
    moment = _vocabulary(memory, base).clone()
    for word in sorted({w.casefold() for w in erased} & set(memory.encoder.words())):
        if word not in memory.words:
            memory.words[word] = keys_of(memory.encoder, [word], neutral_sentences(base))
        moment -= memory.words[word] @ memory.words[word].T
    return moment
