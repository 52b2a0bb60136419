"""UCE: the text map is the published dense formula, for every projection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.patches.delta import TextMap
from overpaint.solvers.closed_form.edits import KeyChoice, TextEdit
from overpaint.solvers.closed_form.uce import UCE
from overpaint.solvers.problem import EditProblem, Unsolvable
from overpaint.testing import SolverContract

CAT, DOG, CAR, FOX = (Concept(name) for name in ("cat", "dog", "car", "fox"))


class TestContract(SolverContract):
    solver = UCE


class TestContractOfThePreset(SolverContract):
    solver = UCE
    quick = UCE.PRESETS["emoji"]


def last_token(encoder: TextEncoder, name: str) -> Tensor:
    """The embedding of the token before end-of-text, as the paper's code picks it: float64 [d]."""
    return encoder.hidden([name])[0, len(encoder.tokens(name))].double()


def last_tokens(problem: EditProblem) -> TextEdit:
    """The edit of the one text input, whose keys are last tokens of bare words."""
    return TextEdit(problem, "text_encoder", TextEncoder.of(problem.base), KeyChoice())


def published(weight: Tensor, pairs: list[tuple[Tensor, Tensor]], kept: list[Tensor], ridge: float) -> Tensor:
    """Equation 7 as it is printed, for one projection: float64 [out, d]."""
    eye = torch.eye(weight.shape[1], dtype=torch.float64)
    left, right = ridge * weight, ridge * eye
    for key, value in pairs:
        left = left + torch.outer(weight @ value, key)
        right = right + torch.outer(key, key)
    for key in kept:
        left = left + torch.outer(weight @ key, key)
        right = right + torch.outer(key, key)
    found: Tensor = left @ torch.linalg.inv(right)
    return found


@pytest.mark.parametrize("names", [["cat"], ["cat", "fox"]])
def test_the_text_map_is_the_published_dense_formula_for_every_projection(base: Base, names: list[str]) -> None:
    encoder, erased = TextEncoder.of(base), [Concept(name) for name in names]
    problem = EditProblem(base, erased[0], (CAT, DOG, CAR, FOX))
    edit, _ = UCE().edit(last_tokens(problem), erased)
    pairs = [(last_token(encoder, name), last_token(encoder, "")) for name in names]
    kept = [last_token(encoder, c.name) for c in (CAR, CAT, DOG, FOX) if c.name not in names]
    for name in base.projections():
        weight = base.tensor(name).double()
        dense = published(weight, pairs, kept, ridge=0.5)
        ours = weight + weight @ edit.up @ edit.down.T
        # float64 rounding, through an inverse of condition 1e3.
        assert (ours - dense).norm() < 1e-10 * dense.norm()


def test_the_concept_is_moved_to_its_anchor(base: Base) -> None:
    encoder = TextEncoder.of(base)
    concept = Concept("cat", anchor="dog")
    edit, _ = UCE(ridge=1e-9).edit(last_tokens(EditProblem(base, concept)), [concept])
    moved = edit(last_token(encoder, "cat")[:, None])[:, 0]
    assert torch.allclose(moved, last_token(encoder, "dog"), atol=1e-6)


def test_several_concepts_are_erased_together_in_any_order(base: Base) -> None:
    problem = EditProblem(base, CAT, (DOG, CAR, FOX))
    together = UCE().joint(problem, [CAT, FOX])
    assert together.delta == UCE().joint(problem, [FOX, CAT]).delta
    assert isinstance(together.delta, TextMap)
    assert together.delta.up.shape[1] == 2


def test_the_joint_solution_is_not_the_sum_of_single_ones(base: Base) -> None:
    """Why `separable` exists: what one edit does not know of, it disturbs."""
    problem = EditProblem(base, CAT)

    def change(*names: str) -> Tensor:
        delta = UCE().joint(problem, [Concept(name) for name in names]).delta
        assert isinstance(delta, TextMap)
        return delta.up @ delta.down.T

    joint = change("cat", "fox")
    assert (change("cat") + change("fox") - joint).norm() > 0.01 * joint.norm()


def test_preserved_prompts_move_less(base: Base) -> None:
    encoder = TextEncoder.of(base)
    sentence = encoder.hidden(["a dog in the room"])[0].double().T
    free, _ = UCE().edit(last_tokens(EditProblem(base, CAT)), [CAT])
    held, _ = UCE(keep="a dog in the room", preserve_scale=100.0).edit(last_tokens(EditProblem(base, CAT)), [CAT])
    assert (held(sentence) - sentence).norm() < 0.5 * (free(sentence) - sentence).norm()


def test_nothing_to_erase_and_an_anchor_with_the_same_embeddings_are_refused(base: Base) -> None:
    with pytest.raises(Unsolvable, match="name at least one concept"):
        UCE().joint(EditProblem(base, CAT), [])
    with pytest.raises(Unsolvable, match="name another anchor"):
        UCE().solve(EditProblem(base, Concept("cat", anchor=" cat")))


def test_a_rank_that_is_asked_for_is_not_exceeded(base: Base) -> None:
    delta = UCE(positions="all", spoken=True, rank=3).solve(EditProblem(base, CAT)).delta
    assert isinstance(delta, TextMap)
    assert delta.up.shape[1] == 3
