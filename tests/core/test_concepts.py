"""A concept's own sentences, and a spelling of it that does not change under those that have none."""

from __future__ import annotations

import pytest

from overpaint.core.concepts import Concept
from overpaint.core.encoding import canonical_json
from overpaint.core.errors import OverpaintError


def test_without_prompts_the_json_is_that_of_0_1() -> None:
    concept = Concept("cat", synonyms=("kitty",), anchor="dog")
    assert canonical_json(concept.as_json()) == b'{"anchor":"dog","kind":"object","name":"cat","synonyms":["kitty"]}'
    assert Concept.from_json(concept.as_json()) == concept


def test_prompts_are_read_back() -> None:
    concept = Concept("cat", prompts=("a cat on a roof",))
    assert Concept.from_json(concept.as_json()) == concept
    assert concept.as_json()["prompts"] == ["a cat on a roof"]


def test_a_prompt_is_a_sentence_with_a_word_in_it() -> None:
    concept = Concept("cat", synonyms=("black cat",), prompts=("A Black Cat sleeps, the cat dreams", "a {} by night"))
    assert concept.phrases == (
        ("A {} sleeps, the cat dreams", "Black Cat"),
        ("a {} by night", "cat"),
        ("a {} by night", "black cat"),
    )


@pytest.mark.parametrize("prompt", ["a dog", "concatenate", "a {cat}", "{} and {}", "}"])
def test_a_prompt_without_the_concept_is_refused(prompt: str) -> None:
    with pytest.raises(OverpaintError):
        Concept("cat", prompts=(prompt,))
