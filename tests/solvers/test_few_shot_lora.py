"""Few-shot unlearning at low rank: born low-rank, and what should be retained is."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.patches.delta import LowRank, Sum, TextMap
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.sentences import retained_prompts, training_prompts
from overpaint.solvers.trained.few_shot import FewShotLoRA
from overpaint.testing import SolverContract
from tests.solvers.learning import CAR, CAT, DOG, moved, solve

QUICK: dict[str, Any] = {
    "steps": 10,
    "lr": 1e-2,
    "batch": 4,
    "pictures": 2,
    "sampling_steps": 2,
    "sentences": 4,
    "rank": 2,
    "layers": 1,
    "retained": 24,
    "retain_batch": 8,
}


class TestContract(SolverContract):
    solver = FewShotLoRA
    quick = MappingProxyType({**QUICK, "steps": 2})


def test_the_change_is_born_low_rank(base: Base) -> None:
    delta = solve(base, FewShotLoRA(**{**QUICK, "steps": 2})).delta
    assert isinstance(delta, Sum)
    projection, adapters = delta.parts
    assert isinstance(projection, TextMap)
    assert isinstance(adapters, LowRank)
    assert projection.up.shape == (64, 2)
    assert {up.shape[1] for up, _ in adapters.factors.values()} == {2}
    assert len(adapters.factors) == 6
    assert all(".layers.1." in name and name.endswith(".weight") for name in adapters.factors)


def test_retained_prompts_move_less_when_they_weigh_more(base: Base) -> None:
    loose, held = (solve(base, FewShotLoRA(**QUICK, retain=weight)).delta for weight in (0.0, 1000.0))
    assert moved(base, held, "a photo of a dog") < 0.5 * moved(base, loose, "a photo of a dog")


def test_the_projection_shrinks_when_its_norm_weighs_much(base: Base) -> None:
    sizes = []
    for weight in (0.0, 100.0):
        projection = solve(base, FewShotLoRA(**QUICK, shrink=weight)).delta.parts[0]
        assert isinstance(projection, TextMap)
        sizes.append((projection.up @ projection.down.T).norm())
    assert sizes[1] < 0.5 * sizes[0]


def test_retained_prompts_never_name_the_concept(base: Base) -> None:
    concept = Concept("cat", synonyms=("fox",))
    found = retained_prompts(EditProblem(base, concept, (CAT, DOG, CAR)), TextEncoder.of(base), 60)
    assert found[0] == ""
    assert not any({"cat", "fox"} & set(prompt.split()) for prompt in found)
    assert sum("dog" in prompt or "car" in prompt for prompt in found) >= 20, "the universe speaks for itself"
    assert any("moon" in prompt for prompt in found), "and the vocabulary for everything else"
    assert found == retained_prompts(EditProblem(base, concept, (CAR, CAT, DOG)), TextEncoder.of(base), 60)


def test_prompts_are_spread_over_sentences_and_words_with_what_should_stand_there_instead(base: Base) -> None:
    encoder = TextEncoder.of(base)
    concept = Concept("cat", synonyms=("fox",))
    problem = EditProblem(base, concept)
    assert training_prompts(problem, encoder, 0) == [("cat", ""), ("fox", "")]
    found = training_prompts(problem, encoder, 6)
    assert len(found) == 6
    assert {"cat", "fox"} == {word for prompt, _ in found for word in prompt.split() if word in ("cat", "fox")}
    assert all("cat" not in without and "fox" not in without for _, without in found)
    anchored = EditProblem(base, Concept("cat", anchor="dog"))
    assert training_prompts(anchored, encoder, 0) == [("cat", "dog")]
    assert all(prompt.replace("cat", "dog") == other for prompt, other in training_prompts(anchored, encoder, 8))
    assert len(training_prompts(problem, encoder, 1000)) == 20, "never more than there are"


def test_the_concepts_own_prompts_and_preserved_prompts_are_used(base: Base) -> None:
    encoder = TextEncoder.of(base)
    problem = EditProblem(base, Concept("cat", prompts=("a cat by the moon",)), preserve_prompts=("art by the sun",))
    assert training_prompts(problem, encoder, 0) == [("a cat by the moon", "a by the moon"), ("cat", "")]
    assert training_prompts(problem, encoder, 3)[0] == ("a cat by the moon", "a by the moon")
    assert retained_prompts(problem, encoder, 4)[:2] == ["", "art by the sun"]
