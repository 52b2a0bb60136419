from __future__ import annotations

from collections import Counter

import pytest

from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.evaluation.prompts import STYLE, EmojiPrompts, catalogue, object_scenes, style_scenes


@pytest.mark.parametrize("held_out", [False, True])
def test_every_prompt_asks_for_its_scene(held_out: bool) -> None:
    words = catalogue()
    found = [
        *object_scenes(words.objects, 20, held_out=held_out),
        *style_scenes(words.styles, 50, held_out=held_out),
    ]
    for one in found:
        assert one.prompt in catalogue().captions(one.scene, held_out=held_out)
        assert one.scene.object in one.prompt.split() or f"{one.scene.object}," in one.prompt.split()


def test_held_out_prompts_were_never_trained_on() -> None:
    for one in object_scenes(catalogue().objects, 20, held_out=True):
        assert one.prompt not in catalogue().captions(one.scene)


def test_a_third_of_the_prompts_each_names_nothing_else_a_style_a_background() -> None:
    found = object_scenes(["cat"], 18, held_out=True)
    assert Counter(one.scene.style for one in found) == Counter([None] * 12 + [*catalogue().styles])
    assert Counter(one.scene.background for one in found) == Counter([None] * 12 + [*catalogue().backgrounds])


def test_an_objects_prompts_do_not_depend_on_its_company() -> None:
    alone = object_scenes(["fox"], 6, held_out=True, seed0=5)
    among = object_scenes(["cat", "fox", "sun"], 6, held_out=True, seed0=5)
    assert alone == among[6:12]
    assert alone == object_scenes(["fox"], 9, held_out=True, seed0=5)[:6]


def test_no_seed_is_used_twice() -> None:
    found = object_scenes(catalogue().objects, 20, held_out=False, seed0=100)
    assert len({one.seed for one in found}) == 20 * len(catalogue().objects)
    assert min(one.seed for one in found) == 100


def test_styles_come_with_every_object() -> None:
    found = style_scenes(["ink", "clay"], 50, held_out=False)
    assert [one.scene.style for one in found] == ["ink"] * 50 + ["clay"] * 50
    assert len({one.scene.object for one in style_scenes(["ink"], 50, held_out=False)}) == 50


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(NotFound, match="no object 'teapot'"):
        object_scenes(["teapot"], 1, held_out=False)
    with pytest.raises(NotFound, match="no style 'cubist'"):
        style_scenes(["cubist"], 1, held_out=False)
    with pytest.raises(OverpaintError, match="got 0"):
        object_scenes(["cat"], 0, held_out=False)


def test_a_style_may_be_called_so_by_its_concept() -> None:
    prompts = EmojiPrompts()
    assert (
        prompts.class_of(Concept("Ink style", "style")) == prompts.class_of(Concept("ink", "style")) == (STYLE, "ink")
    )
    with pytest.raises(NotFound):
        prompts.class_of(Concept("ink style", "object"))
