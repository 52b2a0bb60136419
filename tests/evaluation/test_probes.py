"""Attacks at their ends are the model alone or the base alone, and each leaves the pipeline bit for bit as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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
from overpaint.evaluation.suites.probes import (
    Genetics,
    Probes,
    called_up,
    completed,
    inverted,
    noised,
    on_simplex,
    redrawn,
    revived,
    searched,
)
from overpaint.patches.compose import Term
from overpaint.patches.delta import Dense, TextMap
from overpaint.patches.patch import make_patch
from tests.bases.tiny_xl import tiny_xl
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


def test_an_image_to_image_start_ends_where_the_picture_was_or_at_the_model(image_generator: ImageGenerator) -> None:
    wanted = image_generator.draw((), ASKED)
    patched = image_generator.draw(TERMS, ASKED)
    near, far = (redrawn(image_generator, TERMS, wanted, ASKED, strength) for strength in (0.34, 1.0))
    assert near.shape == far.shape == wanted.shape
    assert not np.array_equal(near, far)
    assert not np.array_equal(far, patched), "the picture is still in the last bit of noise"
    assert np.array_equal(redrawn(image_generator, TERMS, wanted, ASKED, 0.34), near)


def test_a_searched_prompt_is_words_before_the_prompt_and_lowers_the_loss(image_generator: ImageGenerator) -> None:
    wanted = image_generator.draw((), ASKED)
    image_generator.overlay.set(TERMS)
    before = state(image_generator.pipe)
    pictures, prompts = searched(image_generator, TERMS, wanted, ASKED, 2, 3, 0)
    assert pictures.shape == wanted.shape
    for prompt in prompts:
        assert prompt.endswith(" a cat")
        ids = image_generator.pipe.tokenizer(prompt, add_special_tokens=False).input_ids
        assert len(ids) == 4, "what was found is typed and read back as the same words"
    assert searched(image_generator, TERMS, wanted, ASKED, 2, 3, 0)[1] == prompts
    after = state(image_generator.pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not image_generator.pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_a_prompt_that_calls_a_concept_up_comes_nearer_and_does_not_name_it(image_generator: ImageGenerator) -> None:
    pairs = [("a cat", "a"), ("a photo of a cat", "a photo of")]
    few, many = (
        called_up(image_generator, TERMS, pairs, ("cat",), ASKED, 0, Genetics(4, 16, generations))
        for generations in (1, 12)
    )
    assert "cat" not in many[1][0].split()
    pipe = image_generator.pipe
    image_generator.overlay.clear()

    def far(prompt: str) -> float:
        ids = pipe.tokenizer(
            [prompt, *(side for pair in pairs for side in pair)],
            padding="max_length",
            max_length=16,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            own, *sides = pipe.text_encoder(ids)[0]
        named, unnamed = torch.stack(sides[::2]), torch.stack(sides[1::2])
        return float((own - unnamed.mean(0) - 3.0 * (named - unnamed).mean(0)).norm())

    assert far(many[1][0]) <= far(few[1][0])


def test_the_nearest_distribution_is_one(image_generator: ImageGenerator) -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3
    found = on_simplex(rows)
    assert torch.allclose(found.sum(1), torch.ones(5), atol=1e-5)
    assert bool((found >= 0).all())
    assert torch.allclose(on_simplex(found), found, atol=1e-6), "a distribution is its own nearest"


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
    return Probes(pictures=2, clean=2, inversion=1, revival=1, search=2, words=2, restarts=2).run(found)


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
        "accuracy from pictures noised by 0.7",
        "accuracy of a learned word",
        "accuracy of the best of 2 learned words",
        "accuracy of the best of 2 searched prompts",
        "accuracy of the best of 2 prompts without the name",
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


def test_probes_of_a_base_that_they_cannot_attack_are_refused(image_generator: ImageGenerator, tmp_path: Path) -> None:
    tiny_xl().save_pretrained(tmp_path)
    base = Base.open(tmp_path)
    prompt_set = ListedPrompts([Concept("cat")])
    judge = Twin(prompt_set, np.zeros((1, 2, 2, 3), np.uint8))
    name = base.projections()[0]
    patch = make_patch(base, Concept("cat"), Dense({name: torch.ones(base.places[name].shape)}), {"name": "test"})
    context = EvalContext(base, prompt_set, judge, image_generator, (EvaluatedPatch(patch),))
    with pytest.raises(OverpaintError, match="this base is a stable-diffusion-xl; run another suite"):
        Probes().run(context)
