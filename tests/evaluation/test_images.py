from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from overpaint.bases.base import Base
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.images import Sampler, _batches_at_once, _parts, generate
from overpaint.evaluation.prompts import EvalPrompt
from tests.bases.tiny_transformers import tiny_transformer

PROMPTS = ["a cat", "a dog in ink style", "a cat", "the fox", "one bus"]
SEEDS = [3, 1, 4, 1, 5]
SAMPLER = Sampler(steps=2, batch=5)


def test_the_same_call_gives_the_same_bits(pipe: Any) -> None:
    first, second = (generate(pipe, PROMPTS, SEEDS, SAMPLER) for _ in range(2))
    assert first.dtype == np.uint8
    assert first.shape == (5, 64, 64, 3)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_picture_does_not_depend_on_its_neighbours(pipe: Any, batch: int) -> None:
    together = generate(pipe, PROMPTS, SEEDS, SAMPLER).astype(int)
    apart = generate(pipe, PROMPTS, SEEDS, Sampler(steps=2, batch=batch)).astype(int)
    # Kernels sum in another order at another batch size, which may cross a rounding border.
    assert abs(together - apart).max() <= 2


def test_seed_and_prompt_both_matter(pipe: Any) -> None:
    cat, other_seed, other_prompt = generate(pipe, ["a cat", "a cat", "zzzz"], [3, 4, 3], SAMPLER)
    assert not np.array_equal(cat, other_seed)
    assert not np.array_equal(cat, other_prompt)


def test_progress_counts_pictures_and_the_bar_is_silent(pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    counts: list[int] = []
    pipe.set_progress_bar_config(desc="kept")
    generate(pipe, PROMPTS, SEEDS, Sampler(steps=1, batch=2), on_batch=counts.append)
    assert counts == [2, 4, 5]
    assert capfd.readouterr().err == ""
    assert pipe._progress_bar_config == {"desc": "kept"}


def test_prompts_of_other_lengths_that_are_drawn_at_once_do_not_disturb_each_other(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Stable Diffusion 3 reads a prompt with three tokenizers, which remember how they padded the last one.
    pipe = tiny_transformer("stable-diffusion-3")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    prompts = [" ".join(["cat"] * (1 + i % 3)) for i in range(24)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = generate(pipe, prompts, range(24), Sampler(steps=1, batch=3))
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    pictures = generate(pipe, prompts, range(24), Sampler(steps=1, batch=3))
    assert np.array_equal(pictures, expected)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("autocast", [False, True])
def test_batches_drawn_at_once_are_those_that_are_drawn_one_after_the_other(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    prompts, seeds = [*PROMPTS, *PROMPTS], [*SEEDS, *range(5)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = generate(pipe, prompts, seeds, Sampler(steps=2, batch=5))
    counts: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads, scheduler = torch.get_num_threads(), pipe.scheduler
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pictures = generate(pipe, prompts, seeds, Sampler(steps=2, batch=50), on_batch=counts.append)
    assert counts == [5, 10]
    assert np.array_equal(pictures, expected)
    assert pipe.scheduler is scheduler
    assert torch.get_num_threads() == threads


def test_a_mistake_in_one_of_several_batches_is_told_and_ends_all(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(pipe, PROMPTS * 2, SEEDS * 2, SAMPLER)


@pytest.mark.parametrize(("count", "batch", "at_once"), [(1, 1, 1), (40, 50, 2), (41, 50, 2), (120, 50, 4), (7, 3, 2)])
def test_parts_cover_every_picture_once_and_are_no_larger_than_a_batch(count: int, batch: int, at_once: int) -> None:
    parts = _parts(count, batch, at_once)
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) <= batch
    assert len(parts) % at_once == 0
    assert max(sizes) - min(sizes) <= 1


def test_lists_that_do_not_match_are_refused(pipe: Any) -> None:
    with pytest.raises(OverpaintError, match="1 prompts and 2 seeds"):
        generate(pipe, ["a cat"], [1, 2])
    with pytest.raises(OverpaintError, match="0 prompts"):
        generate(pipe, [], [])


def test_a_sampler_takes_at_least_one_step() -> None:
    with pytest.raises(OverpaintError, match="at least one step"):
        Sampler(steps=0)


@pytest.mark.parametrize(
    "settings", [{"steps": 2.5}, {"steps": "2"}, {"batch": 1.5}, {"guidance": math.nan}, {"guidance": math.inf}]
)
def test_a_sampler_has_whole_and_finite_numbers(settings: dict[str, Any]) -> None:
    with pytest.raises(OverpaintError, match=r"whole number|finite number"):
        Sampler(**settings)


@pytest.mark.parametrize(
    "seed",
    [2**63, 2**64, 10**5000, -(2**63) - 1, 2.5, "1", True],
    ids=lambda seed: str(seed)[:22] if seed != 10**5000 else "huge",
)
def test_a_seed_that_no_generator_takes_is_refused_in_one_sentence(pipe: Any, seed: Any) -> None:
    for ask in (lambda: generate(pipe, ["a cat"], [seed]), lambda: EvalPrompt("a cat", seed, {})):
        with pytest.raises(OverpaintError, match="a seed is a whole number of at most 63 bits"):
            ask()


def test_half_a_character_is_no_prompt(pipe: Any) -> None:
    for ask in (lambda: generate(pipe, ["\ud800"], [0]), lambda: EvalPrompt("\ud800", 0, {})):
        with pytest.raises(OverpaintError, match="a text of whole characters"):
            ask()


def _cast_by_layers(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _hook(pipe: Any) -> None:
    pipe.unet.conv_in.register_forward_hook(lambda module, inputs, output: None)


@pytest.mark.parametrize("change", [_cast_by_layers, _hook, lambda pipe: pipe.unet.compile(backend="eager")])
def test_a_model_that_keeps_something_while_it_is_called_draws_one_batch_after_the_other(
    base: Base, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    pipe = base.pipeline()
    assert _batches_at_once(pipe) == 2
    change(pipe)
    assert _batches_at_once(pipe) == 1
