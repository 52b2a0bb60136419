"""Text encoders that are too large to hold: read layer by layer, with the same bits."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from overpaint.bases import encoder_models, text_encoder
from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.safetensors_file import BrokenFile
from overpaint.bases.text_encoder import TextEncoder, encoders
from overpaint.core.concepts import Concept
from overpaint.solvers import vocabulary
from overpaint.solvers.closed_form.separable import Separable
from overpaint.solvers.problem import EditProblem
from tests.bases.containers import single_file_tensors
from tests.bases.tiny_xl import tiny_xl_base

CPU = torch.device("cpu")
PROMPTS = ["a photo of a cat", "", "the moon in the style of a fox", "a dog"]


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_xl_base(tmp_path_factory.mktemp("xl") / "xl").path


@pytest.fixture
def xl(xl_folder: Path) -> Base:
    return Base.open(xl_folder)


def numbers_held(model: Any) -> int:
    """How many numbers a model has in memory."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() for tensor in tensors if not tensor.is_meta)


def embeddings_of(base: Base) -> dict[str, torch.Tensor]:
    return {text_input: encoder.hidden(PROMPTS) for text_input, encoder in encoders(base).items()}


@pytest.mark.parametrize("form", ["folder", "safetensors", "ckpt"])
def test_layers_that_are_read_when_needed_give_the_same_bits(
    xl: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Also from a single file, which keeps some of their weights stacked and the other way round."""
    base = xl
    if form != "folder":
        file = tmp_path / f"model.{form}"
        save_file(single_file_tensors(xl), file) if form == "safetensors" else torch.save(single_file_tensors(xl), file)
        (tmp_path / "model").symlink_to(xl.path)
        base = Base.open(file)
    whole = embeddings_of(base)
    monkeypatch.setattr(encoder_models, "HELD", 0)
    parts = embeddings_of(base)
    assert list(parts) == list(whole)
    assert all(torch.equal(parts[text_input], whole[text_input]) for text_input in whole)


def test_layers_are_not_held_between_batches(xl: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_models, "HELD", 0)
    monkeypatch.setattr(encoder_models, "LARGE_MATRIX", 0)
    found = encoders(xl)["text_encoder_2"]
    config, before = found.model.config, numbers_held(found.model)
    outside = (2 + config.projection_dim) * config.hidden_size
    assert before == outside + config.max_position_embeddings  # and the numbers of positions
    found.hidden(PROMPTS)
    assert numbers_held(found.model) == before


def test_layers_take_turns_in_one_place_unless_gradients_ask_for_them_again(
    xl: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoders(xl)["text_encoder_2"].model
    monkeypatch.setattr(encoder_models, "HELD", 0)
    found = encoders(xl)["text_encoder_2"]
    places: list[int] = []
    for layer in encoder_models.layers_of(found.model):
        layer.register_forward_hook(
            lambda module, args, answer: places.append(module.mlp.fc1.weight.data_ptr()), prepend=True
        )
    found.hidden(PROMPTS)
    assert len(places) > 1
    assert len(set(places)) == 1
    assert torch.equal(gradient(found.model), gradient(whole))
    with torch.inference_mode():
        found.hidden(["what a program does that draws"])
    found.hidden(["what one does that solves"])


def gradient(model: Any) -> torch.Tensor:
    """That of the sum of what comes out of all layers, by what goes into the first."""
    hidden = start = torch.randn(1, 4, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    start.requires_grad_()
    for layer in encoder_models.layers_of(model):
        hidden = layer(hidden, None)
    hidden.square().sum().backward()
    assert start.grad is not None
    return start.grad


def test_what_reads_layers_does_not_keep_the_base(xl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_models, "HELD", 0)
    opened = Base.open(xl_folder)
    found, kept = encoders(opened), weakref.ref(opened)
    del opened
    gc.collect()
    assert kept() is None
    assert found["text_encoder"].hidden(PROMPTS).shape == (4, 16, 32)


def test_a_solve_does_not_depend_on_what_is_held(xl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def solved() -> list[torch.Tensor]:
        solution = Separable(vocabulary=20).solve(EditProblem(Base.open(xl_folder), Concept("cat")))
        return [tensor for _, tensor in sorted(solution.delta.tensors().items())]

    whole = solved()
    monkeypatch.setattr(encoder_models, "HELD", 0)
    monkeypatch.setattr(text_encoder, "READ_BATCH", text_encoder.BATCH)
    monkeypatch.setattr(text_encoder, "REMEMBERED", 0)
    assert all(torch.equal(one, other) for one, other in zip(solved(), whole, strict=True))


def test_what_is_held_follows_from_all_text_encoders_of_a_base_together(
    xl: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {}
    for component in ("text_encoder", "text_encoder_2"):
        model = encoder_models.text_model(xl, component, CPU)
        sizes[component] = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(encoder_models, "HELD", sum(sizes.values()))
    assert numbers_held(encoder_models.text_model(xl, "text_encoder", CPU)) > sizes["text_encoder"] // 4
    monkeypatch.setattr(encoder_models, "HELD", sum(sizes.values()) - 1)
    assert numbers_held(encoder_models.text_model(xl, "text_encoder", CPU)) < sizes["text_encoder"] // 4


def test_a_file_that_is_cut_after_opening_is_noticed_when_its_layer_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_xl_base(tmp_path / "xl")
    monkeypatch.setattr(encoder_models, "HELD", 0)
    found = TextEncoder.of(base)
    file = base.path / "text_encoder" / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(base.containers[file].data_start + 64)
    with pytest.raises(BrokenFile, match="it ends early"):
        found.hidden(PROMPTS)


@pytest.mark.parametrize("held", [0, 1 << 30])
def test_a_configuration_that_is_another_models_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    base = tiny_xl_base(tmp_path / "xl")
    monkeypatch.setattr(encoder_models, "HELD", held)
    config = base.path / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 24}))
    with pytest.raises(BrokenBase, match=r"has shape \[64.*by its configuration \[24"):
        TextEncoder.of(Base.open(base.path))


def test_batches_of_prompts_are_as_large_as_an_encoder_allows(xl: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [f"a photo of {number}" for number in range(40)]
    whole = TextEncoder.of(xl).hidden(many)
    monkeypatch.setattr(encoder_models, "HELD", 0)
    found = TextEncoder.of(xl)
    sizes: list[int] = []
    encoder_models.layers_of(found.model)[0].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    torch.testing.assert_close(found.hidden(many), whole)
    assert sizes == [16, 16, 8]


def test_embeddings_are_cached_up_to_a_number_of_bytes(xl: Base) -> None:
    """Text inputs of one model share even many prompts; what is too much is computed again."""
    found = encoders(xl)["text_encoder"]
    many = [f"a photo of {number}" for number in range(text_encoder.BATCH + 1)]
    first = found.hidden(many)
    assert found.hidden(many).data_ptr() == first.data_ptr()
    found._memory.answers.limit = first.nbytes - 1
    few = found.hidden(PROMPTS)
    assert found.hidden(PROMPTS).data_ptr() == few.data_ptr()
    again = found.hidden(many)
    assert again.data_ptr() != first.data_ptr()
    assert torch.equal(again, first)


@pytest.mark.parametrize(("width", "words"), [(768, 256), (1024, 128), (1280, 128), (4096, 32)])
def test_a_batch_has_as_many_words_as_their_keys_leave_room_for(width: int, words: int) -> None:
    """As many as ever on Stable Diffusion 1.x: sums of other pieces would have other last bits."""
    assert vocabulary._at_once(width, 77) == words
    assert words * 77 * width * 8 <= vocabulary.CHUNK_BYTES


def test_freed_memory_is_given_back_while_layers_are_read(xl: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(encoder_models, "_malloc_trim", lambda: trimmed.append)
    monkeypatch.setattr(encoder_models, "TRIM_EVERY", 1)
    encoders(xl)["text_encoder_2"].hidden(PROMPTS)
    assert not trimmed, "what is held frees no layer"
    monkeypatch.setattr(encoder_models, "HELD", 0)
    found = encoders(xl)["text_encoder_2"]
    found.hidden(PROMPTS)
    assert len(trimmed) == len(encoder_models.layers_of(found.model))


def test_what_other_threads_build_while_a_text_encoder_is_put_together_is_real() -> None:
    inside, built = threading.Event(), threading.Event()
    found: list[bool] = []

    def elsewhere() -> None:
        inside.wait(10)
        layer = nn.Linear(2, 2)
        found.append(layer.weight.is_meta)
        built.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    register = nn.Module.register_parameter
    with encoder_models._parameters_on_meta():
        inside.set()
        assert built.wait(10)
        assert nn.Linear(2, 2).weight.is_meta
    thread.join()
    assert found == [False]
    assert nn.Module.register_parameter is register


def test_two_threads_that_put_text_encoders_together_leave_pytorch_as_it_was() -> None:
    register = nn.Module.register_parameter
    both = threading.Barrier(2)

    def build(_: int) -> bool:
        both.wait(10)
        with encoder_models._parameters_on_meta():
            time.sleep(0.05)
            return nn.Linear(2, 2).weight.is_meta

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(build, range(2))) == [True, True]
    assert nn.Module.register_parameter is register
    assert not nn.Linear(2, 2).weight.is_meta
