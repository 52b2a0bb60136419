"""A model and a judge with a script: pictures say what they show, so that suites are tested in milliseconds.

A model is a function of the concepts that are erased and of the question; it returns the class by head that its picture shows.
Weights, patches and the live pipeline are real ones, of the tiny base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.evaluation.context import EvalContext, EvaluatedPatch
from overpaint.evaluation.images import ImageCache, ImageGenerator, Sampler
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.prompts import EvalPrompt, ListedPrompts, PromptSet
from overpaint.patches.compose import Term
from overpaint.patches.delta import TextMap
from overpaint.patches.patch import make_patch

Model = Callable[[frozenset[str], EvalPrompt], Mapping[str, str]]
CONCEPTS = (
    Concept("cat", "object", ("kitty", "feline")),
    Concept("fox"),
    Concept("sun"),
    Concept("rose"),
    Concept("bus"),
    Concept("ink", "style"),
)
HEADS = ("object", "style")


def faithful(erased: frozenset[str], question: EvalPrompt) -> Mapping[str, str]:
    """What an eraser should do: the erased concept becomes something else, all others stay."""
    return {head: "nothing" if name in erased else name for head, name in question.shows.items()}


def idle(erased: frozenset[str], question: EvalPrompt) -> Mapping[str, str]:
    """A planted defect: the patches erase nothing."""
    return question.shows


def wrecked(erased: frozenset[str], question: EvalPrompt) -> Mapping[str, str]:
    """A planted defect: the patches destroy everything."""
    return dict.fromkeys(question.shows, "nothing") if erased else question.shows


def broken(erased: frozenset[str], question: EvalPrompt) -> Mapping[str, str]:
    """A base that draws nothing right, or a judge that sees nothing: it cannot be told which."""
    return dict.fromkeys(question.shows, "nothing")


class Script(ImageGenerator):
    """Draws pictures that hold the numbers of the classes they show; `erases` says what each patch erases."""

    def __init__(self, base: Base, prompt_set: PromptSet, model: Model, erases: dict[str, set[str]]) -> None:
        super().__init__(base, Sampler(steps=1), ImageCache(None), torch.device("cpu"))
        self.prompt_set, self.model, self.erases = prompt_set, model, erases
        self.drawn = 0

    def draw(self, terms: Sequence[Term], questions: Sequence[EvalPrompt]) -> NDArray[np.uint8]:
        self.drawn += len(questions)
        erased = frozenset().union(*(self.erases.get(term.id, set()) for term in terms))
        pictures = np.zeros((len(questions), 2, 2, 3), np.uint8)
        for picture, question in zip(pictures, questions, strict=True):
            for column, head in enumerate(HEADS):
                shown = self.model(erased, question).get(head, "nothing")
                names = (*self.prompt_set.names(head), "nothing")
                picture[0, column] = names.index(shown)
        return pictures


class Reader:
    """Reads what `Script` wrote. The class "nothing" is in no world, so a picture of it is wrong whatever was asked."""

    name = "reader"

    def __init__(self, prompt_set: PromptSet) -> None:
        self.heads = {head: (*prompt_set.names(head), "nothing") for head in HEADS}

    def probabilities(self, pictures: NDArray[np.uint8], head: str) -> NDArray[np.float32]:
        found = np.full((len(pictures), len(self.heads[head])), 0.01, np.float32)
        found[np.arange(len(pictures)), pictures[:, 0, HEADS.index(head), 0]] = 0.9
        return found

    def features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        return pictures.reshape(len(pictures), -1).astype(np.float32)


def context(base: Base, model: Model, concepts: Iterable[Concept] = CONCEPTS, **other: Any) -> EvalContext:
    """A bench on which one patch erases each of `concepts`, under a scripted model."""
    prompt_set = ListedPrompts(CONCEPTS)
    held = tuple(_held(base, concept, seed) for seed, concept in enumerate(concepts))
    erases = {each.term.id: {each.concept.name} for each in held}
    return EvalContext(
        base, prompt_set, Reader(prompt_set), Script(base, prompt_set, model, erases), held, CONCEPTS, **other
    )


def _held(base: Base, concept: Concept, seed: int) -> EvaluatedPatch:
    rng = torch.Generator().manual_seed(seed)
    delta = TextMap("text_encoder", torch.randn(64, 1, generator=rng) / 8, torch.randn(64, 1, generator=rng) / 8)
    universe = [other.as_json() for other in CONCEPTS if other != concept]
    solver = {"name": "separable", "settings": {}, "seed": 0, "universe": universe}
    return EvaluatedPatch(make_patch(base, concept, delta, solver), 1.0, 0.5, 1000)


def value(rows: Iterable[Measurement], subject: str, metric: str) -> float:
    """The one number that was found of `metric` about `subject`."""
    (row,) = [row for row in rows if (row.subject, row.metric) == (subject, metric)]
    return row.value


def one_class(prompt_set: PromptSet) -> Any:
    """A judge hook for tests of the plumbing: it knows cats alone, and sees one everywhere."""

    class Cats:
        name = "cats"
        heads: Mapping[str, tuple[str, ...]] = {"object": ("cat",)}

        def probabilities(self, pictures: NDArray[np.uint8], head: str) -> NDArray[np.float32]:
            return np.ones((len(pictures), 1), np.float32)

        def features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
            return pictures.reshape(len(pictures), -1).astype(np.float32)

    return Cats()


def no_judge(prompt_set: PromptSet) -> str:
    """A hook that gives no judge."""
    return "cat"
