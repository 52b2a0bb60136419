"""Null-space editing: what is retained does not move, invariants do not move, the concept does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.patches.delta import LowRank, TextMap
from overpaint.solvers.closed_form.nullspace import NullSpace, _restricted, free_directions, invariants
from overpaint.solvers.problem import EditProblem, Unsolvable
from overpaint.testing import SolverContract, tiny_pipeline

CAT, DOG, CAR = (Concept(name) for name in ("cat", "dog", "car"))


class TestContract(SolverContract):
    solver = NullSpace


class TestContractOfThePreset(SolverContract):
    solver = NullSpace
    quick = NullSpace.PRESETS["emoji"]


def test_what_is_retained_does_not_move_and_the_concept_does(base: Base) -> None:
    solver = NullSpace(projections="kv", words=0, refine=False, spread=0.0, threshold=1e-6)
    delta = solver.solve(EditProblem(base, CAT, (DOG, CAR))).delta
    assert isinstance(delta, TextMap)
    encoder = TextEncoder.of(base)
    last = {c.name: encoder.hidden([c.name])[0, 1] for c in (CAT, DOG, CAR)}
    moved = {name: (delta.up @ (delta.down.T @ key)).norm() / key.norm() for name, key in last.items()}
    # float32 factors of an edit that is exact in float64.
    assert max(moved["dog"], moved["car"]) < 1e-5 * moved["cat"]


def test_begin_of_text_and_the_padding_of_nothing_do_not_move(base: Base) -> None:
    delta = NullSpace(projections="kv").solve(EditProblem(base, CAT, (DOG,))).delta
    assert isinstance(delta, TextMap)
    encoder = TextEncoder.of(base)
    held = invariants(encoder).float()
    cat = encoder.hidden(["cat"])[0, 1]
    assert (delta.up @ (delta.down.T @ held)).norm() < 1e-4 * (delta.up @ (delta.down.T @ cat)).norm()


def test_by_default_only_values_are_edited_by_one_down_factor(base: Base) -> None:
    delta = NullSpace().solve(EditProblem(base, CAT, (DOG,))).delta
    assert isinstance(delta, LowRank)
    assert set(delta.factors) == {name for name in base.projections() if ".to_v." in name}
    downs = [down for _, down in delta.factors.values()]
    assert all(torch.equal(down, downs[0]) for down in downs)


def test_it_is_the_published_formula(base: Base) -> None:
    """Delta P = W (C* C1^T - C1 C1^T) P Q M with Q and M as printed, for keys, projector and invariants at hand."""
    rng = torch.Generator().manual_seed(0)
    d = 12
    c1, target, held = (torch.randn(d, n, generator=rng, dtype=torch.float64) for n in (2, 2, 3))
    basis = torch.linalg.qr(torch.randn(d, 7, generator=rng, dtype=torch.float64)).Q
    p, eye = basis @ basis.T, torch.eye(d, dtype=torch.float64)
    m = torch.linalg.inv(c1 @ c1.T @ p + eye)
    q = eye - m @ held @ torch.linalg.inv(held.T @ p @ m @ held) @ held.T @ p
    published = (target @ c1.T - c1 @ c1.T) @ p @ q @ m
    ours = (target - c1) @ (_restricted(basis, c1, 1.0, held) @ c1).T
    assert (ours - published).norm() < 1e-9 * published.norm()


def test_refinement_retains_less_and_moves_the_concept_further(base: Base) -> None:
    problem = EditProblem(base, CAT, (DOG, CAR))
    all_of_it = NullSpace(refine=False).solve(problem).diagnostics
    refined = NullSpace(refine=True).solve(problem).diagnostics
    assert refined["retained share"] < all_of_it["retained share"] == 1.0
    assert refined["residual"] <= all_of_it["residual"]


def test_free_directions_are_orthonormal_and_weak() -> None:
    moment = torch.diag(torch.tensor([4.0, 1.0, 1e-3, 0.0], dtype=torch.float64))
    free = free_directions(moment, 0.1)
    assert free.shape == (4, 2)
    assert torch.allclose(free.T @ free, torch.eye(2, dtype=torch.float64))
    assert (moment @ free).norm() < 1e-2


def test_no_free_direction_is_reported_plainly(base: Base, tmp_path: Path) -> None:
    pipe = tiny_pipeline(width=16)
    # An untrained layer norm makes every embedding orthogonal to the vector of ones; a trained one does not.
    torch.nn.init.normal_(pipe.text_encoder.final_layer_norm.bias)
    pipe.save_pretrained(tmp_path / "narrow")
    with pytest.raises(Unsolvable, match="uses all 16 text directions; raise threshold"):
        NullSpace(threshold=1e-9, refine=False).solve(EditProblem(Base.open(tmp_path / "narrow"), CAT, (DOG,)))
    with pytest.raises(Unsolvable, match="nothing is retained"):
        NullSpace(words=0).solve(EditProblem(base, CAT))
