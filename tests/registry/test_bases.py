"""One base under several names, moved and removed; which patch a name means; patches removed."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.registry.upkeep import collect, plan_collection, row_problems

from .contents import add_patch, lay

FINGERPRINT = "f" * 8
"""Of the base "small"."""


def test_a_base_that_moved_is_found_at_its_new_place(registry: Registry) -> None:
    add_patch(registry, "one")
    moved = registry.move_base("small", Path("/elsewhere"), FINGERPRINT)
    assert moved == registry.base("small")
    assert moved.source == Path("/elsewhere")


def test_another_base_is_not_taken_for_the_moved_one(registry: Registry) -> None:
    with pytest.raises(OverpaintError, match="its fingerprint is 0000, and ffffffff is needed"):
        registry.move_base("small", Path("/elsewhere"), "0000")
    assert registry.base("small").source == Path("/models/small")


def test_one_base_under_two_names_is_one_base(either: Registry) -> None:
    patch = add_patch(either, "one")
    either.add_base("again", Path("/elsewhere"), "sd1", FINGERPRINT)
    either.create_recipe("r", "again")
    lay(either, "r", patch.id, 1.0)
    assert either.patches(base="again") == either.patches(base="small") == [patch]
    assert either.patch("apple", base="again") == patch
    assert either.search("apple", base="again").patches == (patch,)
    assert [each.name for each in either.search(base="small").recipes] == ["r"]
    assert either.create_recipe("r", "small", exist_ok=True).base == "again"
    assert row_problems(either) == []


def test_removing_one_name_of_a_base_leaves_its_patches_to_the_other(either: Registry) -> None:
    patch = add_patch(either, "one")
    either.tag("good", patches=[patch.id], who="tester")
    either.create_recipe("r", "small")
    lay(either, "r", patch.id, 1.0)
    either.preserve_prompts("small", ["a red house"], who="tester")
    either.add_base("again", Path("/elsewhere"), "sd1", FINGERPRINT)
    either.remove_base("small")
    assert [base.name for base in either.bases()] == ["again"]
    assert (either.patch(patch.id).base, either.recipe("r").base) == ("again", "again")
    assert [each.prompt for each in either.preserved_prompts("again")] == ["a red house"]
    assert [each.id for each in either.search("again", tag="good").patches] == [patch.id]
    assert row_problems(either) == []


@pytest.mark.parametrize("need", ["patch", "recipe", "deleted recipe"])
def test_the_only_name_of_a_base_that_is_needed_stays(registry: Registry, need: str) -> None:
    if need == "patch":
        add_patch(registry, "one")
    else:
        registry.create_recipe("r", "small")
    if need == "deleted recipe":
        registry.delete_recipe("r", why="", who="tester")
    with pytest.raises(OverpaintError, match=r"needed by . patches and . recipes .*overpaint base move small"):
        registry.remove_base("small")
    assert registry.base("small")


def test_a_base_that_nothing_needs_is_removed_with_its_prompts(either: Registry) -> None:
    either.preserve_prompts("small", ["a red house"], who="tester")
    either.remove_base("small")
    assert either.bases() == []
    with pytest.raises(NotFound):
        either.remove_base("small")
    either.add_base("small", Path("/new"), "sd1", "0000")
    assert either.preserved_prompts("small") == []


def test_a_name_means_the_newest_patch_of_the_base_asked_for(registry: Registry) -> None:
    registry.add_base("large", Path("/large"), "sdxl", "e" * 8)
    registry.add_concept(Concept("plum"))
    small = add_patch(registry, "one")
    large = add_patch(registry, "two", base="large")
    assert registry.patch("apple") == large
    assert registry.patch("apple", base="small") == small
    assert registry.patch(large.id[:8], base="small") == large
    add_patch(registry, "three", base="large", concept="plum")
    with pytest.raises(NotFound, match="the concept 'plum' has no patch for the base 'small' yet"):
        registry.patch("plum", base="small")


def test_the_newest_patch_is_the_one_solved_last_not_the_one_added_last(either: Registry) -> None:
    now = datetime.now(timezone.utc)
    own = add_patch(either, "own")
    add_patch(either, "older", solved_at=now - timedelta(days=1))
    assert either.patch("apple") == own
    newer = add_patch(either, "newer", solved_at=now + timedelta(days=1))
    assert either.patch("apple") == newer
    assert newer.solved_at == now + timedelta(days=1)
    with pytest.raises(OverpaintError, match="the time of solving needs a time zone"):
        add_patch(either, "nowhere", solved_at=datetime(2026, 1, 1))


def test_a_removed_patch_is_gone_with_its_tags_and_its_bytes_are_garbage(either: Registry) -> None:
    patch, other = add_patch(either, "one"), add_patch(either, "two")
    either.tag("good", patches=[patch.id, other.id], who="tester")
    run: dict[str, Any] = {"digest": "d", "suite": "quick", "judge": "clip", "seed": 0, "settings": {}, "versions": {}}
    either.add_evaluation(patch=patch.id, seconds=1.0, who="tester", results=[], **run)
    assert either.remove_patch(patch.id[:12]).id == patch.id
    assert [each.id for each in either.patches()] == [other.id]
    assert either.search("apple").patches == (either.patch(other.id),)
    assert [each.name for each in either.tags("good")] == [other.id]
    assert row_problems(either) == []
    assert collect(either, plan_collection(either, grace=-60)).removed == 1
    with pytest.raises(NotFound):
        either.remove_patch(patch.id)
    assert add_patch(either, "one").id == patch.id


def test_a_patch_that_a_history_needs_stays(registry: Registry) -> None:
    patch = add_patch(registry, "one")
    registry.create_recipe("r", "small")
    lay(registry, "r", patch.id, 1.0)
    lay(registry, "r", patch.id, None)
    with pytest.raises(OverpaintError, match="the history of 'r' needs it"):
        registry.remove_patch("apple")
    registry.delete_recipe("r", why="", who="tester")
    with pytest.raises(OverpaintError, match="the history of 'r' needs it"):
        registry.remove_patch("apple")
    assert registry.patch(patch.id) == patch
