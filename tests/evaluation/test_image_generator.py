"""Pictures are drawn once, known by what determines them, and drawn again when their file is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from overpaint.bases.base import Base
from overpaint.evaluation.images import ImageCache, ImageGenerator, Sampler, generate
from overpaint.evaluation.prompts import EvalPrompt
from overpaint.patches.compose import Term
from overpaint.patches.delta import TextMap

ASKED = [EvalPrompt(prompt, seed, {"object": "cat"}) for prompt in ("a cat", "the dog") for seed in (3, 4, 5)]
TERM = Term("one", TextMap("text_encoder", torch.ones(64, 1) / 8, torch.ones(64, 1) / 8))


def image_generator(base: Base, folder: Path | None, batch: int = 4, steps: int = 1) -> ImageGenerator:
    return ImageGenerator(base, Sampler(steps, 4.0, batch), ImageCache(folder), torch.device("cpu"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the pipeline drew."""
    counts: list[int] = []

    def counted(pipe: Any, prompts: list[str], seeds: list[int], sampler: Sampler) -> Any:
        counts.append(len(prompts))
        return generate(pipe, prompts, seeds, sampler)

    monkeypatch.setattr("overpaint.evaluation.images.generate", counted)
    return counts


def test_pictures_are_drawn_once(base: Base, tmp_path: Path, drawn: list[int]) -> None:
    first = image_generator(base, tmp_path).draw((), ASKED)
    second = image_generator(base, tmp_path).draw((), ASKED[::-1])
    assert drawn == [4, 2]
    assert np.array_equal(first, second[::-1])


def test_the_same_seed_gives_the_same_picture_whatever_the_batch_size(base: Base, tmp_path: Path) -> None:
    together = image_generator(base, None, batch=6).draw((), ASKED).astype(int)
    apart = image_generator(base, None, batch=1).draw((), ASKED).astype(int)
    # Kernels sum in another order at another batch size, which may cross a rounding border.
    assert abs(together - apart).max() <= 2
    kept = image_generator(base, tmp_path, batch=6).draw((), ASKED)
    assert np.array_equal(image_generator(base, tmp_path, batch=1).draw((), ASKED), kept)


def test_weights_sampler_prompt_and_seed_each_make_another_picture(
    base: Base, tmp_path: Path, drawn: list[int]
) -> None:
    image_generator(base, tmp_path).draw((), ASKED[:1])
    image_generator(base, tmp_path).draw([TERM], ASKED[:1])
    image_generator(base, tmp_path, steps=2).draw((), ASKED[:1])
    image_generator(base, tmp_path).draw((), ASKED[1:2])
    image_generator(base, tmp_path).draw((), ASKED[3:4])
    assert drawn == [1] * 5
    assert len(list(tmp_path.rglob("*.png"))) == 5


def test_patches_that_compose_to_the_base_are_the_base(base: Base, tmp_path: Path, drawn: list[int]) -> None:
    nothing = Term("two", TextMap("text_encoder", torch.zeros(64, 1), torch.zeros(64, 1)))
    image_generator(base, tmp_path).draw((), ASKED)
    image_generator(base, tmp_path).draw([nothing], ASKED)
    assert drawn == [4, 2]


def test_an_interrupted_run_goes_on_where_it_was(
    base: Base, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = ImageCache.remember

    def power_cut(self: ImageCache, *args: Any) -> None:
        keep(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(ImageCache, "remember", power_cut)
        with pytest.raises(KeyboardInterrupt):
            image_generator(base, tmp_path).draw((), ASKED)
    assert drawn == [4]
    image_generator(base, tmp_path).draw((), ASKED)
    assert drawn == [4, 2]


@pytest.mark.parametrize("damage", ["a bit", "the end", "everything", "another picture"])
def test_a_damaged_picture_is_drawn_again_and_reported(
    base: Base, tmp_path: Path, drawn: list[int], damage: str
) -> None:
    first = image_generator(base, tmp_path).draw((), ASKED)
    place = sorted(tmp_path.rglob("*.png"))[0]
    content = bytearray(place.read_bytes())
    if damage == "another picture":
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(place)
    else:
        content[len(content) // 2] ^= 1
        place.write_bytes(
            {"a bit": bytes(content), "the end": bytes(content[:-40]), "everything": b"no picture"}[damage]
        )
    again = image_generator(base, tmp_path)
    assert abs(again.draw((), ASKED).astype(int) - first).max() <= 2  # drawn in another batch
    assert again.image_cache.damaged == [place]
    assert sum(drawn) == 7
    whole = image_generator(base, tmp_path)
    whole.draw((), ASKED)
    assert whole.image_cache.damaged == []


def test_a_picture_records_what_it_shows(base: Base, tmp_path: Path) -> None:
    image_generator(base, tmp_path).draw((), ASKED[:1])
    (place,) = tmp_path.rglob("*.png")
    assert place.parent.name == base.fingerprint
    with Image.open(place) as file:
        assert (file.info["prompt"], file.info["seed"]) == ("a cat", "3")
        assert file.info["sampler"] == "1 steps, guidance 4, cpu"


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(base: Base, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    found = image_generator(base, tmp_path / "taken").draw((), ASKED[:2])
    assert np.array_equal(found, image_generator(base, None).draw((), ASKED[:2]))


def test_progress_has_the_time_that_is_left(base: Base) -> None:
    told: list[tuple[int, int, str]] = []
    working = image_generator(base, None)
    working._report = lambda *line: told.append(line)
    working.expect(600)
    working.draw((), ASKED)
    assert [line[:2] for line in told] == [(0, 600), (4, 600), (6, 600)]
    assert "s left" in told[-1][2]
