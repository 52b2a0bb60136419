"""SPM's adapters are of rank one, anchored, and compose as products."""

from __future__ import annotations

from itertools import pairwise
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from overpaint.bases.base import Base
from overpaint.patches.delta import LowRank
from overpaint.solvers.trained.spm import SPM, noise_like
from overpaint.testing import SolverContract
from tests.solvers.learning import CAR, WATCHED, moved, solve

QUICK: dict[str, Any] = {
    "steps": 12,
    "lr": 1e-2,
    "batch": 4,
    "bank": 4,
    "sampling_steps": 4,
    "warm_up": 3,
    "anchors": 2,
}


class TestContract(SolverContract):
    solver = SPM
    quick = MappingProxyType({"steps": 2, "lr": 1e-1, "sampling_steps": 3, "warm_up": 1, "anchors": 1})


def test_the_concept_loses_its_guidance(base: Base) -> None:
    assert solve(base, SPM(**QUICK, anchoring=0.0, until=WATCHED)).diagnostics["left"] < 0.7


def test_adapters_of_rank_one_stand_beside_every_layer_of_the_transformers(base: Base) -> None:
    delta = solve(base, SPM(**{**QUICK, "steps": 1})).delta
    assert isinstance(delta, LowRank)
    assert {up.shape[1] for up, _ in delta.factors.values()} == {1}
    kinds = {name.rpartition(".")[0].rpartition("transformer_blocks.0.")[2] for name in delta.factors}
    assert {"attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"} <= kinds
    assert any(len(base.places[name].shape) == 4 for name in delta.factors), "convolutions too"


def test_two_patches_compose_as_the_sum_of_their_products(base: Base) -> None:
    one, other = solve(base, SPM(**{**QUICK, "steps": 2})).delta, solve(base, SPM(**{**QUICK, "steps": 2}), CAR).delta
    both = one + other
    assert isinstance(one, LowRank)
    assert isinstance(other, LowRank)
    assert isinstance(both, LowRank)
    for name, (up, down) in both.factors.items():
        products = [torch.matmul(*delta.factors[name]) for delta in (one, other)]
        assert torch.allclose(up @ down, products[0] + products[1], atol=1e-7)
        factors = (one.factors[name][0] + other.factors[name][0]) @ (one.factors[name][1] + other.factors[name][1])
        assert not torch.allclose(up @ down, factors, atol=1e-7), "which is what the sum of factors would give"


@pytest.mark.parametrize("anchored", ["noise", "prompts"])
def test_what_is_anchored_moves_less(base: Base, anchored: str) -> None:
    loose, held = (solve(base, SPM(**QUICK, anchored=anchored, anchoring=weight)).delta for weight in (0.0, 1000.0))
    assert moved(base, held, "a photo of a house") < 0.5 * moved(base, loose, "a photo of a house")


def test_the_learning_rate_rises_and_falls_as_often_as_it_should() -> None:
    solver = SPM(steps=310, warm_up=10, cycles=3)
    rates = [solver._rate(step) for step in range(310)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert [i for i in range(10, 310) if rates[i] == 1.0] == [10, 110, 210]
    assert all(b < a for i, (a, b) in enumerate(pairwise(rates[10:]), 11) if i not in (110, 210))


def test_anchors_have_about_the_norm_of_the_concept_and_nothing_of_it() -> None:
    texts = torch.randn((64, 8, 16), generator=torch.Generator().manual_seed(0)) * 3
    found = noise_like(texts, torch.Generator().manual_seed(1))
    ratio = found.flatten(1).norm(dim=1) / texts.flatten(1).norm(dim=1)
    assert ratio.min() >= 0.8
    assert ratio.max() <= 1.2
    assert ratio.max() - ratio.min() > 0.2
    # Two random directions in 128 dimensions have a cosine of 0.09 on average.
    assert F.cosine_similarity(found.flatten(1), texts.flatten(1)).abs().max() < 0.4
