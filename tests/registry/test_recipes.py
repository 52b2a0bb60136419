"""Recipes change one patch at a time, and every change leaves a line."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest

from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import Registry

from .contents import add_patch, digest_of, lay


@pytest.fixture
def registry(either: Registry) -> Registry:
    """Everything here holds on SQLite and on PostgreSQL."""
    return either


def test_patches_of_a_recipe_are_sorted_whatever_the_order_they_came_in(registry: Registry, patches: list[str]) -> None:
    for patch_id in reversed(patches):
        lay(registry, "r", patch_id, 1.0)
    assert registry.recipe("r").patches == tuple((patch_id, 1.0) for patch_id in patches)
    assert registry.recipes() == [registry.recipe("r")]


def test_what_is_added_can_be_taken_out_and_added_again(registry: Registry, patches: list[str]) -> None:
    assert [lay(registry, "r", patches[0], strength) for strength in (1.0, None, 0.5)] == [1, 2, 3]
    assert registry.recipe("r").patches == ((patches[0], 0.5),)


def test_history_lists_every_change_in_order(registry: Registry, patches: list[str]) -> None:
    started = datetime.now(timezone.utc)
    changes = [(0, 1.0), (1, 0.5), (0, 2), (0, None)]
    for revision, (index, strength) in enumerate(changes, 1):
        digests = (None if revision == 1 else f"d{revision - 1}", f"d{revision}")
        why = f"reason {revision}\nin two lines"
        lay(registry, "r", patches[index], strength, why, who="Ada", digests=digests)
    log = registry.log("r")
    assert [line.revision for line in log] == [1, 2, 3, 4]
    assert [line.action for line in log] == ["add", "add", "strength", "remove"]
    assert [line.patch for line in log] == [patches[index] for index, _ in changes]
    assert [(line.strength_before, line.strength_after) for line in log] == [
        (None, 1.0),
        (None, 0.5),
        (1.0, 2.0),
        (2.0, None),
    ]
    assert [(line.digest_before, line.digest_after) for line in log] == [
        (None, "d1"),
        ("d1", "d2"),
        ("d2", "d3"),
        ("d3", "d4"),
    ]
    assert (log[0].recipe, log[0].concept, log[0].who, log[0].why) == ("r", "apple", "Ada", "reason 1\nin two lines")
    assert started <= log[0].at <= log[-1].at <= datetime.now(timezone.utc)


def test_revisions_count_within_a_recipe(registry: Registry, patches: list[str]) -> None:
    registry.create_recipe("other", "small")
    assert [lay(registry, recipe, patches[0], 1.0) for recipe in ("r", "other")] == [1, 1]


def test_pointless_changes_are_refused_and_leave_no_line(registry: Registry, patches: list[str]) -> None:
    lay(registry, "r", patches[0], 1.0)
    with pytest.raises(AlreadyExists, match="already there"):
        lay(registry, "r", patches[0], 1)
    with pytest.raises(NotFound, match="does not contain"):
        lay(registry, "r", patches[1], None)
    assert len(registry.log("r")) == 1


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf")])
def test_a_strength_is_finite(registry: Registry, patches: list[str], strength: float) -> None:
    with pytest.raises(OverpaintError, match="finite"):
        lay(registry, "r", patches[0], strength)
    assert registry.recipe("r").patches == ()


def test_a_patch_of_another_base_is_refused_with_both_named(registry: Registry, patches: list[str]) -> None:
    registry.add_base("large", Path("/models/large"), "sdxl", "eeee")
    foreign = add_patch(registry, "foreign", base="large")
    with pytest.raises(OverpaintError, match=r"'large' \(eeee\).*'small' \(ffffffff\)"):
        lay(registry, "r", foreign.id, 1.0)
    assert registry.log("r") == []


def test_unknown_recipes_and_patches_are_named(registry: Registry, patches: list[str]) -> None:
    with pytest.raises(NotFound, match="'q'"):
        lay(registry, "q", patches[0], 1.0)
    with pytest.raises(NotFound, match=digest_of("nobody")):
        lay(registry, "r", digest_of("nobody"), 1.0)


def test_a_change_whose_line_cannot_be_written_does_not_happen(registry: Registry, patches: list[str]) -> None:
    with pytest.raises(OverpaintError, match="does not print"):
        lay(registry, "r", patches[0], 1.0, why="\x1b[2J")
    assert registry.recipe("r").patches == ()
