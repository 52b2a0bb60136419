"""The separable solver: the sum of patches is the joint solution, and a patch moves its own concept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound
from overpaint.patches.delta import TextMap
from overpaint.solvers import solver_class
from overpaint.solvers.closed_form.separable import MOST, TARGETS, Metric, Separable, favouring
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.sentences import AVERAGED, AverageWord, keys_and_values
from overpaint.solvers.universe import VOCABULARY, Universe, universe

CAT, DOG, CAR = Concept("cat"), Concept("dog"), Concept("car")
EXACT: dict[str, Any] = {
    **{"ridge": 1e-3, "weight": 2.0, "rank": 64, "energy": 1.0, "reach": 1.5, "share": 0.0, "target": "nothing"},
    "vocabulary_weight": VOCABULARY,
}
"""Settings under which nothing is cut off and no concept is favoured."""


def told(base: Base, concepts: tuple[Concept, ...]) -> Universe:
    """The universe of these settings."""
    return universe(base, concepts, EXACT["ridge"], EXACT["weight"], torch.device("cpu"))


def test_an_unknown_solver_is_named_with_the_nearest() -> None:
    with pytest.raises(NotFound, match="did you mean 'separable'"):
        solver_class("seperable")


@pytest.mark.parametrize("share", [0.0, 0.8])
def test_the_sum_of_separable_patches_is_the_joint_solution(base: Base, share: float) -> None:
    """The theorem of the module's docstring, for every subset, in float64, before any truncation."""
    concepts = (CAT, DOG, CAR)
    known = told(base, concepts)
    a = known.cholesky @ known.cholesky.T
    eye = torch.eye(len(a), dtype=torch.float64)
    for subset in ((CAT,), (CAT, DOG), (DOG, CAR), concepts):
        joint = eye.clone()
        total = eye.clone()
        right = a.clone()
        for concept in subset:
            k, v = known.keys[concept.name], known.values[concept.name]
            solution = Separable(**EXACT | {"share": share}).solve(EditProblem(base, concept, concepts))
            delta, gain = solution.delta, solution.diagnostics["gain"]
            assert 1 < gain <= EXACT["reach"]
            way = favouring(Metric(known.cholesky), k, v - k, share, weight=2.0)
            assert (torch.equal(way, v - k)) == (share == 0.0)
            right += 2.0 * gain * way @ k.T
            assert isinstance(delta, TextMap)
            total += delta.up.double() @ delta.down.double().T
        joint = torch.linalg.solve(a, right, left=False)
        # float32 factors of a float64 solution.
        assert (total - joint).norm() < 1e-5 * joint.norm()


def test_a_concepts_own_keys_may_weigh_more_than_those_that_are_to_be_kept(base: Base) -> None:
    """With `share`, the term is `f w way K^T (A + (f - 1) w K K^T)^-1`, f the least with which keys go that share."""
    known = told(base, (CAT, DOG, CAR))
    k, way = known.keys["cat"], known.values["cat"] - known.keys["cat"]
    a = known.cholesky @ known.cholesky.T
    plain = Separable(**EXACT | {"reach": 1.0})
    went = []
    for share in (0.0, 0.8):
        solution = replace(plain, share=share).solve(EditProblem(base, CAT, (DOG, CAR)))
        assert isinstance(solution.delta, TextMap)
        term = solution.delta.up.double() @ solution.delta.down.double().T
        went.append(float((way * (term @ k)).sum() / way.square().sum()))
    assert went[0] < 0.75, "there is something to favour"
    assert abs(went[1] - 0.8) < 1e-3
    # The least f that does it, found by trying.
    low, high = 1.0, MOST
    for _ in range(60):
        f = (low * high) ** 0.5
        direct = f * 2.0 * way @ k.T @ torch.linalg.inv(a + (f - 1) * 2.0 * k @ k.T)
        low, high = (low, f) if float((way * (direct @ k)).sum() / way.square().sum()) > 0.8 else (f, high)
    assert (term - direct).norm() < 1e-4 * direct.norm()


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

    # Least squares goes most of the way; sent to the average word, a cat comes nearer to a dog, but not to it.
    assert left(cat_to_dog) < 0.5 < left(CAT)


def test_without_an_anchor_a_concept_goes_to_the_average_word_or_to_nothing(base: Base) -> None:
    encoder = TextEncoder.of(base)
    single = [word for word in encoder.words() if len(encoder.tokens(word)) == 1]
    assert 1 < len(single) <= AVERAGED, "all of them make up the average here"
    keys, values = keys_and_values(encoder, base, CAT, AverageWord(encoder))
    plain, nothing = keys_and_values(encoder, base, CAT)
    assert torch.equal(keys, plain)
    # The first sentence is the bare name: its first place has the word's own token.
    wanted = torch.stack([encoder.hidden([word])[0, 1].double() for word in single]).mean(0)
    weight = keys[:, 0].norm() / encoder.hidden(["cat"])[0, 1].double().norm()
    assert (values[:, 0] / weight - wanted).norm() < 1e-4 * wanted.norm()
    assert (values - nothing).norm() > 0.1 * nothing.norm()
    sent = [Separable(target=target).solve(EditProblem(base, CAT, (DOG,))).delta for target in TARGETS]
    assert sent[0] != sent[1]
    # An anchor says where to go; then there is nothing to average.
    anchored = Concept("cat", anchor="dog")
    assert torch.equal(
        keys_and_values(encoder, base, anchored, AverageWord(encoder))[1], keys_and_values(encoder, base, anchored)[1]
    )


def test_a_word_of_several_tokens_goes_to_where_the_average_word_has_one(base: Base) -> None:
    encoder = TextEncoder.of(base)
    (several,) = [name for name in ("catdog",) if len(encoder.tokens(name)) > 1]
    averages = AverageWord(encoder)
    keys, values = keys_and_values(encoder, base, Concept(several), averages)
    assert keys.shape == values.shape
    own = values / values.norm(dim=0)
    extra = len(encoder.tokens(several)) - 1
    for place in range(extra):
        assert torch.allclose(own[:, place], own[:, extra]), "each token goes to the one place of the word"


def test_a_concept_beyond_the_end_of_the_prompt_is_refused(base: Base) -> None:
    with pytest.raises(Exception, match="use a shorter name"):
        Separable().solve(EditProblem(base, Concept("cat dog fox car bus sun moon tree rose house person a of the in")))
