"""The catalogue is what both bases draw and what every word of a prompt comes from."""

from __future__ import annotations

from collections import Counter

import pytest

from tools.emoji_base.catalogue import Scene, captions, catalogue
from tools.emoji_base.measuring import Share, questions
from tools.emoji_base.text_encoders import LENGTH as T5_LENGTH
from tools.emoji_base.text_encoders import t5_tokenizer
from tools.emoji_base.tokens import LENGTH, tokenizer


def test_names_and_synonyms_are_single_words_and_belong_to_one_object() -> None:
    words = [word for names in catalogue().names.values() for word in names]
    assert [word for word, times in Counter(words).items() if times > 1] == []
    assert all(word.isalpha() and word.islower() for word in words)


def test_there_is_room_for_a_hundred_concepts_and_some_to_keep() -> None:
    known = catalogue()
    assert len(known.objects) >= 120
    assert len(known.styles) == len(known.backgrounds) == 6
    assert len(set(known.drawings.values())) == len(known.objects)


def test_both_tokenizers_give_a_word_one_token_and_longest_prompts_fit() -> None:
    clip, t5 = tokenizer(), t5_tokenizer()
    assert len(clip("a nice unicorn, ink style").input_ids) == 8
    assert len(t5("a nice unicorn, ink style").input_ids) == 7
    known = catalogue()
    scene = Scene(known.objects[0], known.styles[0], known.backgrounds[0])
    for prompt in captions(scene) + captions(scene, held_out=True):
        assert len(clip(prompt).input_ids) <= min(LENGTH, T5_LENGTH)
        assert len(t5(prompt).input_ids) <= T5_LENGTH


def test_questions_are_spread_evenly_and_each_has_its_seed() -> None:
    asked = questions(6, held_out=True)
    assert len({a.seed for a in asked}) == len(asked) == 6 * len(catalogue().objects)
    styles = Counter(a.scene.style for a in asked if a.scene.style)
    assert max(styles.values()) - min(styles.values()) <= 1


@pytest.mark.parametrize(
    ("share", "low", "high"), [(Share(0, 0), 0.0, 1.0), (Share(95, 100), 0.888, 0.978), (Share(100, 100), 0.963, 1.0)]
)
def test_wilson_interval(share: Share, low: float, high: float) -> None:
    assert share.interval == pytest.approx((low, high), abs=1e-3)
