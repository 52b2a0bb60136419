"""Decoupling: a patch keeps what it does to its own concept; every other listed concept stays where it is, to stated bounds."""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overpaint.bases import encoder_models
from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.patches.delta import Delta, Dense, LowRank, Sum, TextMap
from overpaint.solvers.closed_form.decoupling import EXACT_RULE, decouple
from overpaint.solvers.closed_form.separable import Metric, fit
from overpaint.solvers.problem import EditProblem, Unsolvable
from overpaint.solvers.sentences import keys_and_values
from overpaint.testing import tiny_pipeline

CAT, DOG, CAR = Concept("cat"), Concept("dog"), Concept("car")
ALL_OF_IT: dict[str, Any] = {"rank": 99, "energy": 1.0, "reach": 1.0}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(base: Base, concept: Concept = CAT) -> EditProblem:
    return EditProblem(base, concept, (CAT, DOG, CAR))


def patch_of_projections(base: Base, seed: int = 1) -> Dense:
    """A change of all keys and values that moves whatever it reads."""
    return Dense({name: 0.1 * random(seed, *base.places[name].shape).float() for name in base.projections()})


def keys(base: Base, concept: Concept) -> Tensor:
    return keys_and_values(TextEncoder.of(base), base, concept)[0]


def moved(base: Base, delta: Delta, keys: Tensor) -> float:
    """How far keys [d, m] are moved at all projections together."""
    total = 0.0
    for name in base.projections():
        for part in delta.parts:
            if isinstance(part, TextMap):
                total += float(
                    (base.tensor(name).double() @ part.up.double() @ (part.down.double().T @ keys)).square().sum()
                )
            elif isinstance(part, LowRank) and name in part.factors:
                up, down = part.factors[name]
                total += float((up.double() @ (down.double() @ keys)).square().sum())
            elif isinstance(part, Dense) and name in part.changes:
                total += float((part.changes[name].double() @ keys).square().sum())
    return float(total**0.5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), concepts=st.integers(2, 4), columns=st.integers(1, 6), width=st.integers(4, 10))
def test_it_is_the_minimiser_and_moves_others_at_most_half_as_far(
    seed: int, concepts: int, columns: int, width: int
) -> None:
    own, *others = (random(seed + i, width, columns) for i in range(concepts))
    ridge = 1e-3 * torch.eye(width, dtype=torch.float64)
    moment = reduce(add, (k @ k.T for k in (own, *others))) + ridge
    way = random(seed + 50, 5, columns)
    up, down, _ = fit(Metric(torch.linalg.cholesky(moment)), own, way, **ALL_OF_IT)
    change = up @ down.T

    def objective(d: Tensor) -> float:
        rest = sum(float((d @ k).square().sum()) for k in others) + float((d @ ridge * d).sum())
        return float((d @ own - way).square().sum()) + rest

    least = objective(change)
    for i in range(4):
        assert objective(change + 1e-3 * random(seed + 60 + i, 5, width)) >= least - 1e-9
    assert all(float((change @ k).norm()) <= 0.5 * float(way.norm()) + 1e-9 for k in others)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(6, 12))
def test_in_a_null_space_nothing_outside_of_it_moves(seed: int, width: int) -> None:
    own, held = random(seed, width, 3), random(seed + 1, width, 3)
    basis = torch.linalg.qr(held, mode="complete").Q[:, 3:]
    whole = Metric(torch.linalg.cholesky(own @ own.T + held @ held.T + 1e-6 * torch.eye(width, dtype=torch.float64)))
    way = random(seed + 2, 4, 3)
    up, down, about = fit(whole.within(basis), own, way, **ALL_OF_IT)
    assert float((up @ (down.T @ held)).norm()) < 1e-9 * float(way.norm())
    # Of keys that have directions free, all of the change stays but for what the 1e-6 in A costs.
    least = float(torch.linalg.svdvals(basis.T @ own)[-1])
    assert about["residual"] <= 1e-6 / least**2 + 1e-9


def test_the_own_change_stays_and_that_of_other_concepts_goes(base: Base) -> None:
    delta = patch_of_projections(base)
    found = decouple(problem(base), delta)
    assert isinstance(found.delta, LowRank)
    assert set(found.delta.factors) == set(base.projections())
    own = moved(base, found.delta, keys(base, CAT))
    assert own > 0.5 * moved(base, delta, keys(base, CAT))
    for other in (DOG, CAR):
        assert moved(base, found.delta, keys(base, other)) < 0.2 * moved(base, delta, keys(base, other))
    assert found.diagnostics["residual"] < 0.7
    assert found.diagnostics["others moved"] < 0.2
    assert found.diagnostics["left_out"] == 0


def test_decoupled_patches_are_the_joint_solution_of_their_ways(base: Base) -> None:
    """Their terms share one A: the sum moves each concept as its own patch moves it, up to the cross-talk that is stated."""
    deltas = {
        c: decouple(problem(base, c), patch_of_projections(base, seed)).delta for seed, c in enumerate((CAT, DOG), 1)
    }
    together = deltas[CAT] + deltas[DOG]
    for concept in (CAT, DOG):
        alone, both = (moved(base, each, keys(base, concept)) for each in (deltas[concept], together))
        assert both == pytest.approx(alone, rel=0.2)


def test_exactly_means_that_bare_names_of_others_do_not_move_at_all(base: Base) -> None:
    encoder = TextEncoder.of(base)
    delta = patch_of_projections(base)
    found = decouple(problem(base), delta, EXACT_RULE).delta
    own = moved(base, found, keys(base, CAT))
    assert own > 0
    for prompt in ("", "dog", "car"):
        # Factors are float32, and so are the embeddings.
        assert moved(base, found, encoder.hidden([prompt])[0].double().T) < 1e-4 * own


def test_where_no_direction_is_free_exactly_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline(width=16)
    # An untrained layer norm makes every embedding orthogonal to the vector of ones; a trained one does not.
    torch.nn.init.normal_(pipe.text_encoder.final_layer_norm.bias)
    pipe.save_pretrained(tmp_path / "narrow")
    narrow = Base.open(tmp_path / "narrow")
    with pytest.raises(Unsolvable, match="no null space is left"):
        decouple(problem(narrow), patch_of_projections(narrow), EXACT_RULE)


def test_a_change_of_the_text_encoder_becomes_a_text_map(base: Base) -> None:
    name = next(n for n in base.names if n.startswith("text_encoder/") and n.endswith("layers.1.mlp.fc2.weight"))
    delta = Dense({name: 0.5 * random(3, *base.places[name].shape).float()})
    found = decouple(problem(base), delta)
    assert isinstance(found.delta, TextMap)
    before, own = keys(base, CAT), found.delta
    assert float((own.up.double() @ (own.down.double().T @ before)).norm()) > 0.1 * float(before.norm())
    for other in (DOG, CAR):
        assert moved(base, own, keys(base, other)) < 0.3 * moved(base, own, before)


def test_a_changed_text_encoder_that_is_read_layer_by_layer_is_refused(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_models, "HELD", 0)
    name = next(n for n in base.names if n.startswith("text_encoder/") and n.endswith("layers.1.mlp.fc2.weight"))
    with pytest.raises(Unsolvable, match="too large here to be held with the change"):
        decouple(problem(base), Dense({name: torch.ones(base.places[name].shape)}))


def test_what_does_not_act_through_the_text_is_left_out_and_counted(base: Base) -> None:
    name = base.projections()[0]
    query = name.replace("to_k", "to_q").replace("to_v", "to_q")
    change = {each: 0.1 * random(4, *base.places[each].shape).float() for each in (name, query)}
    found = decouple(problem(base), Sum((Dense(change), TextMap("text_encoder", random(5, 64, 1), random(6, 64, 1)))))
    assert found.diagnostics["left_out"] == 1
    assert {part.kind for part in found.delta.parts} == {"text-map", "low-rank"}
    with pytest.raises(Unsolvable, match="nothing to decouple"):
        decouple(problem(base), Dense({query: change[query]}))


def test_the_same_input_gives_the_same_bits(base: Base) -> None:
    delta = patch_of_projections(base)
    assert decouple(problem(base), delta).delta == decouple(problem(Base.open(base.path)), delta).delta
