"""What is preserved when nobody listed it: every word that a tokenizer knows, as one second moment per neutral sentence.

A word is asked about in `SENTENCES_PER_WORD` of the neutral sentences, which take turns. On a large text encoder that is
tens of thousands of prompts, so the moments are computed piece by piece and kept in a folder: what was interrupted goes
on where it stopped, and ends in the same bits.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.digests import canonical_json
from overpaint.bases.text import TextEncoder
from overpaint.solvers.keys import PADDING, keys_of, neutral_sentences
from overpaint.solvers.vocabulary_file import BadVocabulary, Heard, keep, place, read

SENTENCES_PER_WORD = 3
CHUNK, CHUNK_BYTES = 256, 128 << 20
"""Words that are asked about at once, and what their keys may take: half of them, or less, on a wide text encoder."""
SAVE_EVERY = 20.0
"""Seconds of work that an interruption may cost."""

Report = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Sentence:
    """A neutral sentence, the words it was asked with, and the second moment of their keys, float64 [d, d] on the CPU.

    A word in a sentence weighs 1.
    """

    template: str
    words: frozenset[str]
    moment: Tensor


Vocabulary = tuple[Sentence, ...]


@dataclass(frozen=True)
class Task:
    """Everything that decides the moments of one text encoder, and what is done in which order."""

    identity: Mapping[str, Any]
    widths: Mapping[str, int]
    words: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]
    at_once: int = CHUNK

    @classmethod
    def of(cls, base: Base, encoders: Mapping[str, TextEncoder], limit: int) -> Task:
        """The task for the doors of one text encoder, with all whole words, or `limit` of them at equal distances."""
        first = next(iter(encoders.values()))
        known, templates = first.words(), neutral_sentences(base)
        count = min(limit, len(known)) if limit else len(known)
        chosen = [known[i * len(known) // count] for i in range(count)]
        turns = max(1, len(templates) // SENTENCES_PER_WORD)
        words = tuple(tuple(chosen[j % turns :: turns]) for j in range(len(templates)))
        at_once = _at_once(max(encoder.width for encoder in encoders.values()), first.length)
        identity = {
            "encoder": base.component_digest(base.door(next(iter(encoders))).encoder),
            "tokenizer": hashlib.sha256(canonical_json(first.tokenizer.get_vocab())).hexdigest(),
            "length": first.length,
            "doors": {door: encoder.says for door, encoder in encoders.items()},
            "padding": PADDING,
            "sentences": list(templates),
            "words": hashlib.sha256(canonical_json(words)).hexdigest(),
            "count": count,
            # Not named where it is what it always was: what was kept then is still true.
            **({} if at_once == CHUNK else {"at once": at_once}),
        }
        return cls(identity, {door: encoder.width for door, encoder in encoders.items()}, words, templates, at_once)

    def pieces(self) -> Iterator[tuple[int, Sequence[str]]]:
        """The number of a sentence and some words to ask it with, in order."""
        for j, words in enumerate(self.words):
            for start in range(0, len(words), self.at_once):
                yield j, words[start : start + self.at_once]

    @property
    def size(self) -> int:
        """How many pieces there are."""
        return sum(1 for _ in self.pieces())

    def nothing(self) -> Heard:
        """What there is before the first piece."""
        count = len(self.templates)
        return Heard(
            self.identity, 0, {d: torch.zeros(count, w, w, dtype=torch.float64) for d, w in self.widths.items()}
        )

    def as_vocabularies(self, moments: Mapping[str, Tensor]) -> dict[str, Vocabulary]:
        """The results by door."""
        return {
            door: tuple(
                Sentence(template, frozenset(words), moment)
                for template, words, moment in zip(self.templates, self.words, moments[door], strict=True)
            )
            for door in self.widths
        }


def _at_once(width: int, length: int) -> int:
    """How many words' keys, float64 [length, width] each, fit into what they may take."""
    found = CHUNK
    while found > 1 and found * length * width * 8 > CHUNK_BYTES:
        found //= 2
    return found


def vocabularies(
    task: Task, encoders: Mapping[str, TextEncoder], folder: Path | None, report: Report
) -> dict[str, Vocabulary]:
    """The vocabulary as the doors of one text encoder hear it: read from `folder`, or computed and kept there.

    `report(step, of, text)` is told how far it is, and when a kept file is damaged and therefore computed again.
    """
    pieces = list(task.pieces())
    heard = _recalled(task, folder, len(pieces), report)
    saved = time.monotonic()
    for number in range(heard.done, len(pieces)):
        j, words = pieces[number]
        for door, encoder in encoders.items():
            keys = keys_of(encoder, words, [task.templates[j]])
            upper = (keys @ keys.T).triu().cpu()
            # A product may differ from its transpose in the last bit, and only one triangle is kept.
            heard.moments[door][j] += upper + upper.triu(1).T
        heard = replace(heard, done=number + 1)
        report(heard.done, len(pieces), f"hearing the vocabulary: {words[-1]}")
        complete = heard.done == len(pieces)
        if folder and (complete or time.monotonic() - saved > SAVE_EVERY):
            keep(heard, folder, complete=complete)
            saved = time.monotonic()
    return task.as_vocabularies(heard.moments)


def _recalled(task: Task, folder: Path | None, pieces: int, report: Report) -> Heard:
    """What an earlier computation kept."""
    for file in () if folder is None else (place(task.identity, folder, complete=whole) for whole in (True, False)):
        try:
            heard = read(file) if file.is_file() else None
        except BadVocabulary:
            report(0, pieces, f"{file} is damaged; the vocabulary is heard again")
            continue
        if heard and heard.done <= pieces and heard.fits(task.identity, task.widths, len(task.templates)):
            return heard
    return task.nothing()
