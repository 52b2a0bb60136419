"""What a manifest records of a solver's inputs, and that patches of version 0.1 are recognised by what decided them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from overpaint.core.concepts import Concept
from overpaint.workspace.planning import SolveContext, SolveRequest, digest_of_manifest, digest_of_request, provenance
from overpaint.workspace.workspace import Workspace

CAT, DOG = Concept("cat"), Concept("dog")
CONTEXT = SolveContext((CAT, DOG), ("a sunny day", " a house "))


def test_an_input_is_recorded_only_where_the_solver_reads_it() -> None:
    reads_both = _recorded("separable")
    assert [each["name"] for each in reads_both["universe"]] == ["dog"]
    assert reads_both["keep"] == ["a house", "a sunny day"]
    for name in ("esd", "sdd", "ablation", "surgical", "few_shot"):
        assert "universe" not in _recorded(name), f"{name} does not look at it"
    assert "keep" not in _recorded("uce", preserve_scale="0")
    assert "universe" not in _recorded("uce", preserve_scale="0")


def test_a_patch_of_an_earlier_version_is_not_solved_again_for_a_universe_that_was_never_read() -> None:
    request = SolveRequest(CAT, "esd")
    context = SolveContext((CAT, DOG, Concept("fox")))
    before = _of_0_1(provenance(request, request.configured(), context), universe=[DOG.as_json()])
    assert digest_of_manifest(before) == digest_of_request(request, request.configured(), context, "base")


def test_a_patch_of_an_earlier_version_that_ignored_preserved_prompts_is_solved_again() -> None:
    request = SolveRequest(CAT, "esd")
    before = _of_0_1(provenance(request, request.configured(), CONTEXT), universe=[])
    assert digest_of_manifest(before) != digest_of_request(request, request.configured(), CONTEXT, "base")


def _recorded(solver: str, **settings: str) -> dict[str, Any]:
    request = SolveRequest(CAT, solver, settings)
    return provenance(request, request.configured(), CONTEXT)


def _of_0_1(recorded: dict[str, object], universe: list[object]) -> dict[str, object]:
    """A manifest as 0.1 wrote it: with the universe, whatever the solver read."""
    return {"concept": CAT.as_json(), "solver": {**recorded, "universe": universe}, "subject": {"fingerprint": "base"}}


def test_the_work_of_planning_grows_with_the_number_of_concepts_and_not_with_its_square(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Counted in calls, which no other program on the machine disturbs."""
    workspace.solve("thing 0", solver="counting")
    few, many = (_calls(workspace, tmp_path / f"{count}.yaml", count) for count in (100, 400))
    assert many < 4.2 * few


def _calls(workspace: Workspace, file: Path, count: int) -> int:
    """How many functions are called to plan `count` concepts of which one was solved."""
    lines = (
        f"- {{name: thing {i}, synonyms: [item {i}], prompts: ['a thing {i}'], solver: counting}}" for i in range(count)
    )
    file.write_text("\n".join(lines))
    calls = 0

    def count_call(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count_call)
    try:
        plan = workspace.plan(file=file, update=True)
    finally:
        sys.setprofile(None)
    assert len(plan.open) == count
    return calls
