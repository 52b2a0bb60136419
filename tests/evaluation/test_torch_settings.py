"""What PyTorch is set to by a caller changes no picture, no verdict, no cross-talk and no decoupled patch."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from overpaint.bases.base import EMOJI, Base
from overpaint.core.concepts import Concept
from overpaint.evaluation.crosstalk import crosstalk
from overpaint.evaluation.images import Sampler, generate
from overpaint.evaluation.judges import EmbeddedJudge
from overpaint.patches.delta import Dense
from overpaint.patches.patch import Patch, make_patch
from overpaint.solvers.closed_form.decoupling import decouple
from overpaint.solvers.problem import EditProblem
from tests.torch_settings import SETTINGS

CPU, CAT, DOG = torch.device("cpu"), Concept("cat"), Concept("dog")


@pytest.fixture(scope="module")
def patches(base_folder: str) -> list[Patch]:
    """One that changes cross-attention, and one that also changes a convolution, so that it is probed."""
    base, rng = Base.open(base_folder), torch.Generator().manual_seed(0)
    changed = [[base.projections()[0]], [base.projections()[0], "unet/conv_in.weight"]]
    deltas = [Dense({n: torch.randn(base.tensor(n).shape, generator=rng) / 20 for n in names}) for names in changed]
    solver = {"name": "test", "settings": {}, "seed": 0}
    return [make_patch(base, concept, delta, solver) for concept, delta in zip((CAT, DOG), deltas, strict=True)]


def results(base: Base, patches: list[Patch]) -> dict[str, str]:
    pictures = generate(base.pipeline(), ["a photo of a cat"], [1], Sampler(1, 4.0, 1))
    judge = EmbeddedJudge(Base.open(EMOJI), CPU)
    verdict = judge.probabilities(np.full((1, 64, 64, 3), 128, np.uint8), "object")
    moved = crosstalk(Base.open(base.path), patches)
    solution = decouple(EditProblem(base, CAT, (CAT, DOG), 0, CPU), patches[0].delta)
    patch = make_patch(base, CAT, solution.delta, {})
    found: dict[str, NDArray[Any]] = {"pictures": pictures, "judge": verdict, "cross-talk": moved.ratios}
    return {name: hashlib.sha256(each.tobytes()).hexdigest() for name, each in found.items()} | {"patch": patch.id}


@pytest.fixture(scope="module")
def usual(base_folder: str, patches: list[Patch]) -> dict[str, str]:
    return results(Base.open(base_folder), patches)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_callers_settings_change_no_result(
    base: Base, patches: list[Patch], usual: dict[str, str], setting: str
) -> None:
    with SETTINGS[setting]():
        found = results(base, patches)
    assert found == usual
