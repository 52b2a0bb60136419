"""Many concepts learnt at once, and patches laid in the place of others: all of it, or none."""

from __future__ import annotations

import pytest

from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.registry.history import Note
from overpaint.registry.registry import ConceptDiffers
from overpaint.registry.upkeep import verify

from .contents import add_patch, digest_of, lay

NOTE = Note("a test", "tester")


def test_concepts_are_learnt_together_and_equal_ones_left_alone(either: Registry) -> None:
    either.learn_concepts([Concept("apple", anchor="pear"), Concept("plum", prompts=("a plum tree",)), Concept("fig")])
    assert [concept.name for concept in either.concepts()] == ["apple", "plum", "fig"]
    assert either.concept("plum").prompts == ("a plum tree",)


def test_one_that_differs_refuses_all_of_them(either: Registry) -> None:
    with pytest.raises(ConceptDiffers) as caught:
        either.learn_concepts([Concept("plum"), Concept("apple", "style", ("pomme",))])
    said = str(caught.value)
    assert 'kept here: {"kind": "object", "anchor": "pear"}' in said
    assert 'asked for: {"kind": "style", "synonyms": ["pomme"]}' in said
    assert [concept.name for concept in either.concepts()] == ["apple"]


def test_an_update_changes_what_a_search_finds(either: Registry) -> None:
    patch = add_patch(either, "one")
    either.tag("fruit", patches=[patch.id], who="tester")
    either.learn_concepts([Concept("apple", "style", ("pomme",))], update=True)
    assert either.concept("apple") == Concept("apple", "style", ("pomme",))
    assert [found.id for found in either.search("pomme", tag="fruit").patches] == [patch.id]
    assert either.search("pear").patches == ()


def test_a_concept_that_cannot_be_stored_refuses_all_of_them(either: Registry) -> None:
    with pytest.raises(OverpaintError, match="does not print"):
        either.learn_concepts([Concept("plum"), Concept("fig", prompts=("a fig\x07",))])
    assert [concept.name for concept in either.concepts()] == ["apple"]


def laid(registry: Registry) -> dict[str, float]:
    return dict(registry.recipe("r").patches)


def test_patches_take_the_places_of_others_in_one_revision(either: Registry) -> None:
    either.create_recipe("r", "small")
    old, stays, new = (add_patch(either, label).id for label in ("old", "stays", "new"))
    lay(either, "r", old, 0.5)
    lay(either, "r", stays, 1.0)
    number = either.exchange_patches("r", {old: new}, NOTE, expected=2)
    assert laid(either) == {new: 0.5, stays: 1.0}
    lines = either.log("r", revision=number)
    assert {(line.action, line.patch, line.strength_before, line.strength_after) for line in lines} == {
        ("remove", old, 0.5, None),
        ("add", new, None, 0.5),
    }


def test_an_exchange_that_cannot_be_leaves_everything_as_it_was(either: Registry) -> None:
    either.create_recipe("r", "small")
    one, two, new = (add_patch(either, label).id for label in ("one", "two", "new"))
    lay(either, "r", one, 1.0)
    lay(either, "r", two, 1.0)
    before = either.recipe("r")
    for exchange, error in (
        ({one: digest_of("nothing")}, NotFound),
        ({new: one}, NotFound),
        ({one: new, two: digest_of("nothing")}, NotFound),
        ({one: two}, AlreadyExists),
        ({one: new, two: new}, AlreadyExists),
    ):
        with pytest.raises(error):
            either.exchange_patches("r", exchange, NOTE)
    with pytest.raises(OverpaintError, match="by now, and this change was made from"):
        either.exchange_patches("r", {one: new}, NOTE, expected=1)
    assert either.recipe("r") == before


def test_a_decomposed_name_is_stored_composed_in_its_description_too(either: Registry) -> None:
    either.add_concept(Concept("nai\u0308ve"))
    either.add_concept(Concept("nai\u0308ve"), exist_ok=True)
    assert either.concept("na\u00efve").name == "na\u00efve"
    assert verify(either).problems == ()
