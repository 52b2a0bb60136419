"""`patch decouple` and `solve --decouple`: one patch, its provenance in its manifest, and nothing solved twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from overpaint.core.errors import NotFound, OverpaintError
from overpaint.workspace.workspace import Workspace
from tests.shell import Shell

DENSE = {"dense": "true"}


def test_decoupling_at_once_or_afterwards_gives_the_same_patch(workspace: Workspace) -> None:
    for name in ("dog", "car", "cat"):
        workspace.add_concept(name)
    whole = workspace.solve("cat", solver="counting", settings=DENSE, device="cpu")
    later, found = workspace.decouple(whole.id, device="cpu")
    at_once = workspace.solve("cat", solver="counting", settings=DENSE, decoupled="ridge", device="cpu")
    assert later.id == at_once.id != whole.id
    assert later.kind == "text-map"
    assert at_once.diagnostics["decoupled: residual"] == found.diagnostics["residual"]
    step = workspace.patch(later.id).manifest["solver"]["decoupled"]
    assert (step["rule"], step["from"]) == ("ridge", whole.id)
    assert [each["name"] for each in step["universe"]] == ["car", "dog"]


def test_a_run_is_resumed_while_universe_and_prompts_are_the_same(workspace: Workspace) -> None:
    def solved_before(rule: str, compress: str | None = None) -> bool:
        plan = workspace.plan(["cat"], solver="counting", decoupled=rule, compress=compress, settings=DENSE)
        return workspace.carry_out(plan, device="cpu")[0].before

    workspace.add_concept("dog")
    assert [solved_before(rule) for rule in ("", "ridge", "", "ridge", "exact")] == [False, False, True, True, False]
    assert [solved_before("ridge", "2"), solved_before("ridge", "2")] == [False, True]
    workspace.add_concept("car")
    assert not solved_before("ridge")
    workspace.preserve("tiny", ["a photo of the moon"])
    assert not solved_before("ridge")
    assert solved_before("ridge")


def test_a_rule_that_there_is_not_is_refused(workspace: Workspace) -> None:
    with pytest.raises(OverpaintError, match="ridge, exact"):
        workspace.solve("cat", solver="counting", decoupled="wholly")


def test_the_commands_say_what_it_cost(workspace: Workspace, tmp_path: Path) -> None:
    shell = Shell(tmp_path / "registry")
    workspace.add_concept("dog")
    asked = ("--base", "tiny", "--solver", "counting", "--set", "dense=true", "--device", "cpu", "--json")
    (solved,) = json.loads(shell.ok("solve", "cat", *asked))
    (row,) = json.loads(shell.ok("patch", "decouple", solved["patch"], "--device", "cpu", "--json"))
    assert row["from"] == solved["patch"]
    assert 0 <= row["others moved"] < 0.5
    (again,) = json.loads(shell.ok("solve", "cat", *asked, "--decouple"))
    assert (again["patch"], again["solved"]) == (row["patch"], "before")
    shown = {line["what"]: line["value"] for line in json.loads(shell.ok("patch", "show", row["patch"], "--json"))}
    assert solved["patch"] in shown["decoupled from"]
    assert "give both" in shell("solve", "dog", "--base", "tiny", "--exactly").stderr


def test_a_universe_is_named_by_recipes_and_concepts(workspace: Workspace) -> None:
    for name in ("dog", "car", "cat", "sun"):
        workspace.add_concept(name)
    workspace.create_recipe("two").add_all(
        [workspace.solve(name, solver="counting", device="cpu").id for name in ("dog", "car")]
    )
    solved = workspace.solve("cat", solver="counting", universe=["two"], device="cpu")
    manifest = workspace.patch(solved.id).manifest["solver"]
    assert [each["name"] for each in manifest["universe"]] == ["car", "dog"]
    outcomes = workspace.solve_many(["cat", "moon"], solver="counting", universe=["sun"], device="cpu")
    listed = [workspace.patch(o.record.id).manifest["solver"]["universe"] for o in outcomes if o.record is not None]
    assert [[each["name"] for each in some] for some in listed] == [["moon", "sun"], ["cat", "sun"]]
    with pytest.raises(NotFound, match="no recipe and no concept"):
        workspace.solve("cat", solver="counting", universe=["nobody"])
