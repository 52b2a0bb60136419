"""The universe: everything that is known to pass through a text input, as one second-moment matrix and its Cholesky factor.

`A = w sum_j K_j K_j^T + R R^T + lambda I` over all concepts j that the registry knows, with R the keys to preserve: every
other word of the tokenizer's vocabulary in a few neutral sentences, the empty prompt, and whatever prompts somebody wants
preserved. The vocabulary speaks for the concepts that nobody listed.

Weights are relative, so that they mean the same for a small and a large text encoder: a concept, a preserved prompt and the
empty prompt are one second moment each (`sentences.py`); the whole vocabulary, of however many words, counts `VOCABULARY` times
as much as one of them, unless a solver says otherwise; and lambda is a share of the mean eigenvalue.

Begin-of-text is the same in every prompt and by far the largest embedding of CLIP. It is preserved exactly: as a constraint
`W b = W0 b` rather than by a weight, which takes nothing but the direction b out of all keys.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.text_encoder import AnyTextEncoder, FeedForward, feed_forwards, text_sources
from overpaint.core.concepts import KINDS, Concept
from overpaint.core.encoding import canonical_json, json_digest
from overpaint.core.executors import Executor
from overpaint.core.reporting import Progress, silent
from overpaint.solvers.problem import Unsolvable
from overpaint.solvers.sentences import (
    AverageWord,
    keys_and_values,
    keys_and_ways,
    keys_of,
    keys_of_prompts,
    sentence_pairs,
)
from overpaint.solvers.vocabulary import (
    LARGE,
    EncodingTask,
    Vocabulary,
    Workers,
    encoding_identity,
    recalled,
    remember,
    symmetric,
    triangle,
    vocabularies,
    vocabulary_file,
)

VOCABULARY = 25.0
EMPTY = 0.35
RIDGE = 1e-3
"""Lambda over the mean eigenvalue, where no solver says otherwise."""
TOLERANCE, HELD_OUT = 0.02, 48
"""A sample of the vocabulary is large enough when words that are not in it move less than this share farther than words that
are; and how many words that is measured with."""
BEGIN = 100.0
"""The eigenvalue of begin-of-text, over the mean of the others, for those who solve without the constraint."""
PAIRS_BYTES = 1 << 30
"""Keys and values that are kept in memory; what does not fit is encoded again when it is needed."""
UNIVERSES_BYTES = 1 << 30
"""Factors of universes that are kept in memory, beside the newest one."""


@dataclass(frozen=True)
class PreservedPrompts:
    """What a universe preserves beside its concepts: prompts, and how many words of the vocabulary (0: all).

    `cache` is a folder in which the vocabulary's moments are kept. The whole of it counts `weight` times as much as one concept.
    """

    prompts: tuple[str, ...] = ()
    words: int = 0
    cache: Path | None = None
    weight: float = VOCABULARY


@dataclass(frozen=True, eq=False)
class Universe:
    """The second moment of all that is known at one text input, factored, on the device that computed it.

    `cholesky` is L with `A = L L^T`, float64 d x d, `ridge` is lambda. `keys` and `values` are K and V of a concept by name,
    float64 [d, m], all sentences together weighing 1; what keys have of `begin`, which stays where it is, is taken out of
    both. `ways` is V - K. `begin` is the unit vector of begin-of-text, None where prompts do not all begin with one. `means` is
    the mean of each concept's keys, float64 [n, d], in the order of `keys`.

    At a matrix inside of a text encoder, keys are what it reads, and `ways` are of what its layer gives, float64 [o, m];
    there are no `values`.
    """

    cholesky: Tensor
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    ways: Mapping[str, Tensor]
    ridge: float
    means: Tensor
    begin: Tensor | None = None

    @cached_property
    def condition(self) -> float:
        """The condition number of A."""
        eigenvalues = torch.linalg.eigvalsh(self.cholesky @ self.cholesky.T)
        return float(eigenvalues[-1] / eigenvalues[0].clamp(min=torch.finfo(eigenvalues.dtype).tiny))


class _UniverseCache:
    """What was computed for one opened base on one device: its encoders, vocabularies, concepts' keys, last universes."""

    def __init__(self, base: Base, device: torch.device) -> None:
        self.encoders = text_sources(base, device)
        self.vocabularies: dict[tuple[bool, int], EncodedVocabulary] = {}
        self.words: dict[tuple[str, str, str], Tensor] = {}
        self.averages: dict[str, AverageWord] = {}
        self.pairs: OrderedDict[tuple[str, bytes, bool], tuple[Tensor, Tensor]] = OrderedDict()
        self.nbytes = 0
        self.folder: Path | None = None
        self.universes: OrderedDict[tuple[str, bytes], Universe] = OrderedDict()
        self._base = weakref.ref(base)  # what is kept for a base must not keep the base

    @cached_property
    def matrices(self) -> Mapping[str, FeedForward]:
        """The matrices inside of text encoders, by canonical name. Raises OverpaintError where one has none that serves."""
        base = self._base()
        assert base is not None, "a universe is asked for while its base is open"
        return {matrix.name: matrix for matrix in feed_forwards(base, self.encoders)}

    def sources(self, is_inside: bool) -> Mapping[str, AnyTextEncoder]:
        """Who gives the keys at every text input, or, `is_inside`, at every matrix inside of text encoders."""
        return {name: matrix.reads for name, matrix in self.matrices.items()} if is_inside else self.encoders

    def source(self, name: str) -> AnyTextEncoder:
        """Who gives the keys at a text input, or at a matrix inside of a text encoder."""
        return self.encoders[name] if name in self.encoders else self.matrices[name].reads

    def target(self, name: str) -> AnyTextEncoder:
        """Who gives the values; at a matrix inside of a text encoder, what its layer gives."""
        return self.encoders[name] if name in self.encoders else self.matrices[name].gives


_memories: WeakKeyDictionary[Base, dict[str, _UniverseCache]] = WeakKeyDictionary()
_opening = threading.Lock()
"""Held while what is known of a base is looked up or begun, so that two threads do not load its text encoders twice."""


def universe(
    base: Base,
    concepts: Iterable[Concept],
    ridge: float,
    weight: float,
    device: torch.device,
    *,
    text_input: str = "text_encoder",
    preserved: PreservedPrompts = PreservedPrompts(),
    to_average: bool = False,
    report: Progress = silent,
) -> Universe:
    """The universe of `concepts` (in any order) for a text input; computed once per opened base and set of concepts.

    `text_input` may also be the canonical name of one of the `matrices_of` a base.

    `ridge` is lambda relative to the mean eigenvalue of A before it is added; `weight` is w, how much a listed concept counts.
    The values of a concept without an anchor are those of the sentence without it, or, `to_average`, of the average word.
    Raises NotFound for a text input the base lacks, PromptTooLong for a concept that does not fit, Unsolvable for too small
    a ridge.
    """
    memory = _memory(base, device)
    if not (is_inside := "/" in text_input and text_input in memory.matrices):
        base.text_input(text_input)
    with_it = memory.sources(is_inside)
    ordered = sorted(concepts, key=lambda concept: concept.name)
    encoded = _vocabulary(memory, base, with_it, preserved, report, is_inside=is_inside)
    about = [
        [concept.as_json() for concept in ordered],
        ridge,
        weight,
        preserved.prompts,
        preserved.words,
        preserved.weight,
        to_average,
        encoded.words,
    ]
    key = (text_input, canonical_json(about))
    if key not in memory.universes:
        words = encoded.by_text_input[text_input]
        memory.universes[key] = _build(memory, base, text_input, ordered, ridge, weight, preserved, to_average, words)
        while len(memory.universes) > 4 * len(with_it) or (
            len(memory.universes) > 1
            and sum(each.cholesky.nbytes for each in memory.universes.values()) > UNIVERSES_BYTES
        ):
            memory.universes.popitem(last=False)
    memory.universes.move_to_end(key)
    return memory.universes[key]


@own_torch_settings()
def prepare(
    base: Base,
    concepts: Iterable[Concept],
    device: torch.device,
    *,
    preserved: PreservedPrompts = PreservedPrompts(),
    report: Progress = silent,
    executor: Executor | None = None,
    is_inside: bool = False,
) -> None:
    """Encode the whole vocabulary of a base, and the concepts of a universe as `separable` has them by default, now rather than
    in the first solve; with `is_inside`, for the `matrices_of` the base instead of its text inputs, as `separable_mlp` has them.

    `executor` says where the vocabulary is encoded, this process by default. Raises OverpaintError where that fails; what was
    encoded until then is kept.
    """
    memory = _memory(base, device)
    workers = Workers(executor, base) if executor else None
    sources = memory.sources(is_inside)
    _vocabulary(memory, base, sources, preserved, report, is_inside=is_inside, whole=True, workers=workers)
    for concept in concepts:
        for name in sources:
            _pair(memory, base, name, concept, to_average=True)


def text_encoders(base: Base, device: torch.device) -> Mapping[str, AnyTextEncoder]:
    """By text input, the encoders with which this base's universes are computed: loaded once for an opened base."""
    return _memory(base, device).encoders


def matrices_of(base: Base, device: torch.device) -> Mapping[str, FeedForward]:
    """By canonical name, the last feed-forward matrix of each text encoder that decides all that the encoder hands on.

    Raises OverpaintError for a text encoder in which no change of such a matrix can be solved for.
    """
    return _memory(base, device).matrices


def _memory(base: Base, device: torch.device) -> _UniverseCache:
    with _opening:
        by_device = _memories.setdefault(base, {})
        if str(device) not in by_device:
            by_device[str(device)] = _UniverseCache(base, device)
        return by_device[str(device)]


def _build(
    memory: _UniverseCache,
    base: Base,
    text_input: str,
    concepts: Sequence[Concept],
    ridge: float,
    weight: float,
    preserved: PreservedPrompts,
    to_average: bool,
    vocabulary: Vocabulary,
) -> Universe:
    encoder = memory.source(text_input)
    names = {concept.name: concept for concept in concepts}
    known = {word for concept in concepts for word in concept.words}
    moment = _vocabulary_moment(memory, text_input, vocabulary, known).to(encoder.device).mul_(preserved.weight)
    means = []
    for concept in concepts:
        keys = _pair(memory, base, text_input, concept, to_average)[0].double()
        moment += weight * keys @ keys.T
        means.append(keys.mean(1))
    for share, prompt in ((EMPTY, ""), *((1.0, prompt) for prompt in sorted(set(preserved.prompts)))):
        keys = keys_of_prompts(encoder, [prompt])
        moment += share * keys @ keys.T
    begin = _begin(encoder)
    moment, mean = _without_begin(moment, begin)
    lam = ridge * mean
    moment.diagonal().add_(lam)
    factor, failed = torch.linalg.cholesky_ex(moment)
    pivots = factor.diagonal()
    if failed or pivots.min() < 1e-7 * pivots.max():  # rounding can make nothing look like something
        raise Unsolvable(
            f"what {text_input} says does not fill its {len(moment)} dimensions, so ridge={ridge:g} is too small"
        )
    means_of_all = _orthogonal(torch.stack(means, 1), begin).T
    every = _Keys(memory, base, text_input, names, begin, to_average)
    if text_input not in memory.encoders:
        return Universe(
            factor, every, {}, _Ways(memory, base, text_input, names, begin, to_average), lam, means_of_all, begin
        )
    values = _Values(memory, base, text_input, names, begin, to_average)
    return Universe(factor, every, values, _Differences(every, values), lam, means_of_all, begin)


def _begin(encoder: AnyTextEncoder) -> Tensor | None:
    """The unit vector with which every prompt begins; None where there is none."""
    begin = encoder.begin
    return None if begin is None else begin / begin.norm()


def _without_begin(moment: Tensor, begin: Tensor | None) -> tuple[Tensor, float]:
    """A second moment in which a direction has nothing in common with others; and the mean eigenvalue of these."""
    if begin is None:
        return moment, float(moment.diagonal().mean())
    read = moment @ begin
    outer = torch.outer(begin, read)
    moment = moment - outer - outer.T + (begin @ read) * torch.outer(begin, begin)
    mean = float(moment.trace()) / (len(begin) - 1)
    return moment + BEGIN * mean * torch.outer(begin, begin), mean


def _orthogonal(keys: Tensor, begin: Tensor | None) -> Tensor:
    """Keys without what they have of begin-of-text."""
    return keys if begin is None else keys - torch.outer(begin, begin @ keys)


def _pair(
    memory: _UniverseCache, base: Base, text_input: str, concept: Concept, to_average: bool = False
) -> tuple[Tensor, Tensor]:
    """K and V of a concept, or at a matrix inside of a text encoder K and the way, float32.

    Encoded by itself: in a batch with others, its last bits would depend on them.
    """
    to_average = to_average and not concept.anchor
    key = (text_input, canonical_json(concept.as_json()), to_average)
    if key not in memory.pairs:
        averages = _average_word(memory, base, text_input) if to_average else None
        before = set() if averages is None else set(averages.means)
        if text_input in memory.encoders:
            keys, values = keys_and_values(memory.encoders[text_input], base, concept, averages)
        else:
            keys, values = keys_and_ways(memory.matrices[text_input], base, concept, averages)
        if averages is not None:
            _remember_average(memory, base, text_input, averages, before)
        memory.pairs[key] = keys.float(), values.float()
        memory.nbytes += (keys.nbytes + values.nbytes) // 2
    memory.pairs.move_to_end(key)
    keys, values = memory.pairs[key]
    while memory.nbytes > PAIRS_BYTES and len(memory.pairs) > 1:
        memory.nbytes -= sum(each.nbytes for each in memory.pairs.popitem(last=False)[1])
    return keys, values


def _average_word(memory: _UniverseCache, base: Base, text_input: str) -> AverageWord:
    """The average word of a text input, with what earlier programs have stored of it."""
    if text_input not in memory.averages:
        encoder = memory.target(text_input)
        averages = memory.averages[text_input] = AverageWord(encoder)
        identity = _identity_of_average(base, text_input, encoder, averages)
        stored = recalled(identity, memory.folder)
        averages.means.update({name: mean.to(encoder.device) for name, mean in stored.items()})
    return memory.averages[text_input]


def _remember_average(
    memory: _UniverseCache, base: Base, text_input: str, averages: AverageWord, before: set[str]
) -> None:
    """Store the average word's new means in the sentences that every concept is asked in; not those in a concept's own."""
    every = {json_digest(template) for kind in KINDS for template, _ in sentence_pairs(base, kind)}
    if (averages.means.keys() - before) & every:
        identity = _identity_of_average(base, text_input, memory.target(text_input), averages)
        remember(identity, {name: mean for name, mean in averages.means.items() if name in every}, memory.folder)


def _identity_of_average(base: Base, text_input: str, encoder: AnyTextEncoder, averages: AverageWord) -> dict[str, Any]:
    """What decides the average word's embeddings, with the kind of device, which decides their last bits."""
    identity = encoding_identity(base, {text_input: encoder})
    return {"average": averages.words, "encoder": identity, "device": encoder.device.type}


class _ByConcept(Mapping[str, Tensor]):
    """Something of every concept of a universe, by name; encoded again where it was not kept."""

    def __init__(
        self,
        memory: _UniverseCache,
        base: Base,
        text_input: str,
        concepts: Mapping[str, Concept],
        begin: Tensor | None,
        to_average: bool,
    ) -> None:
        # What is kept for a base must not keep the base.
        self._memory, self._base, self._text_input = memory, weakref.ref(base), text_input
        self._concepts, self._begin, self._to_average = concepts, begin, to_average

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        base = self._base()
        assert base is not None, "a universe is asked while its base is open"
        return _pair(self._memory, base, self._text_input, self._concepts[name], self._to_average)

    def _without_begin(self, factor: Tensor, keys: Tensor) -> Tensor:
        """A factor, float64, without what the keys have of begin-of-text; it is written to."""
        return factor if self._begin is None else factor.addr_(self._begin, self._begin @ keys.double(), alpha=-1.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._concepts)

    def __len__(self) -> int:
        return len(self._concepts)


class _Keys(_ByConcept):
    def __getitem__(self, name: str) -> Tensor:
        keys, _ = self._pair(name)
        return self._without_begin(keys.double(), keys)


class _Values(_ByConcept):
    def __getitem__(self, name: str) -> Tensor:
        keys, values = self._pair(name)
        return self._without_begin(values.double(), keys)


class _Ways(_ByConcept):
    """The ways at a matrix inside of a text encoder, where begin-of-text is in the keys alone."""

    def __getitem__(self, name: str) -> Tensor:
        return self._pair(name)[1].double()


class _Differences(Mapping[str, Tensor]):
    """The way from keys to values of every concept."""

    def __init__(self, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        self._keys, self._values = keys, values

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name] - self._keys[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True)
class EncodedVocabulary:
    """A vocabulary for each text input, of `words` words of `of`; `error` is how far words move that are not among them."""

    by_text_input: Mapping[str, Vocabulary]
    words: int
    of: int
    error: float

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest says of a vocabulary that is not whole."""
        if self.words == self.of:
            return {}
        return {"vocabulary": {"words": self.words, "of": self.of, "error": float(f"{self.error:.2g}")}}


def vocabulary_record(base: Base, device: torch.device, words: int = 0, *, is_inside: bool = False) -> dict[str, Any]:
    """What the manifest of a patch says of the vocabulary that was encoded for it, at text inputs or inside of text encoders;
    nothing where it was whole."""
    encoded = _memory(base, device).vocabularies.get((is_inside, words))
    return {} if encoded is None else encoded.record


def _vocabulary(
    memory: _UniverseCache,
    base: Base,
    sources: Mapping[str, AnyTextEncoder],
    preserved: PreservedPrompts,
    report: Progress,
    *,
    is_inside: bool = False,
    whole: bool = False,
    workers: Workers | None = None,
) -> EncodedVocabulary:
    """The vocabulary for each of `sources`, text inputs or (`is_inside`) matrices of text encoders.

    So many words as asked for, or a sample that is large enough, or the `whole`. `workers` encode it unless it is such a sample.
    """
    memory.folder, key = preserved.cache, (is_inside, preserved.words)
    encoded = memory.vocabularies.get(key)
    if encoded is not None and (not whole or preserved.words or encoded.words == encoded.of):
        return encoded
    by_model: dict[str, dict[str, AnyTextEncoder]] = {}
    for text_input, encoder in sources.items():
        by_model.setdefault(encoder.group, {})[text_input] = encoder
    parts = []
    for number, text_inputs in enumerate(by_model.values()):
        step = partial(_report_part, report, number, len(by_model))
        task = EncodingTask.of(base, text_inputs, preserved.words)
        if whole or preserved.words or len(task.order) <= LARGE:
            encoded_part = vocabularies(task, text_inputs, preserved.cache, step, workers)
            parts.append(EncodedVocabulary(encoded_part, task.count, len(task.order), 0.0))
        else:
            parts.append(_sample(memory, task, text_inputs, preserved.cache, step))
    memory.vocabularies[key] = EncodedVocabulary(
        {text_input: each for part in parts for text_input, each in part.by_text_input.items()},
        min(part.words for part in parts),
        max(part.of for part in parts),
        max(part.error for part in parts),
    )
    return memory.vocabularies[key]


def _report_part(report: Progress, number: int, parts: int, step: int, of: int, text: str) -> None:
    """Progress of one text encoder as progress of all, in parts of a thousand."""
    report(*((step, of) if parts == 1 else (1000 * number + 1000 * step // of, 1000 * parts)), text)


def _sample(
    memory: _UniverseCache,
    task: EncodingTask,
    encoders: Mapping[str, AnyTextEncoder],
    folder: Path | None,
    report: Progress,
) -> EncodedVocabulary:
    """The largest sample of a vocabulary that is stored; grown until words that are not in it hardly move."""
    stored = [size for size in task.samples if folder and vocabulary_file(task.first(size).identity, folder).is_file()]
    for size in task.samples:
        if stored and size < stored[-1]:
            continue
        sample = task.first(size)
        encoded = vocabularies(sample, encoders, folder, report)
        error = 0.0 if sample.is_whole else _error(memory, sample, encoders, encoded, folder)
        if error < TOLERANCE:
            break
    return EncodedVocabulary(encoded, size, len(task.order), error)


def _error(
    memory: _UniverseCache,
    sample: EncodingTask,
    encoders: Mapping[str, AnyTextEncoder],
    encoded: Mapping[str, Vocabulary],
    folder: Path | None,
) -> float:
    """The largest of what `_held_out` finds at the text inputs of one encoder; measured once, like the sample itself."""
    device = next(iter(encoders.values())).device.type
    identity = {"held out": HELD_OUT, "weights": [VOCABULARY, RIDGE], "of": sample.identity, "device": device}
    if stored := recalled(identity, folder):
        return float(stored["error"])
    error = max(_held_out(memory, sample, name, encoded[name]) for name in encoders)
    remember(identity, {"error": torch.tensor([[error]], dtype=torch.float64)}, folder)
    return error


def _held_out(memory: _UniverseCache, sample: EncodingTask, text_input: str, vocabulary: Vocabulary) -> float:
    """How much farther erasing a word moves words outside of a sample than words in it, over the length of their embeddings.

    One word is erased after the other, and it is measured how far the others move. The last words of the order stand for all
    that are not in the sample.
    """
    encoder, count = memory.source(text_input), len(sample.order)
    begin = _begin(encoder)
    moment = symmetric(sum((each.triangle for each in vocabulary), torch.zeros_like(vocabulary[0].triangle)))
    moment, mean = _without_begin(VOCABULARY / sample.count * moment.to(encoder.device), begin)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment + RIDGE * mean * torch.eye(len(moment)).to(moment)))

    def keys(start: int, stop: int) -> list[Tensor]:
        pairs = zip(sample.templates, sample.words(start, stop), strict=True)
        return [_orthogonal(keys_of(encoder, [word], [template]), begin) for template, words in pairs for word in words]

    held_out, sampled = keys(count - HELD_OUT, count), keys(0, min(HELD_OUT, sample.count))
    moved = {True: 0.0, False: 0.0}
    for i, erased in enumerate(held_out):
        solved = inverse @ erased
        # The inverse of the moment with the erased word in it, by Woodbury's identity.
        edit = erased @ torch.linalg.solve(torch.eye(erased.shape[1]).to(erased) + solved.T @ erased, solved.T)
        for is_sampled, others in ((True, sampled), (False, held_out[:i] + held_out[i + 1 :])):
            moved[is_sampled] += sum(float((edit @ other).norm() / other.norm()) for other in others) / len(others)
    return max(0.0, moved[False] - moved[True]) / len(held_out)


def _vocabulary_moment(memory: _UniverseCache, text_input: str, vocabulary: Vocabulary, known: set[str]) -> Tensor:
    """The vocabulary's second moment without the known concepts, which have keys of their own; a word in a sentence weighs
    as much as any other, all together 1.

    Left out are their words in every sentence, and whole sentences that name one of them: to preserve "a dog in ink style"
    for every dog would be to preserve the style.
    """
    known = {word.casefold() for word in known}
    total, count = torch.zeros_like(vocabulary[0].triangle), 0
    for sentence in vocabulary:
        if known & set(re.findall(r"\w+", sentence.template.casefold())):
            continue
        total += sentence.triangle
        count += len(sentence.words)
        for word in sorted(known & sentence.words):
            key = (text_input, word, sentence.template)
            if key not in memory.words:
                memory.words[key] = keys_of(memory.source(text_input), [word], [sentence.template]).cpu()
            total -= triangle(memory.words[key] @ memory.words[key].T)
            count -= 1
    return symmetric(total.div_(max(1, count)))
