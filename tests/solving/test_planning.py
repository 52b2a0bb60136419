"""What a manifest records of a solver's inputs, and that patches of version 0.1 are recognised by what decided them."""

from __future__ import annotations

from typing import Any

from overpaint.core.concepts import Concept
from overpaint.workspace.planning import SolveContext, SolveRequest, digest_of_manifest, digest_of_order, provenance

CAT, DOG = Concept("cat"), Concept("dog")
AROUND = SolveContext((CAT, DOG), ("a sunny day", " a house "))


def test_an_input_is_recorded_only_where_the_solver_reads_it() -> None:
    reads_both = _recorded("separable")
    assert [each["name"] for each in reads_both["universe"]] == ["dog"]
    assert reads_both["keep"] == ["a house", "a sunny day"]
    for name in ("esd", "sdd", "ablation", "surgical", "few_shot"):
        assert "universe" not in _recorded(name), f"{name} does not look at it"
    assert "keep" not in _recorded("uce", preserve_scale="0")
    assert "universe" not in _recorded("uce", preserve_scale="0")


def test_a_patch_of_an_earlier_version_is_not_solved_again_for_a_universe_that_was_never_read() -> None:
    order = SolveRequest(CAT, "esd")
    today = provenance(order, order.method(), SolveContext((CAT, DOG, Concept("fox"))))
    assert digest_of_manifest(_of_0_1(today, universe=[DOG.as_json()])) == digest_of_order(order, today, "base")


def test_a_patch_of_an_earlier_version_that_ignored_preserved_prompts_is_solved_again() -> None:
    order = SolveRequest(CAT, "esd")
    today = provenance(order, order.method(), AROUND)
    assert digest_of_manifest(_of_0_1(today, universe=[])) != digest_of_order(order, today, "base")


def _recorded(solver: str, **settings: str) -> dict[str, Any]:
    order = SolveRequest(CAT, solver, settings)
    return provenance(order, order.method(), AROUND)


def _of_0_1(recorded: dict[str, object], universe: list[object]) -> dict[str, object]:
    """A manifest as 0.1 wrote it: with the universe, whatever the solver read."""
    return {"concept": CAT.as_json(), "solver": {**recorded, "universe": universe}, "subject": {"fingerprint": "base"}}
