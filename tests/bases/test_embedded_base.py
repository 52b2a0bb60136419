"""The embedded base as it ships: whole, small, opened by the same code as any other, and judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from overpaint.bases.base import EMOJI, Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.evaluation.images import Sampler, generate
from overpaint.evaluation.judges import load_judge
from overpaint.evaluation.prompts import Scene, catalogue


@pytest.fixture(scope="module")
def emoji() -> Base:
    return Base.open("emoji")


def test_it_is_a_diffusers_folder_like_any_other(emoji: Base) -> None:
    assert Base.open(EMOJI).fingerprint == emoji.fingerprint
    assert {name.partition("/")[0] for name in emoji.names} == {"text_encoder", "unet", "vae"}
    assert all(name.startswith("text_encoder/text_model.") for name in emoji.names if name.startswith("text_encoder"))


def test_all_weights_together_are_at_most_40_mb(emoji: Base) -> None:
    assert sum(p.stat().st_size for p in EMOJI.rglob("*.safetensors")) <= 40_000_000


def test_its_card_states_measurements_and_licences() -> None:
    card = (EMOJI / "README.md").read_text("utf-8")
    for word in ("held-out", "95% Wilson", "CC BY 4.0", "Apache-2.0", "MIT"):
        assert word in card


def test_the_catalogue_is_as_large_as_promised() -> None:
    words = catalogue()
    assert len(words.objects) >= 120
    assert len(words.styles) == 6
    assert len(words.backgrounds) == 6
    assert sum(len(names) > 1 for names in words.names.values()) >= 12


def test_every_word_of_the_catalogue_is_one_token(emoji: Base) -> None:
    encoder, words = TextEncoder.of(emoji), catalogue()
    named = [name for names in words.names.values() for name in names]
    for word in (*named, *words.styles, *words.backgrounds):
        assert len(encoder.tokens(word)) == 1, word


def test_no_caption_is_cut_off(emoji: Base) -> None:
    encoder, words = TextEncoder.of(emoji), catalogue()
    scene = Scene("hamburger", "blueprint", "purple")
    longest = max(
        [*words.captions(scene), *words.captions(scene, held_out=True)],
        key=lambda text: len(encoder.tokens(text)),
    )
    assert len(encoder.tokens(longest)) + 2 <= encoder.length


def test_held_out_templates_are_held_out() -> None:
    scene = Scene("cat", "ink", "red")
    assert not set(catalogue().captions(scene)) & set(catalogue().captions(scene, held_out=True))


def test_it_draws_and_the_judge_looks(emoji: Base) -> None:
    pictures = generate(emoji.pipeline(), ["a sun", "a picture of a key"], [0, 1], Sampler(steps=2))
    assert pictures.shape == (2, 64, 64, 3)
    assert pictures.dtype == np.uint8
    assert load_judge(emoji.path).classes["object"] == (*catalogue().objects, "none of these")


def test_nothing_outside_the_package_is_needed() -> None:
    assert Path(EMOJI).is_relative_to(Path(__file__).parents[2] / "overpaint")


def test_the_embedded_base_draws_from_prompts_alone_though_its_autoencoder_has_eight_channels() -> None:
    base = Base.open("emoji")
    assert (base.channels, base.pipeline_class) == (8, "StableDiffusionPipeline")
