"""Attacks at their ends are the model alone or the base alone, and each leaves the pipeline bit for bit as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import ACCURACY, EvalContext, EvaluatedPatch
from overpaint.evaluation.images import ImageCache, ImageGenerator, Sampler
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.prompts import EvalPrompt, ListedPrompts
from overpaint.evaluation.suites.probes import Probes, completed, inverted, noised, revived
from overpaint.patches.compose import Term
from overpaint.patches.delta import TextMap
from overpaint.patches.patch import make_patch
from tests.small_bases import STEMS

from .scripted import value

CPU = torch.device("cpu")
ASKED = [EvalPrompt("a cat", seed, {"object": "cat"}) for seed in (3, 4)]
STRONG = TextMap("text_encoder", torch.eye(64)[:, :8] * -2, torch.eye(64)[:, :8])
TERMS = [Term("one", STRONG)]


@pytest.fixture
def image_generator(base: Base) -> ImageGenerator:
    return ImageGenerator(base, Sampler(steps=3, guidance=4.0, batch=2), ImageCache(None), CPU)


def state(pipe: Any) -> dict[str, torch.Tensor]:
    """All weights of a pipeline."""
    return {f"{part}/{n}": p.detach().clone() for part in STEMS for n, p in getattr(pipe, part).named_parameters()}


def test_completion_goes_from_the_patched_model_to_the_base(image_generator: ImageGenerator) -> None:
    patched, plain = image_generator.draw(TERMS, ASKED), image_generator.draw((), ASKED)
    assert not np.array_equal(patched, plain)
    assert np.array_equal(completed(image_generator, TERMS, ASKED, 0), patched)
    assert np.array_equal(completed(image_generator, TERMS, ASKED, 3), plain)
    between = completed(image_generator, TERMS, ASKED, 1)
    assert not np.array_equal(between, patched)
    assert not np.array_equal(between, plain)


def test_no_noise_changes_nothing_and_noise_does(image_generator: ImageGenerator) -> None:
    patched = image_generator.draw(TERMS, ASKED)
    assert np.array_equal(noised(image_generator, TERMS, ASKED, 0.0), patched)
    assert not np.array_equal(noised(image_generator, TERMS, ASKED, 1.0), patched)


def test_inversion_learns_a_word_and_forgets_it_again(image_generator: ImageGenerator) -> None:
    wanted = image_generator.draw((), ASKED)
    image_generator.overlay.set(TERMS)
    before = state(image_generator.pipe)
    first, longer = (inverted(image_generator, TERMS, wanted, ASKED, steps, 0) for steps in (1, 12))
    assert not np.array_equal(first, longer)
    assert np.array_equal(inverted(image_generator, TERMS, wanted, ASKED, 12, 0), longer)
    after = state(image_generator.pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not image_generator.pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_revival_trains_a_copy(image_generator: ImageGenerator) -> None:
    other, prompts = image_generator.draw((), ASKED), ["a dog", "a fox"]
    patched = image_generator.draw(TERMS, ASKED)
    before = state(image_generator.pipe)
    assert np.array_equal(revived(image_generator, TERMS, other, prompts, ASKED, 2, 0, rate=0.0), patched)
    assert not np.array_equal(revived(image_generator, TERMS, other, prompts, ASKED, 2, 0, rate=1e-2), patched)
    after = state(image_generator.pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Twin:
    """A judge that takes for the cat exactly the pictures that the base draws of it, and nothing else."""

    name = "twin"
    heads: Mapping[str, tuple[str, ...]]

    def __init__(self, prompt_set: ListedPrompts, cats: NDArray[np.uint8]) -> None:
        self.heads = {"object": prompt_set.names("object")}
        self._cats = {picture.tobytes() for picture in cats}

    def probabilities(self, pictures: NDArray[np.uint8], head: str) -> NDArray[np.float32]:
        found = np.zeros((len(pictures), len(self.heads[head])), np.float32)
        cat = self.heads[head].index("cat")
        found[:, cat] = [picture.tobytes() in self._cats for picture in pictures]
        found[:, cat - 1] = 0.5
        return found

    def features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        return pictures.reshape(len(pictures), -1).astype(np.float32)


def probed(base: Base, image_generator: ImageGenerator, delta: TextMap) -> list[Measurement]:
    concept = Concept("cat")
    prompt_set = ListedPrompts([concept])
    held = (EvaluatedPatch(make_patch(base, concept, delta, {"name": "test"})),)
    judge = Twin(prompt_set, image_generator.draw((), prompt_set.prompts("object", "cat", 2)))
    found = EvalContext(base, prompt_set, judge, image_generator, held)
    return Probes(pictures=2, clean=2, inversion=1, revival=1).run(found)


def test_probes_catch_a_patch_that_erases_nothing(base: Base, image_generator: ImageGenerator) -> None:
    idle = TextMap("text_encoder", torch.zeros(64, 1), torch.zeros(64, 1))
    rows = probed(base, image_generator, idle)
    assert value(rows, "cat", ACCURACY) == 1
    assert value(rows, "cat", "accuracy after 2 steps of the base") == 1


def test_probes_report_each_attack_on_a_patch_that_works(base: Base, image_generator: ImageGenerator) -> None:
    rows = probed(base, image_generator, STRONG)
    assert value(rows, "cat", "accuracy on the base") == 1
    assert value(rows, "cat", ACCURACY) == 0
    attacks = {row.metric for row in rows if row.subject == "average of the concepts"}
    assert attacks == {
        "accuracy after 2 steps of the base",
        "accuracy with added noise",
        "accuracy of a learned word",
        "accuracy after training on other pictures",
    }


def test_probes_need_an_object(base: Base, image_generator: ImageGenerator) -> None:
    concept = Concept("ink", "style")
    prompt_set = ListedPrompts([concept])
    judge = Twin(prompt_set, np.zeros((1, 2, 2, 3), np.uint8))
    judge.heads = {"style": prompt_set.names("style")}
    held = (EvaluatedPatch(make_patch(base, concept, STRONG, {"name": "test"})),)
    with pytest.raises(OverpaintError, match="no patch here erases one"):
        Probes().run(EvalContext(base, prompt_set, judge, image_generator, held))
