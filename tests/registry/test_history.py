"""What a recipe held at every revision can be read, compared and laid on again, also after the recipe is gone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import Registry, history
from overpaint.registry.history import Note, StaleRevision
from overpaint.registry.records import ExpiredEntry, RecipeEntry

from .contents import add_patch, lay

NOTE = Note("a test", "tester")
CHRISTMAS = date(2998, 12, 24)


@pytest.fixture
def registry(either: Registry) -> Registry:
    """Everything here holds on SQLite and on PostgreSQL."""
    return either


# Earlier revisions


def test_every_revision_can_be_read(registry: Registry, patches: list[str]) -> None:
    one, two, three = patches
    for patch_id, strength in ((two, 1.0), (one, 0.5), (two, None), (one, 2.0), (three, 1.0)):
        lay(registry, "r", patch_id, strength)
    held = [registry.recipe(f"r@{number}").patches for number in range(6)]
    assert held == [
        (),
        ((two, 1.0),),
        ((one, 0.5), (two, 1.0)),
        ((one, 0.5),),
        ((one, 2.0),),
        ((one, 2.0), (three, 1.0)),
    ]
    assert registry.recipe("r") == registry.recipe("r@5")
    assert [laid for _, laid in registry.patches_on("r@2")] == [RecipeEntry(one, 0.5), RecipeEntry(two, 1.0)]


def test_a_checkout_restores_the_exact_entries_as_one_new_revision(registry: Registry, patches: list[str]) -> None:
    one, two, three = patches
    lay(registry, "r", one, 0.5, until=CHRISTMAS, digests=(None, "d1"))
    lay(registry, "r", two, 1.0, digests=(None, "d2"))
    lay(registry, "r", one, None)
    lay(registry, "r", two, 3.0)
    lay(registry, "r", three, 1.0)
    assert registry.checkout_recipe("r", 2, Note("licence", "Ada", "d5", "d2")) == 6
    assert (
        registry.recipe("r").entries
        == registry.recipe("r@2").entries
        == (RecipeEntry(one, 0.5, CHRISTMAS), RecipeEntry(two, 1.0))
    )
    lines = registry.log("r", revision=6)
    assert [(line.patch, line.strength_before, line.strength_after, line.until_after) for line in lines] == [
        (one, None, 0.5, CHRISTMAS),
        (two, 3.0, 1.0, None),
        (three, 1.0, None, None),
    ]
    assert {
        (line.action, line.source, line.who, line.why, line.digest_before, line.digest_after) for line in lines
    } == {("checkout", "r@2", "Ada", "licence", "d5", "d2")}
    assert registry.recipe("r@5").patches == ((two, 3.0), (three, 1.0)), "the past is as it was"


def test_revision_nought_is_the_base(registry: Registry, patches: list[str]) -> None:
    assert registry.recipe("r").digest == registry.base("small").fingerprint
    lay(registry, "r", patches[0], 1.0)
    registry.checkout_recipe("r", 0, NOTE)
    assert registry.recipe("r").patches == registry.recipe("r@0").patches == ()


def test_a_checkout_of_what_is_there_and_of_what_never_was_is_refused(registry: Registry, patches: list[str]) -> None:
    lay(registry, "r", patches[0], 1.0)
    lay(registry, "r", patches[0], None)
    with pytest.raises(AlreadyExists, match="holds what it held at revision 0"):
        registry.checkout_recipe("r", 0, NOTE)
    with pytest.raises(NotFound, match="no revision 7; its newest is 2"):
        registry.checkout_recipe("r", 7, NOTE)
    assert len(registry.log("r")) == 2


def test_a_change_worked_out_for_an_older_revision_is_refused(registry: Registry, patches: list[str]) -> None:
    lay(registry, "r", patches[0], 1.0)
    with pytest.raises(StaleRevision, match="by now, and this change was made from"):
        lay(registry, "r", patches[1], 1.0, expected=0)
    with pytest.raises(StaleRevision, match="by now, and this change was made from"):
        registry.checkout_recipe("r", 0, NOTE, expected=0)
    assert registry.recipe("r").revision == 1
    assert lay(registry, "r", patches[1], 1.0, expected=1) == 2


STEPS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, 0.0, 0.5, 1.0]), st.booleans()), max_size=8)


@given(steps=STEPS, back=st.integers(0, 8))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_was_done_every_revision_is_read_and_checked_out_exactly(
    stocked_once: Registry, steps: list[tuple[int, float | None, bool]], back: int
) -> None:
    registry = stocked_once
    ids = [patch.id for patch in registry.patches()]
    name = f"recipe {len(registry.recipes())}"
    registry.create_recipe(name, "small")
    held: dict[str, RecipeEntry] = {}
    expected = [dict(held)]
    for index, strength, lapses in steps:
        after = None if strength is None else RecipeEntry(ids[index], strength, CHRISTMAS if lapses else None)
        if held.get(ids[index]) == after:
            continue
        lay(registry, name, ids[index], strength, until=after.until if after else None)
        held = {**held, ids[index]: after} if after else {each: held[each] for each in held if each != ids[index]}
        expected.append(dict(held))
    for number, state in enumerate(expected):
        assert registry.recipe(f"{name}@{number}").entries == tuple(state[each] for each in sorted(state))
    back = min(back, len(expected) - 1)
    if expected[back] != held:
        registry.checkout_recipe(name, back, NOTE)
    assert registry.recipe(name).entries == registry.recipe(f"{name}@{back}").entries


@pytest.fixture(scope="module")
def stocked_once(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    from .contents import stock

    registry = stock(Registry.open(tmp_path_factory.mktemp("once")))
    for label in ("one", "two", "three", "four"):
        add_patch(registry, label)
    return registry


def test_a_revision_that_is_not_there_is_named(registry: Registry, patches: list[str]) -> None:
    lay(registry, "r", patches[0], 1.0)
    for mark in ("4", "x", "-1", "1.0", " ", "", "safe", "9" * 390):
        with pytest.raises(NotFound):
            registry.recipe(f"r@{mark}")


def test_a_name_with_an_at_sign_goes_before_a_revision(registry: Registry, patches: list[str]) -> None:
    registry.create_recipe("s@1", "small")
    registry.create_recipe("s", "small")
    lay(registry, "s", patches[0], 1.0)
    assert registry.recipe("s@1").name == "s@1"
    assert registry.recipe("s@1@0").name == "s@1"
    assert registry.recipe("s@01").patches == ((patches[0], 1.0),)


def test_a_name_that_would_mean_a_revision_is_refused(registry: Registry, patches: list[str]) -> None:
    makers: list[Callable[[str], object]] = [
        lambda name: registry.create_recipe(name, "small"),
        lambda name: registry.create_recipe(name, "small", exist_ok=True),
        lambda name: registry.copy_recipe("r", name, why="", who=""),
    ]
    for make in makers:
        with pytest.raises(OverpaintError, match=r"'r@3' means the recipe 'r' at revision '3'"):
            make("r@3")
    assert [recipe.name for recipe in registry.recipes()] == ["r"]
    assert registry.create_recipe("who@where", "small").name == "who@where"


# Differences


def test_a_diff_lists_what_differs_and_nothing_else(registry: Registry, patches: list[str]) -> None:
    one, two, three = patches
    registry.create_recipe("other", "small")
    lay(registry, "r", one, 1.0)
    lay(registry, "r", two, 1.0, until=CHRISTMAS)
    lay(registry, "other", one, 1.0)
    lay(registry, "other", two, 1.0)
    lay(registry, "other", three, 0.5)
    found = {each.patch: (each.before, each.after) for each in registry.diff("r", "other")}
    assert found == {
        two: (RecipeEntry(two, 1.0, CHRISTMAS), RecipeEntry(two, 1.0)),
        three: (None, RecipeEntry(three, 0.5)),
    }
    assert {each.patch: (each.after, each.before) for each in registry.diff("other", "r")} == found
    assert registry.diff("r", "r@2") == registry.diff("r@0", "other@0") == []
    assert [each.concept for each in registry.diff("r@0", "r@1")] == ["apple"]


# Copies, deleted recipes


def test_a_copy_holds_the_same_and_goes_its_own_way(registry: Registry, patches: list[str]) -> None:
    lay(registry, "r", patches[0], 0.5, until=CHRISTMAS, digests=(None, "d1"))
    lay(registry, "r", patches[1], 1.0, digests=(None, "d2"))
    copy = registry.copy_recipe("r", "copy", why="for Bob", who="Ada")
    assert copy.entries == registry.recipe("r").entries
    assert (copy.base, copy.digest, copy.revision) == ("small", "d2", 1)
    assert registry.copy_recipe("r@1", "early", why="", who="").digest == "d1"
    lay(registry, "copy", patches[0], None)
    assert registry.recipe("r").entries == copy.entries
    (first, *_) = registry.log("copy", revision=1)
    assert (first.action, first.source, first.who, first.why) == ("copy", "r@2", "Ada", "for Bob")
    assert (first.digest_before, first.digest_after) == (registry.base("small").fingerprint, "d2")
    with pytest.raises(AlreadyExists, match="'copy' is there already"):
        registry.copy_recipe("r", "copy", why="", who="")
    with pytest.raises(NotFound):
        registry.copy_recipe("q", "another", why="", who="")


def test_a_deleted_recipe_keeps_its_history_and_gives_up_its_name(registry: Registry, patches: list[str]) -> None:
    lay(registry, "r", patches[0], 1.0, digests=(None, "d1"))
    registry.delete_recipe("r", why="obsolete", who="Ada")
    assert registry.recipes() == []
    for read in (registry.recipe, registry.log, registry.patches_on):
        with pytest.raises(NotFound, match="no recipe"):
            read("r")
    with pytest.raises(NotFound):
        lay(registry, "r", patches[1], 1.0)
    lines = registry.log("r", deleted=True)
    assert [(line.action, line.patch, line.who, line.why) for line in lines] == [
        ("add", patches[0], "tester", "a test"),
        ("delete", None, "Ada", "obsolete"),
    ]
    assert (lines[1].digest_before, lines[1].digest_after) == ("d1", "d1")
    registry.create_recipe("r", "small")
    assert registry.log("r") == []
    assert registry.recipe("r").entries == ()
    assert [(recipe.name, recipe.patches) for recipe in registry.recipes(deleted=True)] == [("r", ((patches[0], 1.0),))]
    registry.delete_recipe("r", why="", who="Bob")
    assert [line.who for line in registry.log("r", deleted=True)] == ["tester", "Ada", "Bob"]


def test_the_recipe_deleted_last_comes_back_as_it_was(registry: Registry, patches: list[str]) -> None:
    registry.delete_recipe("r", why="", who="")
    registry.create_recipe("r", "small")
    lay(registry, "r", patches[0], 1.0, digests=(None, "d1"))
    before = registry.recipe("r")
    registry.delete_recipe("r", why="", who="")
    after = registry.undelete_recipe("r", why="a mistake", who="Bob")
    assert (after.entries, after.digest, after.revision) == (before.entries, "d1", 3)
    assert registry.log("r")[-1].action == "undelete"
    with pytest.raises(AlreadyExists):
        registry.undelete_recipe("r", why="", who="")
    registry.delete_recipe("r", why="", who="")
    with pytest.raises(NotFound, match="recipe list --deleted"):
        registry.undelete_recipe("q", why="", who="")


# Days


def test_a_patch_lapses_when_its_day_comes_and_stays_until_it_is_removed(
    registry: Registry, patches: list[str]
) -> None:
    one, two, three = patches
    lay(registry, "r", one, 1.0, until=date(2999, 1, 31))
    lay(registry, "r", two, 1.0, until=CHRISTMAS)
    lay(registry, "r", three, 1.0)
    assert registry.due(date(2998, 12, 23)) == []
    assert registry.due(CHRISTMAS) == [ExpiredEntry("r", "apple", two, CHRISTMAS)]
    assert [due.patch for due in registry.due(date(3030, 1, 1))] == [two, one]
    assert len(registry.recipe("r").entries) == 3
    lay(registry, "r", two, None)
    assert registry.due(CHRISTMAS) == []


def test_due_is_asked_of_one_recipe_or_of_all_that_are_there(registry: Registry, patches: list[str]) -> None:
    lay(registry, "r", patches[0], 1.0, until=CHRISTMAS)
    registry.copy_recipe("r", "copy", why="", who="")
    assert [due.recipe for due in registry.due(CHRISTMAS)] == ["copy", "r"]
    assert [due.recipe for due in registry.due(CHRISTMAS, recipe="r")] == ["r"]
    registry.delete_recipe("r", why="", who="")
    assert [due.recipe for due in registry.due(CHRISTMAS)] == ["copy"]
    with pytest.raises(NotFound):
        registry.due(CHRISTMAS, recipe="r")


def test_another_day_is_a_change_of_its_own(registry: Registry, patches: list[str]) -> None:
    lay(registry, "r", patches[0], 1.0)
    lay(registry, "r", patches[0], 1.0, until=CHRISTMAS)
    with pytest.raises(AlreadyExists, match=r"strength 1, expires 2998-12-24"):
        lay(registry, "r", patches[0], 1.0, until=CHRISTMAS)
    lay(registry, "r", patches[0], 2.0, until=CHRISTMAS)
    lay(registry, "r", patches[0], 2.0)
    assert [(line.action, line.until_before, line.until_after) for line in registry.log("r")] == [
        ("add", None, None),
        ("until", None, CHRISTMAS),
        ("strength", CHRISTMAS, CHRISTMAS),
        ("until", CHRISTMAS, None),
    ]


def test_the_recipes_with_a_patch_are_listed(registry: Registry, patches: list[str]) -> None:
    lay(registry, "r", patches[0], 0.5, until=CHRISTMAS)
    registry.copy_recipe("r", "copy", why="", who="")
    registry.create_recipe("gone", "small")
    lay(registry, "gone", patches[0], 1.0)
    registry.delete_recipe("gone", why="", who="")
    laid = RecipeEntry(patches[0], 0.5, CHRISTMAS)
    assert registry.recipes_with(patches[0]) == [("r", laid), ("copy", laid)]
    assert registry.recipes_with(patches[1]) == []


def test_a_reason_or_a_name_that_does_not_print_undoes_everything(registry: Registry, patches: list[str]) -> None:
    lay(registry, "r", patches[0], 1.0)
    for text in ("\x1b[2J", "\udcff", "x" * 10_001):
        for attempt in (
            lambda text: registry.checkout_recipe("r", 0, Note(text, "")),
            lambda text: registry.copy_recipe("r", "copy", why=text, who=""),
            lambda text: registry.copy_recipe("r", text, why="", who=""),
            lambda text: registry.delete_recipe("r", why="", who=text),
        ):
            with pytest.raises(OverpaintError):
                attempt(text)
    assert [(recipe.name, recipe.revision) for recipe in registry.recipes()] == [("r", 1)]
    assert registry.recipe("r").patches == ((patches[0], 1.0),)


def test_an_expiry_that_is_past_is_refused_where_it_is_new_and_stays_where_it_is(
    registry: Registry, patches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, _ = patches
    lay(registry, "r", one, 1.0, until=CHRISTMAS)
    monkeypatch.setattr(history, "today", lambda: CHRISTMAS + timedelta(days=1))
    for patch in (one, two):
        with pytest.raises(OverpaintError, match=r"cannot expire on 2998-12-23, which is past: today is 2998-12-25"):
            lay(registry, "r", patch, 1.0, until=CHRISTMAS - timedelta(days=1))
    with pytest.raises(OverpaintError, match="which is past"):
        registry.check_entries("r", "small", [RecipeEntry(two, 1.0, CHRISTMAS)])
    lay(registry, "r", one, 2.0, until=CHRISTMAS)
    lay(registry, "r", two, 1.0, until=CHRISTMAS + timedelta(days=1))
    registry.copy_recipe("r", "copy", why="", who="")
    assert [each.patch for each in registry.due(CHRISTMAS, recipe="copy")] == [one]


@pytest.mark.parametrize("day", ["2999-01-31", datetime(2999, 1, 31), 7])
def test_an_expiry_that_is_no_day_is_refused(registry: Registry, patches: list[str], day: Any) -> None:
    with pytest.raises(OverpaintError, match="a patch expires on a day"):
        lay(registry, "r", patches[0], 1.0, until=day)


def test_a_strength_far_beyond_any_use_is_refused(registry: Registry, patches: list[str]) -> None:
    for strength in (1e308, -1e7):
        with pytest.raises(OverpaintError, match="a strength is at most 1,000,000"):
            lay(registry, "r", patches[0], strength)
    lay(registry, "r", patches[0], -1e6)
