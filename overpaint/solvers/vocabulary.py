"""What is preserved when nobody listed it: the words that a tokenizer knows, as one second moment per neutral sentence.

Of a large vocabulary a sample is encoded first: the words in one fixed order (by digest, so without any pattern), from the first
on. A larger sample begins with the smaller one, so growing it costs only what is new, up to the whole vocabulary. Each word
stands in `SENTENCES_PER_WORD` of the neutral sentences, which take turns; of a large vocabulary, in one.

The work is done in pieces and stored in a folder: what was interrupted goes on where it stopped, and ends in the same bits.
A file is believed only when its name and every digest in it are true. It is a safetensors file with one array per text input,
float64 [sentences, d (d + 1) / 2], the upper triangles of the symmetric moments; its metadata says what decided them, how
many pieces are done, and each array's digest. The workers of an executor may encode the pieces; this process adds their moments
up in the order of the pieces, so that the bits are its own. Other arrays that every program would compute again (`remember`)
are kept beside them, in files that push and pull leave alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from overpaint.bases.base import Base, BaseReference
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import BrokenFile, SafetensorsFile, raw_bytes, tensor_digest
from overpaint.bases.text_encoder import AnyTextEncoder, feed_forwards, text_sources
from overpaint.core.atomic import make_folder, replacing, share
from overpaint.core.encoding import by_digest, canonical_json, combined_digest, evenly_spaced, header_bytes, json_digest
from overpaint.core.errors import OverpaintError
from overpaint.core.executors import Executor, InProcess, Piece, Resources, Result, machine_name
from overpaint.core.reporting import Progress
from overpaint.solvers.sentences import KEPT_PADDING, PADDING, keys_of, neutral_sentences

FORMAT, KEY = 1, "overpaint-vocabulary"
SENTENCES_PER_WORD = 3
SMALLEST_SAMPLE = 2048
"""Words of the smallest sample; each larger one has twice as many."""
LARGE = 4096
"""Words of the largest vocabulary that is always encoded whole."""
CHUNK, CHUNK_BYTES = 256, 128 << 20
"""Words that are encoded at once, and what their keys may take: half of them, or less, on a wide text encoder."""
INSIDE_BYTES = 512 << 20
"""What the moments of all sentences may take for a matrix inside of a text encoder; some sentences are left out for it."""
SAVE_EVERY = 20.0
"""Seconds of work that an interruption may cost."""
AHEAD_BYTES = 1 << 30
"""Bytes of moments that may wait for those of an earlier piece, where several pieces are encoded at once."""


class BadVocabulary(OverpaintError):
    """A stored vocabulary that is damaged, or is not what its name says."""


@dataclass(frozen=True, eq=False)
class Sentence:
    """A neutral sentence, the words that stood in it, and the second moment of their keys, float64 on the CPU: its upper triangle
    [d (d + 1) / 2], since text that is 4,096 wide has 134 MB in a whole one.

    A word in a sentence weighs 1.
    """

    template: str
    words: frozenset[str]
    triangle: Tensor


Vocabulary = tuple[Sentence, ...]


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments by text input after `done` pieces, as they are stored: the upper triangles, float64 [sentences,
    d (d + 1) / 2]. `identity` is all that decides them."""

    identity: Mapping[str, Any]
    done: int
    moments: Mapping[str, Tensor]


@dataclass(frozen=True)
class EncodingTask:
    """Everything that decides the moments of one text encoder, and what is encoded in which order.

    `order` has all words of the tokenizer; the first `count` of them are encoded.
    """

    encoder: Mapping[str, Any]
    widths: Mapping[str, int]
    templates: tuple[str, ...]
    order: tuple[str, ...]
    count: int
    at_once: int = CHUNK

    @classmethod
    def of(cls, base: Base, encoders: Mapping[str, AnyTextEncoder], limit: int = 0) -> EncodingTask:
        """The task for the text inputs of one text encoder, with `limit` words (0: all)."""
        first = next(iter(encoders.values()))
        order = tuple(by_digest(first.words()))
        widths = {text_input: encoder.width for text_input, encoder in encoders.items()}
        count = min(limit, len(order)) if limit else len(order)
        at_once = _at_once(max(widths.values()), first.length)
        return cls(encoding_identity(base, encoders), widths, _sentences(base, widths), order, count, at_once)

    def first(self, count: int) -> EncodingTask:
        """The same with only so many words."""
        return replace(self, count=count)

    @property
    def is_whole(self) -> bool:
        """Whether all words are encoded."""
        return self.count == len(self.order)

    @property
    def samples(self) -> list[int]:
        """Sizes of the samples that this task begins with, and its own."""
        sizes, size = list[int](), SMALLEST_SAMPLE
        while size <= 0.75 * self.count:  # what is left out has to be worth a step, and words to measure the error with
            sizes.append(size)
            size *= 2
        return [*sizes, self.count]

    def words(self, start: int = 0, stop: int | None = None) -> list[tuple[str, ...]]:
        """For each sentence, those of the words `start` to `stop` (of the order) that stand in it."""
        turns = max(1, len(self.templates) // (1 if len(self.order) > LARGE else SENTENCES_PER_WORD))
        stop = self.count if stop is None else stop
        return [self.order[start + (j - start) % turns : stop : turns] for j in range(len(self.templates))]

    def pieces(self) -> Iterator[tuple[int, Sequence[str]]]:
        """The number of a sentence and some words to put into it; the pieces of each sample come before those of the next."""
        for start, stop in pairwise((0, *self.samples)):
            for j, words in enumerate(self.words(start, stop)):
                for i in range(0, len(words), self.at_once):
                    yield j, words[i : i + self.at_once]

    @cached_property
    def size(self) -> int:
        """How many pieces there are."""
        return sum(1 for _ in self.pieces())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the moments, as JSON."""
        words = json_digest(self.words())
        sentences = {"sentences": list(self.templates), "words": words, "count": self.count}
        return {**self.encoder, **sentences, "at once": self.at_once}

    def fits(self, stored: Moments) -> bool:
        """Whether moments are of this task, whole or in part."""
        shapes = {name: (len(self.templates), _numbers(width)) for name, width in self.widths.items()}
        is_same = canonical_json(stored.identity) == canonical_json(self.identity) and stored.done <= self.size
        return is_same and shapes == {name: tuple(moments.shape) for name, moments in stored.moments.items()}

    def as_vocabularies(self, moments: Mapping[str, Tensor]) -> dict[str, Vocabulary]:
        """The results by text input, of the moments' upper triangles."""
        words = [frozenset(each) for each in self.words()]
        return {
            text_input: tuple(map(Sentence, self.templates, words, moments[text_input])) for text_input in self.widths
        }


def _sentences(base: Base, widths: Mapping[str, int]) -> tuple[str, ...]:
    """The neutral sentences; of a matrix inside of a text encoder as many, at equal distances, as there is room for."""
    every, each = neutral_sentences(base), sum(8 * _numbers(width) for width in widths.values())
    if widths.keys() <= set(base.text_inputs):
        return every
    return tuple(evenly_spaced(every, max(1, min(len(every), INSIDE_BYTES // each))))


def encoding_identity(base: Base, encoders: Mapping[str, AnyTextEncoder]) -> dict[str, Any]:
    """Everything that decides what the text inputs of one text encoder give for a prompt, as JSON."""
    first = next(iter(encoders.values()))
    return {
        "encoder": _weights_digest(base, list(encoders)),
        "reading": json_digest(first.reading),
        "length": first.length,
        "doors": {text_input: encoder.output for text_input, encoder in encoders.items()},
        "padding": PADDING,
        "padding positions": KEPT_PADDING,
    }


def _weights_digest(base: Base, sources: Sequence[str]) -> str:
    """The digest of all that decides text inputs of one text encoder, or what matrices of one pipeline's text encoders read."""
    if sources[0] in base.text_inputs:
        return base.encoder_digest(sources[0])
    digests = {name: base.component_digest(name) for name in {source.partition("/")[0] for source in sources}}
    return combined_digest(digests) if len(digests) > 1 else next(iter(digests.values()))


def _at_once(width: int, length: int) -> int:
    """How many words' keys, float64 [length, width] each, fit into what they may take."""
    count = CHUNK
    while count > 1 and count * length * width * 8 > CHUNK_BYTES:
        count //= 2
    return count


@dataclass(frozen=True, eq=False)
class Workers:
    """Where pieces are encoded instead of in this process: an executor, and the base whose text encoder its workers load."""

    executor: Executor
    base: Base


class EncodingInputs:
    """What all pieces of a task read: the loaded text inputs of one text encoder. Another process loads them from the base.

    `base` is asked for its fingerprint only where the inputs travel.
    """

    def __init__(self, task: EncodingTask, encoders: Mapping[str, AnyTextEncoder], base: Base | None) -> None:
        self.device = next(iter(encoders.values())).device.type
        self._identity, self._text_inputs = canonical_json(task.encoder), tuple(encoders)
        self._encoders: Mapping[str, AnyTextEncoder] | None = encoders
        self._base: Base | BaseReference | None = base

    def __getstate__(self) -> dict[str, Any]:
        assert isinstance(self._base, Base)
        return {**self.__dict__, "_encoders": None, "_base": BaseReference(self._base)}

    def open(self) -> Mapping[str, AnyTextEncoder]:
        """The text inputs. Raises OverpaintError where this machine has not the base, or reads prompts otherwise."""
        if self._encoders is None:
            assert isinstance(self._base, BaseReference)
            self._encoders = _encoders_here(self._base.open(), self._text_inputs, self.device, self._identity)
        return self._encoders


@lru_cache(maxsize=1)
def _encoders_here(
    base: Base, text_inputs: tuple[str, ...], device: str, identity: bytes
) -> Mapping[str, AnyTextEncoder]:
    """Those of a worker, which stay loaded between its pieces."""
    every = text_sources(base, torch.device(device))
    if text_inputs[0] not in every:
        every = {matrix.name: matrix.reads for matrix in feed_forwards(base, every)}
    found = {name: every[name] for name in text_inputs}
    if canonical_json(encoding_identity(base, found)) != identity:
        raise OverpaintError(
            f"the worker on {machine_name()} reads prompts otherwise than this program: its tokenizer or its text encoder's "
            f"configuration is another; copy {base.config_folder} there"
        )
    return found


@own_torch_settings()
def encode_piece(
    inputs: EncodingInputs, template: str, words: Sequence[str], progress: Progress
) -> dict[str, NDArray[np.float64]]:
    """The second moment of some words in a sentence by text input, in whichever process: its upper triangle [d (d + 1) / 2]."""
    moments = {}
    for text_input, encoder in inputs.open().items():
        keys = keys_of(encoder, words, [template])
        # A product may differ from its transpose in the last bit, and only one triangle is stored.
        moments[text_input] = triangle(keys @ keys.T).numpy()
    return moments


def vocabularies(
    task: EncodingTask,
    encoders: Mapping[str, AnyTextEncoder],
    folder: Path | None,
    report: Progress,
    workers: Workers | None = None,
) -> dict[str, Vocabulary]:
    """A task's vocabulary for each text input of one text encoder: read from `folder`, or computed and stored there.

    Reports each piece, and when a stored file is damaged and therefore computed again. Raises OverpaintError where a piece
    cannot be encoded; what comes before it is stored.
    """
    stored = _recalled(task, folder, report)
    begun, held = stored.done, dict[int, dict[str, NDArray[np.float64]]]()
    pieces = list(islice(task.pieces(), begun, None))
    saved = started = time.monotonic()
    with closing(_encoded(task, pieces, encoders, workers)) as results:
        for result, under_way in results:
            if result.error:
                if folder and stored.done > begun:
                    write_vocabulary(stored, folder, complete=False)
                raise OverpaintError(f"the vocabulary could not be encoded: {result.error}")
            held[begun + result.index] = result.value
            while stored.done in held:  # sums in another order would have other bits
                sentence, _ = pieces[stored.done - begun]
                for text_input, upper in held.pop(stored.done).items():
                    stored.moments[text_input][sentence].numpy()[:] += upper
                stored = replace(stored, done=stored.done + 1)
            done = stored.done + len(held)
            left = (time.monotonic() - started) / (done - begun) * (task.size - done)
            report(done, task.size, f"encoding the vocabulary, about {left:.0f} s left{under_way}")
            if folder and stored.done < task.size and time.monotonic() - saved > SAVE_EVERY:
                write_vocabulary(stored, folder, complete=False)
                saved = time.monotonic()
    if folder and stored.done > begun:
        write_vocabulary(stored, folder, complete=True)
        for count in task.samples[:-1]:
            vocabulary_file(task.first(count).identity, folder).unlink(missing_ok=True)
    return task.as_vocabularies(stored.moments)


def _encoded(
    task: EncodingTask,
    pieces: Sequence[tuple[int, Sequence[str]]],
    encoders: Mapping[str, AnyTextEncoder],
    workers: Workers | None,
) -> Generator[tuple[Result, str], None, None]:
    """What becomes of each piece, as it comes, and how many workers are at work then."""
    if not pieces:  # for nothing, no worker is started and no fingerprint computed
        return
    inputs = EncodingInputs(task, encoders, workers.base if workers else None)
    work = [
        Piece(f"encoding {len(words)} words in {template!r}", encode_piece, (template, words))
        for template, words in ((task.templates[sentence], words) for sentence, words in pieces)
    ]
    under_way = ""

    def note(step: int, of: int, text: str) -> None:
        nonlocal under_way
        under_way = f"; {text}" if workers else ""

    executor = workers.executor if workers else InProcess()
    needs = Resources(gpus=float(inputs.device == "cuda"))
    ahead = max(2, AHEAD_BYTES // sum(8 * _numbers(width) for width in task.widths.values()))
    with closing(executor.results(work, inputs, needs, note, ahead=ahead)) as results:
        for result in results:
            yield result, under_way


def _recalled(task: EncodingTask, folder: Path | None, report: Progress) -> Moments:
    """What an earlier computation stored of a task, or of the largest sample that it begins with."""
    tasks = [task.first(count) for count in reversed(task.samples)] if folder else []
    for smaller in tasks:
        for complete in (True, False):
            file = vocabulary_file(smaller.identity, folder or Path(), complete=complete)
            try:
                stored = read_vocabulary(file) if file.is_file() else None
            except BadVocabulary:
                report(0, task.size, f"{file} is damaged; the vocabulary is encoded again")
                continue
            if stored and smaller.fits(stored):
                return replace(stored, identity=task.identity)
    count = len(task.templates)
    zeros = {name: torch.zeros(count, _numbers(width), dtype=torch.float64) for name, width in task.widths.items()}
    return Moments(task.identity, 0, zeros)


def vocabulary_name(identity: Mapping[str, Any]) -> str:
    """What a vocabulary is called: the digest of everything that decides it."""
    return json_digest({"format": FORMAT, **identity})


def vocabulary_file(identity: Mapping[str, Any], folder: Path, *, complete: bool = True) -> Path:
    """The file of a vocabulary in a folder, complete or in part."""
    return folder / f"{vocabulary_name(identity)}.{'safetensors' if complete else 'partial'}"


def write_vocabulary(stored: Moments, folder: Path, *, complete: bool) -> None:
    """Write a vocabulary. A folder that cannot be written to costs time, and nothing else."""
    about = {"identity": stored.identity, "done": stored.done}
    with suppress(OSError):
        _write(vocabulary_file(stored.identity, folder, complete=complete), stored.moments, about)
        if complete:
            vocabulary_file(stored.identity, folder, complete=False).unlink(missing_ok=True)


def read_vocabulary(file: Path) -> Moments:
    """A stored vocabulary, under the name that it has to have. Raises BadVocabulary."""
    arrays, about = _read(file)
    try:
        identity, done = about["identity"], about["done"]
        sound = type(done) is int and done >= 0 and set(identity["doors"]) == set(arrays)
        for array in arrays.values():
            _width(array)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(file, error) from error
    if not sound:
        raise _misnamed(file)
    return Moments(identity, done, arrays)


def recalled(identity: Mapping[str, Any], folder: Path | None) -> dict[str, Tensor]:
    """The arrays that `remember` stored under an identity; none where there are none, or where they are damaged."""
    file = folder and _memory_file(identity, folder)
    if not file or not file.is_file():
        return {}
    with suppress(BadVocabulary):
        return _read(file)[0]
    return {}


def remember(identity: Mapping[str, Any], arrays: Mapping[str, Tensor], folder: Path | None) -> None:
    """Store small float64 matrices that every program would compute again; `identity` is all that decides them, as JSON.

    They are for all programs that use the folder. One that cannot be written to costs time, and nothing else.
    """
    if folder:
        with suppress(OSError):
            _write(_memory_file(identity, folder), arrays, {"identity": identity})


def _memory_file(identity: Mapping[str, Any], folder: Path) -> Path:
    return folder / f"{vocabulary_name(identity)}.memory"


def _write(file: Path, arrays: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a file that a group may read where its folder is a group's. Raises OSError."""
    arrays = {name: array.cpu() for name, array in arrays.items()}
    digests = {name: tensor_digest(name, array) for name, array in arrays.items()}
    text = canonical_json({"format": FORMAT, **about, "digests": digests}).decode()
    make_folder(file.parent)
    # Not safetensors' own `save_file`: what it raises where nothing can be written is no OSError.
    with replacing(file) as scratch:
        with scratch.open("wb") as opened:
            opened.write(header_bytes({KEY: text}, [(name, "F64", array.shape) for name, array in arrays.items()]))
            opened.writelines(map(raw_bytes, arrays.values()))
        share(scratch)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of a file, float64 and finite, and what it says of itself. Raises BadVocabulary."""
    try:
        container = SafetensorsFile.open(file)
        about = json.loads(container.metadata[KEY])
        digests = dict(about["digests"])
        sound = about["format"] == FORMAT and vocabulary_name(about["identity"]) == file.stem
        sound = sound and set(digests) == set(container.entries)
        arrays = {}
        for name, array in container.tensors(container.entries) if sound else ():
            sound = sound and array.dtype == torch.float64 and array.ndim == 2
            sound = sound and tensor_digest(name, array) == digests[name] and bool(torch.isfinite(array).all())
            arrays[name] = array
    except (BrokenFile, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _unreadable(file, error) from error
    if not sound:
        raise _misnamed(file)
    return arrays, about


def _unreadable(file: Path, error: Exception) -> BadVocabulary:
    return BadVocabulary(f"{file} cannot be read as a vocabulary ({error}); delete it")


def _misnamed(file: Path) -> BadVocabulary:
    return BadVocabulary(f"{file} is not the vocabulary that its name says; delete it")


def _numbers(width: int) -> int:
    """How many numbers the upper triangle of a square matrix has."""
    return width * (width + 1) // 2


def _width(packed: Tensor) -> int:
    """d of upper triangles [s, d (d + 1) / 2]. Raises ValueError for rows that are no triangles."""
    width = int(((8 * packed.shape[-1] + 1) ** 0.5 - 1) / 2)
    if _numbers(width) != packed.shape[-1]:
        raise ValueError("its rows are no triangles")
    return width


def triangle(moment: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix [d, d], row by row, on the CPU: [d (d + 1) / 2]."""
    array: NDArray[np.float64] = moment.cpu().numpy()
    return torch.from_numpy(array[_upper(len(array))])


def symmetric(packed: Tensor) -> Tensor:
    """The symmetric matrix [d, d] of an upper triangle [d (d + 1) / 2]."""
    width = _width(packed)
    moment, upper = np.empty((width, width)), _upper(width)
    moment[upper] = moment.T[upper] = packed.numpy()
    return torch.from_numpy(moment)


def _upper(width: int) -> NDArray[np.bool_]:
    """Where the upper triangle is. Not as indices: these would take twice what the matrix does."""
    return np.triu(np.ones((width, width), dtype=np.bool_))
