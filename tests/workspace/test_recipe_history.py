"""A recipe's history through the facade: every revision can be composed again, and its digest shows it."""

from __future__ import annotations

import getpass
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import NoReturn

import pytest

import overpaint
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.workspace.recipe import Recipe, current_user
from overpaint.workspace.workspace import Workspace

TODAY = datetime.now(timezone.utc).date()


@pytest.fixture
def recipe(workspace: Workspace) -> Recipe:
    """Cat on, dog on, cat stronger, cat off: revisions 1 to 4."""
    recipe = workspace.create_recipe("safe", exist_ok=True)
    recipe.add("cat")
    recipe.add("dog", why="takedown")
    recipe.add("cat", 0.5)
    recipe.remove("cat")
    return recipe


def test_a_checkout_gives_the_very_weights_of_the_revision(workspace: Workspace, recipe: Recipe) -> None:
    digests = [workspace.base("tiny").fingerprint, *(line.digest_after for line in recipe.log())]
    for revision in (2, 0, 3, 1, 4):
        lines = recipe.checkout(revision, why="looking back", who="Ada")
        assert {(line.source, line.why, line.who) for line in lines} == {(f"safe@{revision}", "looking back", "Ada")}
        assert recipe.digest() == lines[0].digest_after == digests[revision]
        assert workspace.recipe(f"safe@{revision}").digest() == digests[revision]
    assert [line.revision for line in recipe.log()][-1] == 9
    with pytest.raises(AlreadyExists):
        recipe.checkout(9)


def test_a_tag_is_as_good_as_a_number(workspace: Workspace, recipe: Recipe) -> None:
    digest = recipe.digest()
    assert recipe.tag("safe-2026-11").revision == 4
    recipe.add("fox")
    assert workspace.recipe("safe@safe-2026-11").digest() == digest
    recipe.checkout("safe-2026-11")
    assert recipe.digest() == digest
    assert [found.concept for found in recipe.diff("safe@5")] == ["fox"]
    recipe.untag("safe-2026-11")
    with pytest.raises(NotFound, match="no revision 'safe-2026-11'"):
        recipe.checkout("safe-2026-11")


def test_an_earlier_revision_can_be_built_but_not_changed(workspace: Workspace, recipe: Recipe, tmp_path: Path) -> None:
    built = workspace.recipe("safe@2").build(tmp_path / "out")
    assert built.digest == recipe.log()[1].digest_after
    before = len(recipe.log())
    then = workspace.recipe("safe@2")
    attempts: list[Callable[[], object]] = [lambda: then.add("fox"), lambda: then.remove("dog"), then.delete]
    for attempt in attempts:
        with pytest.raises(NotFound, match="'safe@2'"):
            attempt()
    with pytest.raises(OverpaintError, match="'safe@2' means the recipe 'safe' at revision '2'"):
        workspace.create_recipe("safe@2")
    assert len(recipe.log()) == before
    assert [record.name for record in workspace.recipes()] == ["safe"]


def test_what_an_earlier_revision_holds_already_is_no_change_of_the_recipe(
    workspace: Workspace, recipe: Recipe
) -> None:
    """Or whoever names a revision would believe that the recipe itself has the patch."""
    earlier, before = workspace.recipe("safe@1"), recipe.record
    changes: list[Callable[[], object]] = [
        lambda: earlier.add("cat", exist_ok=True),
        lambda: earlier.hold(earlier.record.entries),
        lambda: earlier.set_patches({"cat": 1.0}),
    ]
    for change in changes:
        with pytest.raises(NotFound, match="'safe@1' is recipe 'safe' as it was then and cannot be changed"):
            change()
    assert recipe.record == before


def test_a_build_with_another_digest_than_the_history_is_noticed(
    workspace: Workspace, recipe: Recipe, tmp_path: Path
) -> None:
    told: list[str] = []
    built = recipe.build(tmp_path / "true", warn=told.append)
    assert told == []
    with closing(sqlite3.connect(tmp_path / "registry/registry.db")) as database, database:
        database.execute("UPDATE revision SET digest_after = ?", ["0" * 64])
    assert recipe.build(tmp_path / "false", warn=told.append).digest == built.digest
    assert [f"{built.digest[:12]}, and the recipe's history says 000000000000" in text for text in told] == [True]


def test_a_checkout_whose_patch_is_damaged_changes_nothing(
    workspace: Workspace, recipe: Recipe, tmp_path: Path
) -> None:
    for path in (tmp_path / "registry" / "blobs").rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            path.write_bytes(b"not what it was")
    again = overpaint.open(tmp_path / "registry").recipe("safe")
    with pytest.raises(OverpaintError):
        again.checkout(2)
    assert again.record.revision == 4


def test_a_copy_has_the_same_weights_and_a_history_of_its_own(workspace: Workspace, recipe: Recipe) -> None:
    copy = recipe.copy("for Bob", why="he asked")
    assert copy.digest() == copy.record.digest == recipe.digest()
    copy.remove("dog")
    assert [line.action for line in copy.log()] == ["copy", "remove"]
    assert recipe.digest() != copy.digest() == workspace.base("tiny").fingerprint
    assert workspace.recipe("safe@1").copy("early").digest() == recipe.log()[0].digest_after


def test_a_deleted_recipe_comes_back_with_its_weights(workspace: Workspace, recipe: Recipe) -> None:
    digest = recipe.digest()
    recipe.delete(why="obsolete")
    with pytest.raises(NotFound):
        workspace.recipe("safe")
    assert workspace.create_recipe("safe").digest() == workspace.base("tiny").fingerprint, "the name is free again"
    workspace.recipe("safe").delete()
    assert workspace.undelete_recipe("safe").digest() == workspace.base("tiny").fingerprint
    workspace.recipe("safe").copy("kept").delete()
    workspace.recipe("safe").delete()
    assert [found.name for found in workspace.registry.recipes(deleted=True)] == ["safe", "safe", "kept"]
    assert {line.digest_after for line in workspace.registry.log("safe", deleted=True) if line.action == "delete"} == {
        digest,
        workspace.base("tiny").fingerprint,
    }


def test_an_expiry_stays_when_the_strength_changes_and_can_be_cleared(workspace: Workspace, recipe: Recipe) -> None:
    line = recipe.add("fox", until=date(2999, 1, 31))
    assert (line.action, line.until_after) == ("add", date(2999, 1, 31))
    assert recipe.add("fox", 2.0).until_after == date(2999, 1, 31)
    line = recipe.add("fox", 2.0, until="never")
    assert (line.action, line.until_before, line.until_after) == ("until", date(2999, 1, 31), None)
    assert line.digest_before == line.digest_after
    with pytest.raises(AlreadyExists):
        recipe.add("fox", 2.0, until="never")


def test_what_has_lapsed_is_listed_and_stays(workspace: Workspace, recipe: Recipe) -> None:
    recipe.add("fox", until=TODAY)
    recipe.add("cat", until=TODAY + timedelta(days=7))
    digest = recipe.digest()
    assert [due.concept for due in recipe.due()] == [due.concept for due in workspace.due()] == ["fox"]
    assert [due.concept for due in workspace.due(TODAY + timedelta(days=7))] == ["fox", "cat"]
    assert recipe.digest() == digest


def test_patches_and_recipes_are_tagged_and_searched_together(workspace: Workspace, recipe: Recipe) -> None:
    tagged = workspace.registry.tag("reviewed", patches=["cat"], recipes=["safe"], who="Ada")
    assert [tag.who for tag in tagged] == ["Ada", "Ada"]
    found = workspace.registry.search(tag="reviewed")
    assert [patch.concept for patch in found.patches] == ["cat"]
    assert [each.name for each in found.recipes] == ["safe"]
    assert [each.name for each in workspace.registry.search("takedown").recipes] == ["safe"]
    workspace.registry.untag("reviewed", patches=["cat"])
    assert workspace.registry.search(tag="reviewed").patches == ()
    assert [patch.concept for patch in workspace.patches(solver="separable", limit=2)] == ["cat", "dog"]


def test_a_user_without_a_name_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> NoReturn:
        raise KeyError("uid not found")

    assert current_user() == getpass.getuser()
    monkeypatch.setattr(getpass, "getuser", nobody)
    assert current_user() == str(os.getuid())
