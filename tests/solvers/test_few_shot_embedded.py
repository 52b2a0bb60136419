"""On the embedded base, few-shot unlearning erases an object from what the base itself draws of it."""

from __future__ import annotations

import pytest
import torch

from overpaint.bases.base import EMOJI, Base
from overpaint.core.concepts import Concept
from overpaint.evaluation.images import Sampler, generate
from overpaint.evaluation.judges import EmbeddedJudge
from overpaint.evaluation.prompts import EmojiPrompts
from overpaint.patches.compose import Term
from overpaint.patches.live import Overlay
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.trained.few_shot import FewShot

pytestmark = pytest.mark.skipif(not EMOJI.is_dir(), reason="the embedded base is not in this checkout")


def test_the_preset_erases_an_object_and_preserves_others() -> None:
    base = Base.open("emoji")
    delta = FewShot.preset("emoji").solve(EditProblem(base, Concept("pistol", "unsafe", ("gun", "handgun")))).delta
    pipe, judge = base.pipeline(), EmbeddedJudge(base, torch.device("cpu"))
    rates = []
    with Overlay(pipe, base).applied([Term("a", delta)]):
        for names in (["pistol"], ["cat", "car", "pizza", "rose", "house", "key"]):
            asked = [prompt for name in names for prompt in EmojiPrompts().prompts("object", name, 6 // len(names))]
            pictures = generate(pipe, [a.prompt for a in asked], [a.seed for a in asked], Sampler(10, 3.0))
            seen = [judge.heads["object"][i] for i in judge.probabilities(pictures, "object").argmax(1)]
            rates.append(sum(name == a.shows["object"] for name, a in zip(seen, asked, strict=True)) / len(asked))
    assert rates[0] <= 1 / 6
    assert rates[1] >= 5 / 6
