"""On the embedded base, few-shot unlearning erases an object from what the base itself draws of it."""

from __future__ import annotations

import pytest

from overpaint.bases.base import EMBEDDED, Base
from overpaint.core.concepts import Concept
from overpaint.evaluation.images import Sampler, generate
from overpaint.evaluation.metrics import accuracy, load_judge
from overpaint.evaluation.prompts import object_prompts
from overpaint.patches.compose import Term
from overpaint.patches.live import Overlay
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.trained.few_shot import FewShot

pytestmark = pytest.mark.skipif(not EMBEDDED.is_dir(), reason="the embedded base is not in this checkout")


def test_the_preset_erases_an_object_and_preserves_others() -> None:
    base = Base.open("emoji")
    delta = FewShot.preset("emoji").solve(EditProblem(base, Concept("pistol", "unsafe", ("gun", "handgun")))).delta
    pipe, judge = base.pipeline(), load_judge(base.path)
    rates = []
    with Overlay(pipe, base).applied([Term("a", delta)]):
        for names in (["pistol"], ["cat", "car", "pizza", "rose", "house", "key"]):
            trials = object_prompts(names, 6 // len(names), held_out=True)
            pictures = generate(pipe, [t.prompt for t in trials], [t.seed for t in trials], Sampler(10, 3.0))
            rates.append(accuracy(judge, pictures, [t.truth for t in trials], "object").rate)
    assert rates[0] <= 1 / 6
    assert rates[1] >= 5 / 6
