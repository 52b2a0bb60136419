"""Re-separation: after it a recipe holds what it would hold had all concepts been known from the start."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

import overpaint
from overpaint.core.errors import OverpaintError
from overpaint.patches.compose import compose
from overpaint.registry.sharing.documents import read_record, record_of
from overpaint.registry.upkeep import verify
from overpaint.solvers.closed_form.separable import Separable
from overpaint.solvers.problem import chosen_settings, settings_of
from overpaint.workspace.reseparation import NotReseparable, universes
from overpaint.workspace.workspace import Workspace
from tests.shell import Shell


def grown(workspace: Workspace) -> None:
    """A recipe with a cat from when nothing else was known, and a dog from when the cat was; then the sun joins."""
    recipe = workspace.create_recipe("safe", exist_ok=True)
    recipe.add(workspace.solve("cat", base="tiny", device="cpu"), 0.5, why="first", until=date(2030, 1, 31))
    recipe.add(workspace.solve("dog", base="tiny", device="cpu"), why="second")
    workspace.add_concept("sun")


def test_afterwards_everything_is_as_if_solved_together(
    workspace: Workspace, tmp_path: Path, base_folder: Path
) -> None:
    grown(workspace)
    done = workspace.recipe("safe").reseparate(device="cpu")
    assert done.concepts == 3
    fresh = overpaint.open(tmp_path / "fresh")
    fresh.add_base("tiny", base_folder)
    for name in ("cat", "dog", "sun"):
        fresh.add_concept(name)
    wanted = {name: fresh.solve(name, base="tiny", device="cpu").id for name in ("cat", "dog")}
    assert {patch.concept: patch.id for patch, _ in workspace.recipe("safe").patches()} == wanted
    assert verify(workspace.registry).problems == ()


def test_defaults_of_an_earlier_revision_become_those_of_today(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"reach": 1.5, "style_reach": 3.0, "rank": 1}
    with monkeypatch.context() as then:
        then.setattr(Separable, "revision", 2)
        workspace.create_recipe("safe").add(workspace.solve("cat", base="tiny", device="cpu", settings=settings))
    workspace.recipe("safe").reseparate(device="cpu")
    ((patch, _),) = workspace.recipe("safe").patches()
    assert patch.settings == settings_of(Separable(rank=1)), "what was chosen stays chosen"
    assert chosen_settings(Separable, settings, 3) == settings, "since then the same values are somebody's choice"


def test_it_is_one_revision_and_keeps_strengths_and_expiry(workspace: Workspace) -> None:
    grown(workspace)
    recipe = workspace.create_recipe("safe", exist_ok=True)
    before, digest = recipe.record, recipe.digest()
    done = workspace.recipe("safe").reseparate(device="cpu")
    after = recipe.record
    assert after.revision == before.revision + 1
    assert sorted((patch.concept, strength) for patch, strength in recipe.patches()) == [("cat", 0.5), ("dog", 1.0)]
    assert (
        {each.until for each in after.entries} == {each.until for each in before.entries} == {date(2030, 1, 31), None}
    )
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


def test_the_new_revision_travels(workspace: Workspace) -> None:
    grown(workspace)
    workspace.recipe("safe").reseparate(device="cpu")
    record = record_of(workspace.registry, "safe")
    assert read_record(record.raw) == record


def test_a_second_time_there_is_nothing_to_do(workspace: Workspace) -> None:
    grown(workspace)
    workspace.recipe("safe").reseparate(device="cpu")
    revision, patches = workspace.recipe("safe").record.revision, len(workspace.patches())
    assert workspace.recipe("safe").reseparate(device="cpu").lines == []
    assert (workspace.recipe("safe").record.revision, len(workspace.patches())) == (revision, patches)


def test_settings_seed_and_compression_come_along(workspace: Workspace) -> None:
    old = workspace.solve("cat", base="tiny", settings={"rank": "3"}, seed=7, compress="2", device="cpu")
    workspace.create_recipe("safe", exist_ok=True).add(old)
    workspace.add_concept("sun")
    workspace.recipe("safe").reseparate(device="cpu")
    ((new, _),) = workspace.recipe("safe").patches()
    assert new.id != old.id
    assert (new.settings, new.seed) == (old.record.settings, 7)
    again = workspace.solve("cat", base="tiny", settings={"rank": "3"}, seed=7, compress="2", device="cpu")
    assert new.id == again.id


def test_what_needs_training_stays_and_is_named(workspace: Workspace) -> None:
    workspace.create_recipe("safe", exist_ok=True).add(
        workspace.solve("cat", base="tiny", solver="counting", device="cpu")
    )
    assert workspace.recipe("safe").reseparate(device="cpu").left == ()
    workspace.create_recipe("safe", exist_ok=True).add(workspace.solve("dog", base="tiny", device="cpu"))
    workspace.add_concept("sun")
    done = workspace.recipe("safe").reseparate(device="cpu")
    assert [(record.concept, record.solver) for record in done.left] == [("cat", "counting")]
    assert [line.concept for line in done.lines] == ["dog", "dog"]


def test_a_concept_that_cannot_be_solved_any_more_leaves_the_recipe_as_it_was(workspace: Workspace) -> None:
    grown(workspace)
    before = workspace.recipe("safe").record
    workspace.add_concept("cat dog fox car bus sun moon tree rose house person a of the in")
    with pytest.raises(OverpaintError, match="is as it was"):
        workspace.recipe("safe").reseparate(device="cpu")
    assert workspace.recipe("safe").record == before


def test_two_patches_that_would_become_one_are_refused(workspace: Workspace) -> None:
    recipe = workspace.create_recipe("safe", exist_ok=True)
    recipe.add(workspace.solve("cat", base="tiny", device="cpu"))
    workspace.add_concept("sun")
    recipe.add(workspace.solve("cat", base="tiny", device="cpu"))
    patches = len(workspace.patches())
    with pytest.raises(NotReseparable, match="remove one of them first"):
        workspace.recipe("safe").reseparate(device="cpu")
    assert (len(recipe.record.entries), len(workspace.patches())) == (2, patches)


def test_only_a_recipe_as_it_is_now_can_be_changed(workspace: Workspace) -> None:
    grown(workspace)
    with pytest.raises(OverpaintError, match="re-separate 'safe' itself"):
        workspace.recipe("safe@1").reseparate(device="cpu")


def test_patches_of_one_universe_add_up_and_others_are_distinguished(workspace: Workspace) -> None:
    grown(workspace)
    found = universes(workspace.registry, "safe")
    assert [(each.concepts, [patch.concept for patch in each.patches]) for each in found] == [
        (2, ["dog"]),
        (1, ["cat"]),
    ]
    assert "1 for 2 concepts, 1 for 1 concept" in workspace.recipe("safe").mixture()
    workspace.recipe("safe").reseparate(device="cpu")
    assert len(universes(workspace.registry, "safe")) == 1
    assert workspace.recipe("safe").mixture() == ""
    assert compose(workspace.base("tiny"), workspace.recipe("safe").terms())


def test_the_commands_report_mixed_universes_and_mend_them(workspace: Workspace, tmp_path: Path) -> None:
    shell = Shell(tmp_path / "registry")
    shell.ok("solve", "cat", "--base", "tiny")
    assert "universes" not in shell.succeeds("patch", "add", "cat", "--recipe", "safe one").stderr
    shell.ok("solve", "dog", "--base", "tiny")
    warning = shell.succeeds("patch", "add", "dog", "--recipe", "safe one").stderr
    assert "solved for different universes (1 for 2 concepts, 1 for 1 concept)" in warning
    assert "`overpaint recipe reseparate 'safe one'`" in warning
    assert "different universes" in shell.succeeds("recipe", "show", "safe one").stderr
    out = shell.ok("recipe", "reseparate", "safe one")
    assert "1 patch re-separated for 2 concepts" in out
    assert "different universes" not in shell.succeeds("recipe", "show", "safe one").stderr
    assert "nothing to do" in shell.ok("recipe", "reseparate", "safe one")
    lines = json.loads(shell.ok("recipe", "log", "safe one", "--json"))
    assert sorted(line["did"] for line in lines[2:]) == ["add", "remove"]
    assert {line["why"] for line in lines[2:]} == {"re-separated for 2 concepts"}


def test_patches_of_two_solvers_that_knew_of_the_same_concepts_are_of_one_universe(workspace: Workspace) -> None:
    for name in ("cat", "dog"):
        workspace.add_concept(name)
    recipe = workspace.create_recipe("safe", base="tiny")
    recipe.add(workspace.solve("cat", base="tiny", device="cpu"))
    recipe.add(workspace.solve("dog", base="tiny", solver="separable_mlp", device="cpu"))
    (only,) = universes(workspace.registry, "safe")
    assert {patch.solver for patch in only.patches} == {"separable", "separable_mlp"}
    assert recipe.mixture() == ""
