"""SepME: what is listed is not disturbed at all, what is trained becomes irrelevant, and room that runs out is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.patches.delta import Dense, LowRank
from overpaint.solvers.closed_form.edits import free_of
from overpaint.solvers.problem import EditProblem, Unsolvable, settings_of
from overpaint.solvers.trained.sepme import SepME, balanced, moment_within, null_space, that_fit
from overpaint.testing import SolverContract, tiny_pipeline

CAT, DOG, CAR = Concept("cat"), Concept("dog"), Concept("car")
QUICK: dict[str, Any] = {"iterations": 3, "pictures": 2, "steps": 2, "beta": 0.1}


class TestContract(SolverContract):
    solver = SepME
    quick = QUICK


class TestContractOfTheWhole(SolverContract):
    """Without decoupling: all cross-attention weights."""

    solver = SepME
    quick = {**QUICK, **SepME.PRESETS["whole"], "lr": 1e-3}  # noqa: RUF012


def test_the_null_space_is_orthogonal_to_every_listed_prompt(base: Base) -> None:
    encoder = TextEncoder.of(base)
    basis, rank = null_space(encoder.hidden(["", "dog", "car"]))
    stacked = encoder.hidden(["", "dog", "car"]).reshape(-1, encoder.width)
    assert basis.shape == (encoder.width, encoder.width - rank)
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)
    # Rounding of a float32 encoder times the size of its embeddings.
    assert (stacked @ basis).abs().max() < 1e-4 * stacked.norm(dim=1).max()


def test_a_prompt_takes_all_positions_but_begin_of_text_which_is_shared() -> None:
    """The capacity of the exact scheme: 77 + 76 per further prompt at length 77, so nine others at d = 768."""
    rng = torch.Generator().manual_seed(0)
    begin = torch.randn(1, 1, 768, generator=rng)
    for others, left in ((0, 691), (2, 539), (9, 7), (10, 0)):
        rest = torch.randn(others + 1, 76, 768, generator=rng)
        hidden = torch.cat([begin.expand(others + 1, -1, -1), rest], 1)
        assert free_of(hidden)[0].shape == (768, left)


@pytest.mark.parametrize("balance", [0, 20])
def test_listed_prompts_are_left_alone_and_the_own_one_changes(base: Base, balance: int) -> None:
    settings = SepME(**QUICK, keep="a picture of the moon", balance=balance)
    delta = settings.solve(EditProblem(base, CAT, (DOG,))).delta
    assert isinstance(delta, LowRank)
    encoder = TextEncoder.of(base)
    cat, *listed = (encoder.hidden([p])[0] for p in ("cat", "dog", "", "a picture of the moon"))
    for up, down in delta.factors.values():
        for prompt in listed:
            assert (prompt @ down.T @ up.T).norm() < 1e-3 * (cat @ down.T @ up.T).norm()


def test_the_room_that_is_left_is_reported(base: Base) -> None:
    found = SepME(**QUICK).solve(EditProblem(base, CAT, (DOG, CAR))).diagnostics
    encoder = TextEncoder.of(base)
    assert found["null_space"] + found["rank_of_others"] == encoder.width
    assert found["capacity"] == (encoder.width - 1) // (encoder.length - 1)
    assert found["capacity_left"] < found["capacity"]


def test_a_universe_larger_than_the_room_gives_way_to_the_nearest_and_says_so(tmp_path: Path) -> None:
    pipe = tiny_pipeline(width=64)
    # An untrained layer norm makes every embedding orthogonal to the vector of ones; a trained one does not.
    torch.nn.init.normal_(pipe.text_encoder.final_layer_norm.bias)
    pipe.save_pretrained(tmp_path / "small")
    base = Base.open(tmp_path / "small")
    many = tuple(Concept(name) for name in ("dog", "fox", "car", "bus", "sun", "moon", "tree", "rose", "house"))
    found = SepME(**QUICK).solve(EditProblem(base, CAT, many))
    held = found.record["undisturbed"]
    assert 0 < len(held) < len(many)
    assert f"room for {len(held)} of 9" in found.diagnostics["note"]
    assert found.diagnostics["null_space"] >= TextEncoder.of(base).length - 1
    assert SepME(**QUICK).solve(EditProblem(base, CAT, many)).delta == found.delta
    encoder = TextEncoder.of(base)
    assert isinstance(found.delta, LowRank)
    cat, *listed = (encoder.hidden([name])[0] for name in ("cat", *held))
    for up, down in found.delta.factors.values():
        for prompt in listed:
            assert (prompt @ down.T @ up.T).norm() < 1e-3 * (cat @ down.T @ up.T).norm()


def test_where_there_is_room_all_are_left_undisturbed(base: Base) -> None:
    found = SepME(**QUICK).solve(EditProblem(base, CAT, (DOG, CAR)))
    assert not found.record
    assert "note" not in found.diagnostics


def test_the_nearest_are_those_that_have_most_in_common() -> None:
    rng = torch.Generator().manual_seed(0)
    begin, own = torch.randn(1, 12, generator=rng), torch.randn(3, 12, generator=rng)
    other, near = torch.randn(3, 3, 12, generator=rng), own + 0.3 * torch.randn(3, 12, generator=rng)
    rows = [torch.cat([begin, each]) for each in (own, other[0], near, other[1], other[2])]
    always = torch.cat([begin, torch.randn(3, 12, generator=rng)])[None]
    chosen = that_fit(rows[0], always, torch.stack(rows[1:]))
    assert chosen
    assert 1 in chosen
    assert len(chosen) < 4


def test_the_preset_has_the_papers_settings_but_for_step_sizes_and_pictures() -> None:
    preset = SepME.preset("emoji")
    assert (preset.tolerance, preset.sentences, preset.tau) == (0.0, 0, 1e-4)


def test_a_shared_scale_is_that_of_each_direction_times_their_number(base: Base) -> None:
    problem = EditProblem(base, CAT, (DOG,))
    each = SepME(**QUICK).solve(problem)
    shared = SepME(**{**QUICK, "beta": QUICK["beta"] * each.diagnostics["null_space"], "shared": True}).solve(problem)
    assert isinstance(each.delta, LowRank)
    assert isinstance(shared.delta, LowRank)
    for name, (up, down) in each.delta.factors.items():
        other = shared.delta.factors[name]
        assert torch.allclose(other[0] @ other[1], up @ down, rtol=1e-3, atol=1e-6 * float((up @ down).abs().max()))
    assert "shared" not in settings_of(SepME()), "patches of before keep their inputs"


def test_a_balanced_basis_spans_the_same_space_and_prompts_have_equally_much_of_its_directions() -> None:
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 5, generator=rng)).Q
    hidden = torch.randn(30, 4, 12, generator=rng) * torch.linspace(0.5, 2.0, 12)
    hidden[:, 0] = 9.0  # begin-of-text, the same in all
    found = balanced(basis, moment_within(basis, hidden))
    assert found.shape == basis.shape
    assert torch.allclose(basis @ (basis.T @ found), found, atol=1e-5), "nothing outside of the space"
    assert float(found.square().sum()) == pytest.approx(5.0, rel=1e-4), "columns are as long, on average"
    inside = hidden[:, 1:].reshape(-1, 12) @ found
    moment = inside.T @ inside
    least, most = (float(f(moment.diagonal())) for f in (torch.min, torch.max))
    assert most < 1.15 * least, "but for the floor under the weakest"
    assert (moment - moment.diagonal().diag()).abs().max() < 1e-3 * least
    pooled = balanced(basis, moment_within(basis, hidden[:, 1:2]))
    assert torch.allclose(basis @ (basis.T @ pooled), pooled, atol=1e-5)


def test_where_prompts_have_nothing_of_the_null_space_its_basis_is_as_it_was() -> None:
    basis = torch.eye(6)[:, :3]
    hidden = torch.zeros(4, 3, 6)
    hidden[..., 3:] = 1.0
    found = balanced(basis, moment_within(basis, hidden))
    assert torch.allclose(found.T @ found, torch.eye(3), atol=1e-6)


@pytest.mark.parametrize("balance", [0, 20])
def test_increments_trained_together_leave_each_others_prompts_alone(base: Base, balance: int) -> None:
    problem = EditProblem(base, CAT, (DOG, CAR))
    solver = SepME(**QUICK, balance=balance)
    found = solver.together(problem, (DOG, CAT))
    for same in (solver.together(problem, (CAT, DOG)), solver.together(EditProblem(base, DOG, (CAT, CAR)), (DOG, CAT))):
        assert {name: s.delta for name, s in found.items()} == {name: s.delta for name, s in same.items()}
    encoder = TextEncoder.of(base)
    for own, other in (("cat", "dog"), ("dog", "cat")):
        delta = found[own].delta
        assert isinstance(delta, LowRank)
        mine, theirs = (encoder.hidden([name])[0] for name in (own, other))
        for up, down in delta.factors.values():
            assert (theirs @ down.T @ up.T).norm() < 1e-3 * (mine @ down.T @ up.T).norm()


def test_an_increment_has_no_more_directions_than_its_projection_has_rows(base: Base) -> None:
    factors = SepME(**QUICK).solve(EditProblem(base, CAT)).delta
    assert isinstance(factors, LowRank)
    assert all(up.shape[1] <= len(up) for up, _ in factors.factors.values())
    whole = [up for up, _ in factors.factors.values() if up.shape[1] == len(up)]
    assert whole, "a null space wider than a projection is what this is about"
    assert all(torch.equal(up, torch.eye(len(up))) for up in whole)


def test_joint_training_preserves_its_own_increment(base: Base) -> None:
    """Increments do not disturb each other; the weights eta and the shared norm are what joint training adds."""
    problem = EditProblem(base, CAT, (DOG,))
    joint = SepME(**QUICK, joint=True).solve(problem).delta
    assert joint == SepME(**QUICK).together(problem, (CAT, DOG))["cat"].delta
    assert joint != SepME(**QUICK).solve(problem).delta


def test_without_decoupling_all_cross_attention_weights_are_trained(base: Base) -> None:
    delta = SepME.preset("whole", **QUICK, lr=1e-3).solve(EditProblem(base, CAT, (DOG,))).delta
    assert isinstance(delta, Dense)
    assert {name.rsplit(".", 2)[-2] for name in delta.changes} == {"to_q", "to_k", "to_v", "0"}
    assert all(".attn2." in name for name in delta.changes)


def test_training_lowers_the_correlation(base: Base) -> None:
    """On the very latents that are trained on: the second step of the same draw is better than the first."""
    base_line = SepME(iterations=1, pictures=1, steps=2, beta=0.1, batch=4)
    first = base_line.solve(EditProblem(base, CAT)).diagnostics["correlation"]
    later = SepME(iterations=40, pictures=1, steps=2, beta=0.1, batch=4, tau=-1.0).solve(EditProblem(base, CAT))
    assert later.diagnostics["correlation"] < first


def test_it_stops_when_the_average_falls_to_tau(base: Base) -> None:
    found = SepME(iterations=40, warm_up=2, pictures=2, steps=2, tau=1e6).solve(EditProblem(base, CAT)).diagnostics
    assert found["stopped_early"]
    assert found["iterations"] == 4


def test_a_tolerance_leaves_room_where_the_numerical_null_space_is_small(base: Base) -> None:
    encoder = TextEncoder.of(base)
    many = ["", "dog", "car", "fox", "bus", "sun"]
    exact, rank = null_space(encoder.hidden(many))
    wider, used = null_space(encoder.hidden(many), tolerance=0.1)
    assert used < rank
    assert wider.shape[1] > exact.shape[1]
    begin = encoder.hidden([""])[0, 0]
    assert (begin @ wider).norm() < 1e-4 * begin.norm(), "begin-of-text is never disturbed"


def test_it_can_train_on_sentences(base: Base) -> None:
    bare, phrases = SepME(**QUICK), SepME(**QUICK, sentences=4)
    problem = EditProblem(base, CAT, (DOG,))
    assert phrases.solve(problem).delta == phrases.solve(problem).delta
    assert phrases.solve(problem).delta != bare.solve(problem).delta


def test_an_empty_null_space_is_reported_plainly(tmp_path: Path) -> None:
    pipe = tiny_pipeline(width=16)
    # An untrained layer norm makes every embedding orthogonal to the vector of ones; a trained one does not.
    torch.nn.init.normal_(pipe.text_encoder.final_layer_norm.bias)
    pipe.save_pretrained(tmp_path / "narrow")
    many = tuple(Concept(name) for name in ("dog", "fox", "car", "bus", "sun", "moon", "tree", "rose", "house"))
    with pytest.raises(Unsolvable, match="no null space left"):
        SepME(iterations=1).solve(EditProblem(Base.open(tmp_path / "narrow"), CAT, many))
