"""MACE: the refinement moves what stands around a concept, training lowers attention to it, fusion confines that to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.patches.delta import LowRank, TextMap
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.trained.denoiser import Denoiser
from overpaint.solvers.trained.mace import MACE, _Attention, _ConceptEmbeddings, _importance
from overpaint.testing import SolverContract

CAT, DOG = Concept("cat"), Concept("dog")
QUICK: dict[str, Any] = {"steps": 3, "pictures": 2, "sampling_steps": 2, "sentences": 4, "lr": 1e-2, "rank": 4}


class TestContract(SolverContract):
    solver = MACE
    quick = QUICK


def test_it_is_a_text_map_and_one_direction_for_every_projection(base: Base) -> None:
    delta = MACE(**QUICK).solve(EditProblem(base, CAT, (DOG,))).delta
    parts = {part.kind: part for part in delta.parts}
    assert set(parts) == {"text-map", "low-rank"}
    refined, directions = parts["text-map"], parts["low-rank"]
    assert isinstance(refined, TextMap)
    assert isinstance(directions, LowRank)
    assert refined.up.shape[1] == 4
    assert {name: up.shape[1] for name, (up, _) in directions.factors.items()} == dict.fromkeys(base.projections(), 1)


def test_training_lowers_the_attention_to_the_concept(base: Base) -> None:
    found = MACE(**{**QUICK, "steps": 30, "batch": 4}).solve(EditProblem(base, CAT, (DOG,))).diagnostics
    assert found["loss"] < found["first_loss"]


def test_attention_in_the_open_draws_the_same_and_sums_to_one(base: Base) -> None:
    plain, open_ = (Denoiser.of(EditProblem(base, CAT)) for _ in range(2))
    watched = _Attention(open_.pipe.unet)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, text = torch.tensor([1, 500]), plain.hidden(["a cat", "a dog"])
    everything = torch.ones(2, text.sequence.shape[1], dtype=torch.bool)
    with torch.no_grad():
        # The order of sums in attention differs.
        assert torch.allclose(open_(x, t, text), plain(x, t, text), atol=1e-5)
        paid = watched.paid(open_, x, t, text, everything)
    assert len(paid) == len(base.projections()) // 2
    assert all(torch.allclose(layer, torch.ones_like(layer), atol=1e-5) for layer in paid)


def test_the_refinement_asks_about_what_follows_the_concept(base: Base) -> None:
    problem = EditProblem(base, Concept("cat", anchor="dog"))
    model = Denoiser.of(problem)
    assert isinstance(model.encoder, TextEncoder)
    concept = _ConceptEmbeddings.of(model.encoder, problem, 4)
    start, end = concept.spans[-1]
    rows = model.encoder.hidden([concept.prompts[-1]])[0].double()
    assert torch.allclose(concept.own[:, -1], rows[end - 1])
    assert torch.allclose(_along(concept.others[:, -1]), _along(rows[-1]))
    assert end - start == len(model.encoder.tokens("cat"))
    assert not torch.equal(concept.others, concept.instead)


def test_fusion_is_the_identity_on_the_concept_where_nothing_is_preserved(base: Base) -> None:
    problem = EditProblem(base, CAT)
    concept = _ConceptEmbeddings.of(TextEncoder.of(base), problem, 2)
    d = len(concept.own)
    share = concept.fusion(torch.zeros(d, d, dtype=torch.float64), 1e-9 * torch.eye(d, dtype=torch.float64))
    assert torch.allclose(share @ concept.own, concept.own, atol=1e-3)
    heavy = concept.fusion(1e9 * torch.eye(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64))
    assert (heavy @ concept.own).norm() < 1e-3 * concept.own.norm()


@pytest.mark.parametrize("levels", [1000, 50])
def test_middle_timesteps_are_the_likely_ones(levels: int) -> None:
    likely = _importance(levels)
    assert (likely >= 0).all()
    assert 200 < 1000 / levels * int(likely.argmax()) < 400


def _along(vector: Tensor) -> Tensor:
    found: Tensor = vector / vector.norm()
    return found
