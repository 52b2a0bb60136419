"""Re-separation: after it a recipe holds what it would hold had all concepts been known from the start."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

import overpaint
from overpaint.errors import OverpaintError
from overpaint.patches.compose import compose
from overpaint.registry.verify import verify
from overpaint.solving.separation import NotReseparable, universes
from overpaint.transport.records import read_record, record_of
from overpaint.workshop import Workshop

from .shell import Shell


def grown(shop: Workshop) -> None:
    """A recipe with a cat from when nothing else was known, and a dog from when the cat was; then the sun joins."""
    recipe = shop.recipe("safe")
    recipe.add(shop.solve("cat", base="tiny", device="cpu"), 0.5, why="first", until=date(2030, 1, 31))
    recipe.add(shop.solve("dog", base="tiny", device="cpu"), why="second")
    shop.add_concept("sun")


def test_afterwards_everything_is_as_if_solved_together(shop: Workshop, tmp_path: Path, base_folder: Path) -> None:
    grown(shop)
    done = shop.reseparate("safe", device="cpu")
    assert done.concepts == 3
    fresh = overpaint.open(tmp_path / "fresh")
    fresh.add_base("tiny", base_folder)
    fresh.learn(["cat", "dog", "sun"])
    wanted = {name: fresh.solve(name, base="tiny", device="cpu").id for name in ("cat", "dog")}
    assert {patch.concept: patch.id for patch, _ in shop.recipe("safe").patches()} == wanted
    assert verify(shop.registry).problems == ()


def test_it_is_one_revision_and_every_patch_lies_as_it_did(shop: Workshop) -> None:
    grown(shop)
    recipe = shop.recipe("safe")
    before, digest = recipe.record, recipe.digest()
    done = shop.reseparate("safe", device="cpu")
    after = recipe.record
    assert after.revision == before.revision + 1
    assert sorted((patch.concept, strength) for patch, strength in recipe.patches()) == [("cat", 0.5), ("dog", 1.0)]
    assert {each.until for each in after.laid} == {each.until for each in before.laid} == {date(2030, 1, 31), None}
    assert sorted((line.action, line.concept) for line in done.lines) == [
        ("add", "cat"),
        ("add", "dog"),
        ("remove", "cat"),
        ("remove", "dog"),
    ]
    assert {line.why for line in done.lines} == {"re-separated for 3 concepts"}
    assert {line.digest_before for line in done.lines} == {digest}
    assert {line.digest_after for line in done.lines} == {recipe.digest()}
    recipe.checkout(before.revision)
    assert recipe.digest() == digest, "what was there before comes back, bit for bit"


def test_the_new_revision_travels(shop: Workshop) -> None:
    grown(shop)
    shop.reseparate("safe", device="cpu")
    record = record_of(shop.registry, "safe")
    assert read_record(record.raw).laid() == {each.patch: each for each in shop.recipe("safe").record.laid}


def test_a_second_time_there_is_nothing_to_do(shop: Workshop) -> None:
    grown(shop)
    shop.reseparate("safe", device="cpu")
    revision, patches = shop.recipe("safe").record.revision, len(shop.patches())
    assert shop.reseparate("safe", device="cpu").lines == []
    assert (shop.recipe("safe").record.revision, len(shop.patches())) == (revision, patches)


def test_settings_seed_and_compression_come_along(shop: Workshop) -> None:
    old = shop.solve("cat", base="tiny", settings={"rank": "3"}, seed=7, compress="2", device="cpu")
    shop.recipe("safe").add(old)
    shop.add_concept("sun")
    shop.reseparate("safe", device="cpu")
    ((new, _),) = shop.recipe("safe").patches()
    assert new.id != old.id
    assert (new.settings, new.seed) == (old.record.settings, 7)
    again = shop.solve("cat", base="tiny", settings={"rank": "3"}, seed=7, compress="2", device="cpu")
    assert new.id == again.id


def test_what_needs_training_stays_and_is_named(shop: Workshop) -> None:
    shop.recipe("safe").add(shop.solve("cat", base="tiny", solver="counting", device="cpu"))
    assert shop.reseparate("safe", device="cpu").left == ()
    shop.recipe("safe").add(shop.solve("dog", base="tiny", device="cpu"))
    shop.add_concept("sun")
    done = shop.reseparate("safe", device="cpu")
    assert [(record.concept, record.solver) for record in done.left] == [("cat", "counting")]
    assert [line.concept for line in done.lines] == ["dog", "dog"]


def test_a_concept_that_cannot_be_solved_any_more_leaves_the_recipe_as_it_was(shop: Workshop) -> None:
    grown(shop)
    before = shop.recipe("safe").record
    shop.add_concept("cat dog fox car bus sun moon tree rose house person a of the in")
    with pytest.raises(OverpaintError, match="is as it was"):
        shop.reseparate("safe", device="cpu")
    assert shop.recipe("safe").record == before


def test_two_patches_that_would_become_one_are_refused(shop: Workshop) -> None:
    recipe = shop.recipe("safe")
    recipe.add(shop.solve("cat", base="tiny", device="cpu"))
    shop.add_concept("sun")
    recipe.add(shop.solve("cat", base="tiny", device="cpu"))
    patches = len(shop.patches())
    with pytest.raises(NotReseparable, match="remove one of them first"):
        shop.reseparate("safe", device="cpu")
    assert (len(recipe.record.laid), len(shop.patches())) == (2, patches)


def test_only_a_recipe_as_it_is_now_can_be_changed(shop: Workshop) -> None:
    grown(shop)
    with pytest.raises(OverpaintError, match="re-separate 'safe' itself"):
        shop.reseparate("safe@1", device="cpu")


def test_the_parts_of_one_universe_add_up_and_others_are_told_apart(shop: Workshop) -> None:
    grown(shop)
    found = universes(shop.registry, "safe")
    assert [(each.concepts, [patch.concept for patch in each.patches]) for each in found] == [
        (2, ["dog"]),
        (1, ["cat"]),
    ]
    assert "1 for 2 concepts, 1 for 1 concept" in shop.mixture("safe")
    shop.reseparate("safe", device="cpu")
    assert len(universes(shop.registry, "safe")) == 1
    assert shop.mixture("safe") == ""
    assert compose(shop.base("tiny"), shop.recipe("safe").terms())


def test_the_commands_say_what_is_mixed_and_mend_it(shop: Workshop, tmp_path: Path) -> None:
    shell = Shell(tmp_path / "registry")
    shell.ok("solve", "cat", "--base", "tiny")
    assert "universes" not in shell.ok("patch", "add", "cat", "--recipe", "safe one")[1]
    shell.ok("solve", "dog", "--base", "tiny")
    warning = shell.ok("patch", "add", "dog", "--recipe", "safe one")[1]
    assert "solved for different universes (1 for 2 concepts, 1 for 1 concept)" in warning
    assert "`overpaint recipe reseparate 'safe one'`" in warning
    assert "different universes" in shell.ok("recipe", "show", "safe one")[1]
    out, _ = shell.ok("recipe", "reseparate", "safe one")
    assert "1 patch re-separated for 2 concepts" in out
    assert "different universes" not in shell.ok("recipe", "show", "safe one")[1]
    assert "nothing to do" in shell.ok("recipe", "reseparate", "safe one")[0]
    lines = json.loads(shell.ok("recipe", "log", "safe one", "--json")[0])
    assert sorted(line["did"] for line in lines[2:]) == ["add", "remove"]
    assert {line["why"] for line in lines[2:]} == {"re-separated for 2 concepts"}
