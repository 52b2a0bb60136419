"""The solver contract, inherited by every member, and what each one alone promises."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.bases.text import TextEncoder
from overpaint.concepts import Concept
from overpaint.errors import NotFound
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import LowRank, TextMap
from overpaint.solvers import SOLVERS, solver_class
from overpaint.solvers.problem import BadSetting, EditProblem, Solver, Unsolvable, configure, settings_of
from overpaint.solvers.separable import Separable
from overpaint.solvers.sepme import SepME, null_space
from overpaint.solvers.universe import universe
from tests.conftest import tiny_pipeline

CAT, DOG, CAR = Concept("cat"), Concept("dog"), Concept("car")
QUICK = {"sepme": {"iterations": "3", "pictures": "2", "steps": "2", "beta": "0.1"}, "separable": {}}


@pytest.fixture(params=sorted(SOLVERS))
def solver(request: pytest.FixtureRequest) -> Solver:
    return configure(solver_class(request.param), QUICK[request.param])


class TestContract:
    def test_the_base_is_bit_identical_afterwards(self, base: Base, solver: Solver) -> None:
        before = {name: base.tensor(name) for name in base.names}
        solver.solve(EditProblem(base, CAT, (DOG,)))
        assert all(torch.equal(base.tensor(name), tensor) for name, tensor in before.items())

    def test_the_same_seed_gives_the_same_bits(self, base: Base, base_folder: str, solver: Solver) -> None:
        first = solver.solve(EditProblem(base, CAT, (DOG, CAR), seed=3)).delta.tensors()
        again = solver.solve(EditProblem(Base.open(base_folder), CAT, (DOG, CAR), seed=3)).delta.tensors()
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)

    def test_the_order_of_the_universe_changes_nothing(self, base: Base, solver: Solver) -> None:
        first = solver.solve(EditProblem(base, CAT, (DOG, CAR))).delta.tensors()
        turned = solver.solve(EditProblem(base, CAT, (CAR, CAT, DOG))).delta.tensors()
        assert all(torch.equal(first[name], turned[name]) for name in first)

    def test_only_cross_attention_keys_and_values_are_touched(self, base: Base, solver: Solver) -> None:
        delta = solver.solve(EditProblem(base, CAT)).delta
        assert delta.targets(base) == base.readers()

    def test_it_composes_with_the_other_solvers(self, base: Base, solver: Solver) -> None:
        own = solver.solve(EditProblem(base, CAT, (DOG,))).delta
        other = Separable().solve(EditProblem(base, DOG, (CAT,))).delta
        assert set(compose(base, [Term("a", own), Term("b", other)])) == set(base.readers())

    def test_it_changes_something(self, base: Base, solver: Solver) -> None:
        composed = compose(base, [Term("a", solver.solve(EditProblem(base, CAT)).delta)])
        assert any(not torch.equal(base.tensor(name), tensor) for name, tensor in composed.items())

    def test_progress_is_told_in_order_or_not_at_all(self, base: Base, solver: Solver) -> None:
        steps: list[int] = []
        solver.solve(EditProblem(base, CAT, report=lambda step, of, text: steps.append(step)))
        assert steps == sorted(steps)

    def test_settings_are_the_fields_and_every_field_is_explained(self, solver: Solver) -> None:
        fields = dataclasses.fields(type(solver))  # type: ignore[arg-type]
        assert set(settings_of(solver)) == {f.name for f in fields}
        assert all(f.metadata["about"] for f in fields)


def test_an_unknown_solver_is_named_with_the_nearest() -> None:
    with pytest.raises(NotFound, match="did you mean separable"):
        solver_class("seperable")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rnak": "3"}, "did you mean rank"),
        ({"rank": "many"}, "not a int"),
        ({"rank": "0"}, "at least 1"),
        ({"energy": "2"}, "between"),
    ],
)
def test_a_bad_setting_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        configure(Separable, settings)


def test_the_sum_of_separable_patches_is_the_joint_solution(base: Base) -> None:
    """The theorem of the module's docstring, for every subset, in float64, before any truncation."""
    concepts = (CAT, DOG, CAR)
    known = universe(base, concepts, ridge=1e-3, weight=2.0, device=torch.device("cpu"))
    a = known.cholesky @ known.cholesky.T
    eye = torch.eye(len(a), dtype=torch.float64)
    for subset in ((CAT,), (CAT, DOG), (DOG, CAR), concepts):
        joint = eye.clone()
        total = eye.clone()
        right = a.clone()
        for concept in subset:
            k, v = known.keys[concept.name], known.values[concept.name]
            solver = Separable(ridge=1e-3, weight=2.0, rank=64, energy=1.0)
            solution = solver.solve(EditProblem(base, concept, concepts))
            delta, gain = solution.delta, solution.diagnostics["gain"]
            assert 1 < gain <= solver.reach
            right += 2.0 * gain * (v - k) @ k.T
            assert isinstance(delta, TextMap)
            total += delta.up.double() @ delta.down.double().T
        joint = torch.linalg.solve(a, right, left=False)
        # float32 factors of a float64 solution.
        assert (total - joint).norm() < 1e-5 * joint.norm()


def test_a_separable_patch_moves_its_concept_and_hardly_anything_else(base: Base) -> None:
    concepts = (CAT, DOG, CAR)
    delta = Separable(rank=16, ridge=1e-6).solve(EditProblem(base, CAT, concepts)).delta
    assert isinstance(delta, TextMap)
    known = universe(base, concepts, ridge=1e-6, weight=2.0, device=torch.device("cpu"))

    def moved(name: str) -> float:
        k = known.keys[name]
        found: float = ((delta.up.double() @ (delta.down.double().T @ k)).norm() / k.norm()).item()
        return found

    assert moved("cat") > 3 * max(moved("dog"), moved("car"))


def test_the_anchor_is_where_a_concept_is_sent(base: Base) -> None:
    to_dog = Separable(rank=16).solve(EditProblem(base, Concept("cat", anchor="dog"), (CAR,)))
    to_nothing = Separable(rank=16).solve(EditProblem(base, CAT, (CAR,)))
    assert not torch.equal(to_dog.delta.tensors()["text_encoder/up"], to_nothing.delta.tensors()["text_encoder/up"])


def test_the_null_space_is_orthogonal_to_every_listed_prompt(base: Base) -> None:
    encoder = TextEncoder.of(base)
    basis, rank = null_space(encoder, ["", "dog", "car"])
    stacked = encoder.hidden(["", "dog", "car"]).reshape(-1, encoder.width)
    assert basis.shape == (encoder.width, encoder.width - rank)
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)
    # Rounding of a float32 encoder times the size of its embeddings.
    assert (stacked @ basis).abs().max() < 1e-4 * stacked.norm(dim=1).max()


def test_sepme_leaves_listed_prompts_alone_and_changes_its_own(base: Base) -> None:
    settings = SepME(iterations=3, pictures=2, steps=2, beta=0.1)
    delta = settings.solve(EditProblem(base, CAT, (DOG,))).delta
    assert isinstance(delta, LowRank)
    encoder = TextEncoder.of(base)
    dog, cat = (encoder.hidden([word])[0] for word in ("dog", "cat"))
    for up, down in delta.factors.values():
        assert (dog @ down.T @ up.T).norm() < 1e-3 * (cat @ down.T @ up.T).norm()


def test_a_tolerance_leaves_room_where_the_numerical_null_space_is_small(base: Base) -> None:
    encoder = TextEncoder.of(base)
    many = ["", "dog", "car", "fox", "bus", "sun"]
    exact, rank = null_space(encoder, many)
    wider, used = null_space(encoder, many, tolerance=0.1)
    assert used < rank
    assert wider.shape[1] > exact.shape[1]
    begin = encoder.hidden([""])[0, 0]
    assert (begin @ wider).norm() < 1e-4 * begin.norm(), "begin-of-text is never disturbed"


def test_sepme_can_train_on_sentences(base: Base) -> None:
    bare = SepME(iterations=2, pictures=2, steps=2, beta=0.1)
    spoken = SepME(iterations=2, pictures=2, steps=2, beta=0.1, sentences=4)
    problem = EditProblem(base, CAT, (DOG,))
    ups = [next(iter(s.solve(problem).delta.tensors().items()))[1] for s in (bare, spoken, spoken)]
    assert torch.equal(ups[1], ups[2])
    assert not torch.equal(ups[0], ups[1])


def test_an_empty_null_space_is_said_plainly(tmp_path: Path) -> None:
    pipe = tiny_pipeline(width=16)
    # An untrained layer norm makes every embedding orthogonal to the vector of ones; a trained one does not.
    torch.nn.init.normal_(pipe.text_encoder.final_layer_norm.bias)
    pipe.save_pretrained(tmp_path / "narrow")
    many = tuple(Concept(name) for name in ("dog", "fox", "car", "bus", "sun", "moon", "tree", "rose", "house"))
    with pytest.raises(Unsolvable, match="no null space left"):
        SepME(iterations=1).solve(EditProblem(Base.open(tmp_path / "narrow"), CAT, many))


def test_a_concept_past_the_end_of_the_prompt_is_refused(base: Base) -> None:
    with pytest.raises(Exception, match="use a shorter name"):
        Separable().solve(EditProblem(base, Concept("cat dog fox car bus sun moon tree rose house person a of the in")))
