"""The vocabulary is encoded once, goes on where it stopped, and is believed only when its digests are true."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder, encoders, text_sources
from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import silent
from overpaint.patches.patch import make_patch
from overpaint.solvers import universe, vocabulary
from overpaint.solvers.closed_form.separable import Separable
from overpaint.solvers.problem import EditProblem, Solution
from overpaint.solvers.sentences import keys_of, neutral_sentences
from overpaint.solvers.universe import PreservedPrompts, prepare
from overpaint.solvers.vocabulary import (
    SENTENCES_PER_WORD,
    BadVocabulary,
    EncodingInputs,
    EncodingTask,
    Workers,
    read_vocabulary,
    symmetric,
    triangle,
    vocabularies,
    vocabulary_file,
)
from overpaint.testing.contract import THINGS
from tests.bases.tiny_transformers import tiny_transformer
from tests.bases.tiny_xl import WIDTHS, tiny_xl_base
from tests.core.executor_pieces import Travelling

CPU = torch.device("cpu")
Reports = list[tuple[int, int, str]]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", 4)
    monkeypatch.setattr(vocabulary, "SAVE_EVERY", 0.0)


def encoded(
    base: Base, folder: Path | None, limit: int = 0, report: Callable[..., None] = lambda *reports: None
) -> object:
    task = EncodingTask.of(base, encoders(base), limit)
    return vocabularies(task, encoders(base), folder, report)["text_encoder"]


def only_file(folder: Path) -> Path:
    """The vocabulary of a folder in which there is one."""
    (file,) = (file for file in folder.iterdir() if file.suffix != ".memory")
    return file


def same(first: object, second: object) -> bool:
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    return [(s.template, s.words) for s in first] == [(s.template, s.words) for s in second] and all(
        torch.equal(a.triangle, b.triangle) for a, b in zip(first, second, strict=True)
    )


def test_every_word_is_encoded_in_the_asked_number_of_sentences(base: Base) -> None:
    found = encoded(base, None)
    assert isinstance(found, tuple)
    assert [sentence.template for sentence in found] == list(neutral_sentences(base))
    for word in THINGS:
        assert sum(word in sentence.words for sentence in found) == SENTENCES_PER_WORD
    encoder = encoders(base)["text_encoder"]
    for sentence in found:
        keys = keys_of(encoder, sorted(sentence.words), [sentence.template])
        # Summed in another order, of prompts that were encoded in other batches.
        torch.testing.assert_close(sentence.triangle, triangle(keys @ keys.T), rtol=1e-5, atol=1e-5)


def test_a_stored_vocabulary_is_read_and_gives_the_same_bits(base: Base, tmp_path: Path) -> None:
    reports: Reports = []
    first = encoded(base, tmp_path, report=lambda *what: reports.append(what))
    assert [step for step, _, _ in reports] == list(range(1, reports[-1][1] + 1))
    reports.clear()
    assert same(first, encoded(base, tmp_path, report=lambda *what: reports.append(what)))
    assert not reports, "nothing was computed again"
    assert same(first, encoded(base, None))


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_an_interrupted_computation_goes_on_and_ends_in_the_same_bits(base: Base, tmp_path: Path, stop: int) -> None:
    def give_up(step: int, of: int, text: str) -> None:
        if step == stop + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoded(base, tmp_path, report=give_up)
    assert only_file(tmp_path).suffix == ".partial"
    steps: list[int] = []
    found = encoded(base, tmp_path, report=lambda step, of, text: steps.append(step))
    assert steps[0] == stop + 1
    assert only_file(tmp_path).suffix == ".safetensors", "what was partial is gone"
    assert same(found, encoded(base, None))


def on_workers(base: Base, folder: Path | None, executor: Travelling, report: Callable[..., None] = silent) -> object:
    task = EncodingTask.of(base, encoders(base))
    return vocabularies(task, encoders(base), folder, report, Workers(executor, base))["text_encoder"]


def test_workers_whose_pieces_come_in_any_order_give_the_bits_of_one_process(base: Base, tmp_path: Path) -> None:
    executor, reports = Travelling(), Reports()
    found = on_workers(base, tmp_path / "there", executor, lambda *what: reports.append(what))
    assert same(found, encoded(base, tmp_path / "here"))
    files = [only_file(tmp_path / place) for place in ("here", "there")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert executor.ahead >= 2
    assert executor.names[0].startswith("encoding 4 words in '")
    assert [step for step, _, _ in reports] == list(range(1, reports[-1][1] + 1))
    assert all(text.endswith(" s left; 1 under way on 1 workers") for _, _, text in reports)


def test_no_worker_is_asked_for_what_is_stored(base: Base, tmp_path: Path) -> None:
    encoded(base, tmp_path)
    on_workers(base, tmp_path, executor := Travelling())
    assert not executor.names


def test_a_driver_that_is_stopped_goes_on_with_the_pieces_that_are_missing(base: Base, tmp_path: Path) -> None:
    def give_up(step: int, of: int, text: str) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_workers(base, tmp_path, Travelling(), give_up)
    done = read_vocabulary(only_file(tmp_path)).done
    assert done == 3, "the fourth piece has not come, so what follows it cannot be added"
    found = on_workers(base, tmp_path, again := Travelling())
    assert len(again.names) == EncodingTask.of(base, encoders(base)).size - done
    assert same(found, encoded(base, None))


def test_a_piece_that_fails_is_one_sentence_and_what_is_before_it_is_kept(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fails_once(*asked: Any) -> torch.Tensor:
        calls.append("asked")
        if len(calls) == 5:
            raise OverpaintError("there is no room")
        return keys_of(*asked)

    monkeypatch.setattr(vocabulary, "keys_of", fails_once)
    monkeypatch.setattr(vocabulary, "SAVE_EVERY", 1e9)
    with pytest.raises(OverpaintError, match="the vocabulary could not be encoded: there is no room"):
        on_workers(base, tmp_path, Travelling())
    assert read_vocabulary(only_file(tmp_path)).done == 3
    assert same(on_workers(base, tmp_path, Travelling()), encoded(base, None))


def test_a_worker_that_reads_prompts_otherwise_is_refused(tmp_path: Path) -> None:
    base = Base.open(tiny_xl_base(tmp_path / "xl").path)
    held = {"text_encoder": encoders(base)["text_encoder"]}
    sent = pickle.dumps(EncodingInputs(EncodingTask.of(base, held), held, base))
    assert [*pickle.loads(sent).open()] == ["text_encoder"]
    vocabulary._encoders_here.cache_clear()
    rules = base.path / "tokenizer" / "tokenizer_config.json"
    rules.write_text(json.dumps({**json.loads(rules.read_text()), "model_max_length": 12}))
    with pytest.raises(
        OverpaintError, match=r"the worker on .+ reads prompts otherwise than this program: .+ copy .+ there"
    ):
        pickle.loads(sent).open()


def flip(file: Path) -> None:
    blob = bytearray(file.read_bytes())
    blob[-3] ^= 1
    file.write_bytes(blob)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-8]),
    "emptied": lambda file: file.write_bytes(b""),
    "another's": lambda file: file.write_bytes(file.read_bytes().replace(b"reading", b"r3ading")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_reported_and_computed_again(base: Base, tmp_path: Path, damage: str) -> None:
    first, reports = encoded(base, tmp_path), list[str]()
    file = only_file(tmp_path)
    DAMAGE[damage](file)
    with pytest.raises(BadVocabulary, match="delete it"):
        read_vocabulary(file)
    assert same(first, encoded(base, tmp_path, report=lambda step, of, text: reports.append(text)))
    assert f"{file} is damaged" in reports[0]
    assert read_vocabulary(only_file(tmp_path)).done == len(reports) - 1


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(base: Base, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert same(encoded(base, blocked / "below"), encoded(base, None))
    assert blocked.read_text() == "not a folder"


def test_a_larger_subset_begins_with_a_smaller_one_and_each_is_stored_under_a_name_of_its_own(
    base: Base, tmp_path: Path
) -> None:
    found = encoded(base, tmp_path, 5)
    assert isinstance(found, tuple)
    words = {word for sentence in found for word in sentence.words}
    assert len(words) == 5
    assert words < {word for sentence in encoded(base, tmp_path, 6) for word in sentence.words}  # type: ignore[attr-defined]
    encoded(base, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_another_encoder_has_another_vocabulary(base: Base, tmp_path: Path) -> None:
    xl = tiny_xl_base(tmp_path / "xl")
    mine = EncodingTask.of(base, encoders(base), 0)
    theirs = EncodingTask.of(xl, {"text_encoder": encoders(xl)["text_encoder"]}, 0)
    assert vocabulary_file(mine.identity, tmp_path) != vocabulary_file(theirs.identity, tmp_path)


def test_the_text_inputs_of_one_encoder_are_encoded_together_and_stored_in_one_file(tmp_path: Path) -> None:
    xl = tiny_xl_base(tmp_path / "xl")
    steps: list[int] = []
    problem = EditProblem(xl, Concept("cat"), cache=tmp_path / "cache", report=lambda step, *_: steps.append(step))
    first = Separable().solve(problem).delta
    assert steps == sorted(steps)
    kept = [set(read_vocabulary(file).moments) for file in (tmp_path / "cache").glob("*.safetensors")]
    assert sorted(map(len, kept)) == [1, 2]
    assert set.union(*kept) == set(WIDTHS)
    again = EditProblem(Base.open(xl.path), Concept("cat"), cache=tmp_path / "cache")
    assert Separable().solve(again).delta == first


@pytest.fixture
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer's words are many."""
    monkeypatch.setattr(vocabulary, "LARGE", 8)
    monkeypatch.setattr(universe, "LARGE", 8)
    monkeypatch.setattr(universe, "HELD_OUT", 4)
    monkeypatch.setattr(vocabulary, "SMALLEST_SAMPLE", 2)


def test_a_small_vocabulary_is_never_sampled(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(universe, "TOLERANCE", 1e9)
    assert solved(base, tmp_path).record == {}
    words = encoders(base)["text_encoder"].words()
    assert read_vocabulary(only_file(tmp_path)).identity["count"] == len(words) < vocabulary.LARGE


@pytest.mark.usefixtures("_large")
def test_a_sample_grows_until_other_words_hardly_move_and_is_recorded(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([0.5, 0.1, 0.0123])
    monkeypatch.setattr(universe, "_held_out", lambda *args: next(errors))
    words = len(encoders(base)["text_encoder"].words())
    recorded = {"vocabulary": {"words": 8, "of": words, "error": 0.012}}
    assert solved(base, tmp_path).record == recorded
    assert read_vocabulary(only_file(tmp_path)).identity["count"] == 8, "smaller samples are gone"
    assert make_patch(base, Concept("cat"), solved(base, tmp_path).delta, {"name": "separable", **recorded}).id


@pytest.mark.usefixtures("_large")
def test_a_sample_is_completed_later_with_the_bits_of_the_whole(base: Base, tmp_path: Path) -> None:
    task = EncodingTask.of(base, encoders(base))
    assert task.samples[:2] == [2, 4]
    sample = vocabularies(task.first(4), encoders(base), tmp_path, silent)
    assert sum(len(sentence.words) for sentence in sample["text_encoder"]) == 4, "one sentence a word"
    steps: list[int] = []
    prepare(base, (), CPU, preserved=PreservedPrompts(cache=tmp_path), report=lambda step, *_: steps.append(step))
    assert steps[0] == task.first(4).size + 1, "what was encoded is not encoded again"
    assert steps[-1] == task.size
    assert same(encoded(base, tmp_path), encoded(base, None))
    assert solved(Base.open(base.path), tmp_path).record == {}, "the whole is used as soon as it is there"


@pytest.mark.usefixtures("_large")
def test_the_error_of_a_sample_is_how_much_farther_other_words_move(base: Base) -> None:
    memory, task = universe._memory(base, CPU), EncodingTask.of(base, encoders(base))
    errors = []
    for size in task.samples[:-1]:
        sample = task.first(size)
        words = vocabularies(sample, encoders(base), None, silent)["text_encoder"]
        errors.append(universe._held_out(memory, sample, "text_encoder", words))
    assert 0 < errors[-1] < errors[0]


def solved(base: Base, folder: Path) -> Solution:
    return Separable().solve(EditProblem(base, Concept("cat"), cache=folder))


@pytest.mark.usefixtures("_large")
def test_the_average_word_and_the_error_of_a_sample_are_computed_once(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded_prompts: list[str] = []
    hidden = TextEncoder.hidden

    def counting(self: TextEncoder, prompts: Sequence[str], *more: Any) -> Any:
        encoded_prompts.extend(prompts)
        return hidden(self, prompts, *more)

    monkeypatch.setattr(TextEncoder, "hidden", counting)

    def counted(name: str) -> tuple[Solution, int]:
        encoded_prompts.clear()
        problem = EditProblem(Base.open(base.path), Concept(name), cache=tmp_path)
        return Separable().solve(problem), len(encoded_prompts)

    first, many = counted("cat")
    again, few = counted("cat")
    assert again.delta == first.delta
    assert again.record == first.record
    # The concept in its sentences, and words of the sample that are left out for it.
    assert 3 * few < many
    for file in tmp_path.glob("*.memory"):
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    mended, much = counted("cat")
    assert (mended.delta, mended.record) == (first.delta, first.record)
    assert much > 3 * few
    assert counted("cat")[1] == few


def test_another_configuration_or_tokenizer_has_another_vocabulary(tmp_path: Path) -> None:
    """Files beside the weights decide how prompts are read, too."""
    folder = tiny_xl_base(tmp_path / "xl").path

    def identity() -> dict[str, Any]:
        return EncodingTask.of(Base.open(folder), {"text_encoder": TextEncoder.of(Base.open(folder))}).identity

    before = identity()
    used = TextEncoder.of(Base.open(folder))
    used.hidden(["a cat", "two of them, which are longer"])
    assert EncodingTask.of(Base.open(folder), {"text_encoder": used}).identity == before
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"quick_gelu"', '"gelu"'))
    changed = identity()
    assert changed != before
    rules = folder / "tokenizer" / "tokenizer_config.json"
    rules.write_text(json.dumps({**json.loads(rules.read_text()), "model_max_length": 12}))
    assert identity() != changed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_another_length_of_prompts_has_another_vocabulary(tmp_path: Path) -> None:
    folder = tmp_path / "sd3"
    tiny_transformer("stable-diffusion-3").save_pretrained(folder)
    found = []
    for length in (12, 16):
        (folder / "overpaint.json").write_text(json.dumps({"prompt_length": length}))
        base = Base.open(folder)
        found.append(EncodingTask.of(base, {"context": text_sources(base)["context"]}).identity)
    assert found[0] != found[1]


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(base: Base, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    whole = Separable().solve(EditProblem(base, Concept("cat"))).delta
    problem = EditProblem(Base.open(base.path), Concept("cat"), cache=tmp_path / "file")
    assert Separable().solve(problem).delta == whole


def test_own_sentences_of_a_concept_are_not_stored(base: Base, tmp_path: Path) -> None:
    sizes = set()
    for prompts in ((), ("a drawing of {}",), ("{} at sea",)):
        concept = Concept("cat", prompts=prompts)
        Separable().solve(EditProblem(Base.open(base.path), concept, cache=tmp_path))
        (file,) = tmp_path.glob("*.memory")
        sizes.add(file.stat().st_size)
    assert len(sizes) == 1


def test_a_symmetric_matrix_comes_back_from_its_triangle() -> None:
    matrix = torch.arange(25.0, dtype=torch.float64).reshape(5, 5)
    matrix = matrix + matrix.T
    assert triangle(matrix)[:6].tolist() == [*matrix[0].tolist(), matrix[1, 1].item()]
    assert torch.equal(symmetric(triangle(matrix)), matrix)
    with pytest.raises(ValueError, match="no triangles"):
        symmetric(torch.zeros(5, dtype=torch.float64))
