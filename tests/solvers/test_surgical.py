"""The surgical update replaces the concept's guidance and holds the unconditional score."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.solvers.trained.adapters import UNET
from overpaint.solvers.trained.guidance import Surgical
from overpaint.testing import SolverContract
from tests.solvers.learning import CAT, WATCHED, predictions, solve

QUICK: dict[str, Any] = {"steps": 12, "lr": 1e-2, "batch": 8, "bank": 8, "sampling_steps": 4, "until": WATCHED}


class TestContract(SolverContract):
    solver = Surgical
    quick = MappingProxyType({"steps": 2, "lr": 1e-2, "sampling_steps": 3})


def test_the_concept_takes_the_guidance_of_nothing_or_of_its_alternative(base: Base) -> None:
    plain, to_dog = (solve(base, Surgical(**QUICK), concept) for concept in (CAT, Concept("cat", anchor="dog")))
    assert plain.diagnostics["left"] < 0.5
    assert to_dog.diagnostics["left"] < 0.5
    assert plain.delta != to_dog.delta


def test_the_unconditional_score_is_held(base: Base) -> None:
    """What the drift constraint is for: without it, the whole U-Net drifts under the empty prompt too."""
    before = predictions(base, None, "")
    drift = [
        float((predictions(base, solve(base, Surgical(**QUICK, part=UNET, keep=keep)).delta, "") - before).norm())
        for keep in (0.0, 100.0)
    ]
    assert drift[1] < 0.5 * drift[0]
