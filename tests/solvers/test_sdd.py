"""SDD teaches itself to leave the concept out; the teacher, its own average, is the result."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

from overpaint.bases.base import Base
from overpaint.patches.delta import Dense
from overpaint.solvers.trained.guidance import SDD
from overpaint.testing import SolverContract
from tests.solvers.learning import WATCHED, apart, solve

QUICK: dict[str, Any] = {"steps": 12, "lr": 1e-2, "batch": 8, "bank": 8, "sampling_steps": 4}


class TestContract(SolverContract):
    solver = SDD
    quick = MappingProxyType({"steps": 2, "lr": 1e-1, "sampling_steps": 3, "ema": 0.5})


def test_the_concept_is_predicted_as_if_it_were_not_named(base: Base) -> None:
    found = solve(base, SDD(**QUICK, ema=0.5, until=WATCHED))
    assert found.diagnostics["left"] < 0.5
    assert apart(base, found.delta, "cat", "") < 0.5


def test_the_result_is_the_average_of_the_way(base: Base) -> None:
    """The average after one step has gone the share 1 - ema of that step."""
    steps: dict[str, Any] = {"steps": 1, "lr": 1e-2, "bank": 2, "sampling_steps": 3}
    far, near = (solve(base, SDD(**steps, ema=ema)).delta for ema in (0.0, 0.75))
    assert isinstance(far, Dense)
    assert isinstance(near, Dense)
    for name, change in far.changes.items():
        assert torch.allclose(near.changes[name], 0.25 * change, atol=1e-6)
