"""ESD steers away from the concept, with what its variant trains and nothing else."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from overpaint.bases.base import Base
from overpaint.solvers.trained.guidance import ESD
from overpaint.testing import SolverContract
from tests.solvers.learning import WATCHED, names, solve

QUICK = ESD(steps=12, lr=1e-2, batch=4, bank=4, sampling_steps=4, until=WATCHED)


class TestContract(SolverContract):
    solver = ESD
    quick = MappingProxyType({"steps": 2, "lr": 1e-2, "sampling_steps": 3})


@pytest.mark.parametrize("variant", ["x", "x-strict", "u"])
def test_the_concept_loses_its_guidance_through_what_the_variant_trains(base: Base, variant: str) -> None:
    solver = ESD(**{**vars(QUICK), "variant": variant})
    found = solve(base, solver)
    assert found.diagnostics["left"] < 0.7
    touched = names(found.delta, base)
    assert all((".attn2." in name) == (variant != "u") for name in touched)
    assert (touched == set(base.projections())) == (variant == "x-strict")
    assert not any("norm" in name for name in touched)


def test_a_larger_eta_goes_farther(base: Base) -> None:
    near, far = (solve(base, ESD(**{**vars(QUICK), "eta": eta})).diagnostics["left"] for eta in (0.0, 3.0))
    assert far < near - 0.2


def test_it_stops_when_little_is_left(base: Base) -> None:
    found = solve(base, ESD(**{**vars(QUICK), "until": 0.8, "momentum": 0.5}))
    assert found.diagnostics["stopped_early"]
    assert 1 < found.diagnostics["steps"] < 12
    assert found.diagnostics["left"] <= 0.8
