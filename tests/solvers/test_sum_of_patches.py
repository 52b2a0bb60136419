"""The separable solver: the sum of patches is the joint solution, and a patch moves its own concept."""

from __future__ import annotations

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound
from overpaint.patches.delta import TextMap
from overpaint.solvers import solver_class
from overpaint.solvers.closed_form.separable import Separable
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.universe import universe

CAT, DOG, CAR = Concept("cat"), Concept("dog"), Concept("car")


def test_an_unknown_solver_is_named_with_the_nearest() -> None:
    with pytest.raises(NotFound, match="did you mean 'separable'"):
        solver_class("seperable")


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
    cat_to_dog = Concept("cat", anchor="dog")
    known = universe(base, (cat_to_dog, CAR), ridge=1e-3, weight=1.0, device=torch.device("cpu"))
    keys, targets = known.keys["cat"], known.values["cat"]

    def left(concept: Concept) -> float:
        """How far from the anchor's embeddings the patch leaves the concept's, relative to how far they were."""
        delta = Separable(rank=16).solve(EditProblem(base, concept, (CAR,))).delta
        assert isinstance(delta, TextMap)
        sent = keys + delta.up.double() @ (delta.down.double().T @ keys)
        return float((sent - targets).norm() / (keys - targets).norm())

    # Least squares goes most of the way; sent to nothing, a cat is no nearer to a dog than it was.
    assert left(cat_to_dog) < 0.5
    assert left(CAT) > 1


def test_a_concept_beyond_the_end_of_the_prompt_is_refused(base: Base) -> None:
    with pytest.raises(Exception, match="use a shorter name"):
        Separable().solve(EditProblem(base, Concept("cat dog fox car bus sun moon tree rose house person a of the in")))
