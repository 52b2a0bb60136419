"""Tags on patches and recipes."""

from __future__ import annotations

import pytest

from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import Registry

from .contents import add_patch, lay


@pytest.fixture
def registry(either: Registry) -> Registry:
    """Everything here holds on SQLite and on PostgreSQL."""
    either.create_recipe("r", "small")
    return either


def test_a_tag_is_on_what_it_was_tied_to(registry: Registry) -> None:
    one, two = add_patch(registry, "one"), add_patch(registry, "two")
    lay(registry, "r", one.id, 1.0)
    registry.tag("safe-2026-11", patches=[one.id], recipes=["r"], who="Ada")
    registry.tag("Reviewed", patches=[one.id[:8], two.id], who="Bob")
    assert [(each.tag, each.on, each.name, each.revision, each.who) for each in registry.tags()] == [
        ("reviewed", "patch", one.id, None, "Bob"),
        ("reviewed", "patch", two.id, None, "Bob"),
        ("safe-2026-11", "recipe", "r", 1, "Ada"),
        ("safe-2026-11", "patch", one.id, None, "Ada"),
    ]
    assert [each.name for each in registry.tags("REVIEWED")] == [one.id, two.id]
    assert registry.patch(one.id).tags == ("reviewed", "safe-2026-11")
    assert registry.patches(tag="safe-2026-11") == [registry.patch(one.id)]
    assert registry.count_patches(tag="reviewed") == 2
    assert registry.recipe("r").tags == (("safe-2026-11", 1),)


def test_a_tag_marks_the_revision_that_the_recipe_had(registry: Registry) -> None:
    one, two = add_patch(registry, "one"), add_patch(registry, "two")
    lay(registry, "r", one.id, 1.0)
    registry.tag("good", recipes=["r"], who="")
    lay(registry, "r", two.id, 1.0)
    registry.tag("first", recipes=["r@0"], who="")
    assert registry.recipe("r@GOOD").patches == ((one.id, 1.0),)
    assert registry.recipe("r@first").patches == ()
    assert [each.patch for each in registry.diff("r@good", "r")] == [two.id]


def test_a_tag_is_taken_off_again(registry: Registry) -> None:
    patch = add_patch(registry, "one")
    registry.tag("t", patches=[patch.id], recipes=["r"], who="")
    registry.untag("T", patches=[patch.id], recipes=["r"])
    assert registry.tags() == []
    assert registry.patch(patch.id) == patch
    found = registry.search(tag="t")
    assert not found.patches
    assert not found.recipes
    for missing in ({"patches": [patch.id]}, {"recipes": ["r"]}):
        with pytest.raises(NotFound, match="does not have the tag 't'"):
            registry.untag("t", **missing)


def test_all_are_tagged_or_none(registry: Registry) -> None:
    patch = add_patch(registry, "one")
    with pytest.raises(NotFound):
        registry.tag("t", patches=[patch.id, "nobody"], recipes=["r"], who="")
    assert registry.tags() == []
    registry.tag("t", patches=[patch.id], who="")
    with pytest.raises(NotFound):
        registry.untag("t", patches=[patch.id], recipes=["nobody"])
    with pytest.raises(AlreadyExists, match="has the tag 't' already"):
        registry.tag("t", recipes=["r"], patches=[patch.id], who="")
    assert [each.on for each in registry.tags()] == ["patch"]
    registry.tag("t", recipes=["r"], who="")
    with pytest.raises(AlreadyExists, match="already, at revision 0; remove it there first"):
        registry.tag("t", recipes=["r"], who="")


NO_TAGS = ["", " ", "3", "٣", "a@b", "a\nb", "\udcff", "\x1f", "x" * 401, "x" * 1_000_000]


def test_what_could_be_taken_for_something_else_is_no_tag(registry: Registry) -> None:
    for tag in NO_TAGS:
        with pytest.raises(OverpaintError):
            registry.tag(tag, recipes=["r"], who="")
    assert registry.tags() == []


def test_a_tag_needs_something_to_be_on(registry: Registry) -> None:
    with pytest.raises(OverpaintError, match="name a patch or a recipe"):
        registry.tag("t", who="")


def test_a_deleted_recipe_is_not_among_what_carries_a_tag(registry: Registry) -> None:
    registry.tag("t", recipes=["r"], who="")
    registry.delete_recipe("r", why="", who="")
    assert registry.tags("t") == []
    assert registry.undelete_recipe("r", why="", who="").tags == (("t", 0),)
