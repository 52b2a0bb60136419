"""Concept Ablation draws the concept as its anchor."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.solvers.trained.adapters import ATTENTION, KEYS_AND_VALUES, UNET
from overpaint.solvers.trained.guidance import Ablation
from overpaint.testing import SolverContract
from tests.solvers.learning import WATCHED, apart, names, solve

QUICK: dict[str, Any] = {"steps": 12, "lr": 1e-2, "batch": 8, "pictures": 4, "sampling_steps": 3}
TO_DOG = Concept("cat", anchor="dog")


class TestContract(SolverContract):
    solver = Ablation
    quick = MappingProxyType({"steps": 2, "lr": 1e-2, "pictures": 2, "sampling_steps": 2})


def test_the_concept_is_predicted_as_its_anchor(base: Base) -> None:
    found = solve(base, Ablation(**QUICK, until=WATCHED), TO_DOG)
    assert found.diagnostics["left"] < 0.5
    assert apart(base, found.delta, "cat", "dog") < 0.5


@pytest.mark.parametrize("part", [KEYS_AND_VALUES, ATTENTION, UNET])
def test_only_the_part_is_trained(base: Base, part: str) -> None:
    touched = names(solve(base, Ablation(**{**QUICK, "steps": 1}, part=part)).delta, base)
    expected = {
        KEYS_AND_VALUES: set(base.projections()),
        ATTENTION: {name for name in base.names if ".attn1." in name or ".attn2." in name},
        UNET: {name for name in base.names if name.startswith("unet/")},
    }
    assert touched == expected[part]


def test_the_noise_based_loss_is_that_of_training_on_the_anchors_pictures(base: Base) -> None:
    """An untrained model is far from the noise and near its own prediction for the anchor."""
    losses = {
        target: solve(base, Ablation(**{**QUICK, "steps": 1}, target=target), TO_DOG).diagnostics["first_loss"]
        for target in ("model", "noise")
    }
    assert losses["noise"] > 10 * losses["model"]


def test_a_prior_adds_the_loss_of_training_and_leaves_the_target_still(base: Base) -> None:
    plain, with_prior = (
        solve(base, Ablation(**{**QUICK, "steps": 1}, prior=prior), TO_DOG).diagnostics["first_loss"]
        for prior in (0.0, 0.5)
    )
    noise = solve(base, Ablation(**{**QUICK, "steps": 1}, target="noise"), TO_DOG).diagnostics["first_loss"]
    assert with_prior == pytest.approx(plain + 0.5 * noise, rel=0.05)
