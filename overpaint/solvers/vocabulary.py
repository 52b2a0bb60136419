"""What is preserved when nobody listed it: every word that a tokenizer knows, as one second moment per neutral sentence.

A word is asked about in `SENTENCES_PER_WORD` of the neutral sentences, which take turns. On a large text encoder that is
tens of thousands of prompts, so the moments are computed piece by piece and kept in a folder: what was interrupted goes
on where it stopped, and ends in the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.safetensors_file import BrokenFile, SafetensorsFile, tensor_digest
from overpaint.bases.text_encoder import AnyTextEncoder
from overpaint.core.digests import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.core.progress import Progress
from overpaint.solvers.sentences import PADDING, keys_of, neutral_sentences

# The file in which a vocabulary's moments are kept: believed only when its name and every digest in it are true.
#
# A safetensors file with one array per door, float64 [sentences, d (d + 1) / 2]: the upper triangles of the symmetric
# moments. Its metadata says what decided them, how far the computation is, and each array's digest.


FORMAT, KEY = 1, "overpaint-vocabulary"


class BadVocabulary(OverpaintError):
    """A kept vocabulary that is damaged, or is not what its name says."""


@dataclass(frozen=True, eq=False)
class Heard:
    """The moments by door, float64 [sentences, d, d], after `done` pieces; `identity` is all that decides them."""

    identity: Mapping[str, Any]
    done: int
    moments: Mapping[str, Tensor]

    def fits(self, identity: Mapping[str, Any], widths: Mapping[str, int], count: int) -> bool:
        """Whether this is of that task, with so wide doors and so many sentences."""
        shapes = {text_input: (count, width, width) for text_input, width in widths.items()}
        same = canonical_json(self.identity) == canonical_json(identity)
        return same and shapes == {text_input: tuple(moments.shape) for text_input, moments in self.moments.items()}


def name_of(identity: Mapping[str, Any]) -> str:
    """What a vocabulary is called: the digest of everything that decides it."""
    return hashlib.sha256(canonical_json({"format": FORMAT, **identity})).hexdigest()


def place(identity: Mapping[str, Any], folder: Path, *, complete: bool = True) -> Path:
    """Where a vocabulary lies in a folder, whole or as far as it is."""
    return folder / f"{name_of(identity)}.{'safetensors' if complete else 'partial'}"


def keep(heard: Heard, folder: Path, *, complete: bool) -> None:
    """Write a vocabulary. A folder that cannot be written to costs time, and nothing else."""
    arrays = {text_input: _packed(moments) for text_input, moments in heard.moments.items()}
    about = {
        "format": FORMAT,
        "identity": heard.identity,
        "done": heard.done,
        "digests": {text_input: tensor_digest(text_input, array) for text_input, array in arrays.items()},
    }
    target = place(heard.identity, folder, complete=complete)
    scratch = target.with_suffix(f".{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(arrays, scratch, metadata={KEY: canonical_json(about).decode()})
        scratch.replace(target)
        if complete:
            place(heard.identity, folder, complete=False).unlink(missing_ok=True)
    except OSError:
        with suppress(OSError):
            scratch.unlink()


def read(file: Path) -> Heard:
    """A vocabulary that `keep` wrote, under the name that it has to have. Raises BadVocabulary."""
    try:
        container = SafetensorsFile.open(file)
        about = json.loads(container.metadata[KEY])
        heard = Heard(about["identity"], about["done"], {})
        digests, text_inputs = dict(about["digests"]), set(about["identity"]["doors"])
        sound = about["format"] == FORMAT and type(heard.done) is int and heard.done >= 0
        sound = sound and name_of(heard.identity) == file.stem and text_inputs == set(digests) == set(container.entries)
        moments = {}
        for text_input, array in container.tensors(container.entries) if sound else ():
            sound = sound and array.dtype == torch.float64 and array.ndim == 2
            sound = (
                sound and tensor_digest(text_input, array) == digests[text_input] and bool(torch.isfinite(array).all())
            )
            moments[text_input] = _unpacked(array) if sound else array
    except (BrokenFile, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BadVocabulary(f"{file} cannot be read as a vocabulary ({error}); delete it") from error
    if not sound:
        raise BadVocabulary(f"{file} is not the vocabulary that its name says; delete it")
    return Heard(heard.identity, heard.done, moments)


def _packed(moments: Tensor) -> Tensor:
    """The upper triangles of symmetric matrices [s, d, d] as rows: [s, d (d + 1) / 2]."""
    rows, columns = torch.triu_indices(moments.shape[-1], moments.shape[-1])
    return moments[:, rows, columns].contiguous()


def _unpacked(packed: Tensor) -> Tensor:
    """What `_packed` packed. Raises ValueError for rows that are no triangles."""
    width = int(((8 * packed.shape[-1] + 1) ** 0.5 - 1) / 2)
    rows, columns = torch.triu_indices(width, width)
    if len(rows) != packed.shape[-1]:
        raise ValueError("its rows are no triangles")
    found = torch.zeros(len(packed), width, width, dtype=packed.dtype)
    found[:, rows, columns] = packed
    found[:, columns, rows] = packed
    return found


SENTENCES_PER_WORD = 3
CHUNK, CHUNK_BYTES = 256, 128 << 20
"""Words that are asked about at once, and what their keys may take: half of them, or less, on a wide text encoder."""
SAVE_EVERY = 20.0
"""Seconds of work that an interruption may cost."""


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
class EncodingTask:
    """Everything that decides the moments of one text encoder, and what is done in which order."""

    identity: Mapping[str, Any]
    widths: Mapping[str, int]
    words: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]
    at_once: int = CHUNK

    @classmethod
    def of(cls, base: Base, encoders: Mapping[str, AnyTextEncoder], limit: int) -> EncodingTask:
        """The task for the doors of one text encoder, with all whole words, or `limit` of them at equal distances."""
        first = next(iter(encoders.values()))
        known, templates = first.words(), neutral_sentences(base)
        count = min(limit, len(known)) if limit else len(known)
        chosen = [known[i * len(known) // count] for i in range(count)]
        turns = max(1, len(templates) // SENTENCES_PER_WORD)
        words = tuple(tuple(chosen[j % turns :: turns]) for j in range(len(templates)))
        at_once = _at_once(max(encoder.width for encoder in encoders.values()), first.length)
        identity = {
            "encoder": base.encoder_digest(next(iter(encoders))),
            "tokenizer": hashlib.sha256(canonical_json(first.tokenizer.get_vocab())).hexdigest(),
            "length": first.length,
            "doors": {text_input: encoder.output for text_input, encoder in encoders.items()},
            "padding": PADDING,
            "sentences": list(templates),
            "words": hashlib.sha256(canonical_json(words)).hexdigest(),
            "count": count,
            # Not named where it is what it always was: what was kept then is still true.
            **({} if at_once == CHUNK else {"at once": at_once}),
        }
        return cls(
            identity, {text_input: encoder.width for text_input, encoder in encoders.items()}, words, templates, at_once
        )

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
            text_input: tuple(
                Sentence(template, frozenset(words), moment)
                for template, words, moment in zip(self.templates, self.words, moments[text_input], strict=True)
            )
            for text_input in self.widths
        }


def _at_once(width: int, length: int) -> int:
    """How many words' keys, float64 [length, width] each, fit into what they may take."""
    found = CHUNK
    while found > 1 and found * length * width * 8 > CHUNK_BYTES:
        found //= 2
    return found


def vocabularies(
    task: EncodingTask, encoders: Mapping[str, AnyTextEncoder], folder: Path | None, report: Progress
) -> dict[str, Vocabulary]:
    """The vocabulary as the doors of one text encoder hear it: read from `folder`, or computed and kept there.

    `report(step, of, text)` is told how far it is, and when a kept file is damaged and therefore computed again.
    """
    pieces = list(task.pieces())
    heard = _recalled(task, folder, len(pieces), report)
    saved = time.monotonic()
    for number in range(heard.done, len(pieces)):
        j, words = pieces[number]
        for text_input, encoder in encoders.items():
            keys = keys_of(encoder, words, [task.templates[j]])
            upper = (keys @ keys.T).triu().cpu()
            # A product may differ from its transpose in the last bit, and only one triangle is kept.
            heard.moments[text_input][j] += upper + upper.triu(1).T
        heard = replace(heard, done=number + 1)
        report(heard.done, len(pieces), f"hearing the vocabulary: {words[-1]}")
        complete = heard.done == len(pieces)
        if folder and (complete or time.monotonic() - saved > SAVE_EVERY):
            keep(heard, folder, complete=complete)
            saved = time.monotonic()
    return task.as_vocabularies(heard.moments)


def _recalled(task: EncodingTask, folder: Path | None, pieces: int, report: Progress) -> Heard:
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
