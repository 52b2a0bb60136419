"""Attacks at their ends are the model alone or the base alone, and each leaves the pipeline bit for bit as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from overpaint.bases.base import Base
from overpaint.concepts import Concept
from overpaint.errors import OverpaintError
from overpaint.evaluation.attacks import completed, inverted, noised, revived
from overpaint.evaluation.bench import ACCURACY, Bench, Held
from overpaint.evaluation.estimates import Finding
from overpaint.evaluation.gallery import Gallery
from overpaint.evaluation.images import Sampler
from overpaint.evaluation.studio import Studio
from overpaint.evaluation.suites.probes import Probes
from overpaint.evaluation.worlds import ListedWorld, Question
from overpaint.patches.compose import Term
from overpaint.patches.delta import TextMap
from overpaint.patches.patch import make_patch
from tests.small_bases import STEMS

from .scripted import value

CPU = torch.device("cpu")
ASKED = [Question("a cat", seed, {"object": "cat"}) for seed in (3, 4)]
STRONG = TextMap("text_encoder", torch.eye(64)[:, :8] * -2, torch.eye(64)[:, :8])
TERMS = [Term("one", STRONG)]


@pytest.fixture
def studio(base: Base) -> Studio:
    return Studio(base, Sampler(steps=3, guidance=4.0, batch=2), Gallery(None), CPU)


def state(pipe: Any) -> dict[str, torch.Tensor]:
    """All weights of a pipeline."""
    return {f"{part}/{n}": p.detach().clone() for part in STEMS for n, p in getattr(pipe, part).named_parameters()}


def test_completion_goes_from_the_patched_model_to_the_base(studio: Studio) -> None:
    patched, plain = studio.draw(TERMS, ASKED), studio.draw((), ASKED)
    assert not np.array_equal(patched, plain)
    assert np.array_equal(completed(studio, TERMS, ASKED, 0), patched)
    assert np.array_equal(completed(studio, TERMS, ASKED, 3), plain)
    between = completed(studio, TERMS, ASKED, 1)
    assert not np.array_equal(between, patched)
    assert not np.array_equal(between, plain)


def test_no_noise_changes_nothing_and_noise_does(studio: Studio) -> None:
    patched = studio.draw(TERMS, ASKED)
    assert np.array_equal(noised(studio, TERMS, ASKED, 0.0), patched)
    assert not np.array_equal(noised(studio, TERMS, ASKED, 1.0), patched)


def test_inversion_learns_a_word_and_forgets_it_again(studio: Studio) -> None:
    wanted = studio.draw((), ASKED)
    studio.overlay.set(TERMS)
    before = state(studio.pipe)
    first, longer = (inverted(studio, TERMS, wanted, ASKED, steps, 0) for steps in (1, 12))
    assert not np.array_equal(first, longer)
    assert np.array_equal(inverted(studio, TERMS, wanted, ASKED, 12, 0), longer)
    after = state(studio.pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not studio.pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_revival_trains_a_copy(studio: Studio) -> None:
    other, prompts = studio.draw((), ASKED), ["a dog", "a fox"]
    patched = studio.draw(TERMS, ASKED)
    before = state(studio.pipe)
    assert np.array_equal(revived(studio, TERMS, other, prompts, ASKED, 2, 0, rate=0.0), patched)
    assert not np.array_equal(revived(studio, TERMS, other, prompts, ASKED, 2, 0, rate=1e-2), patched)
    after = state(studio.pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Twin:
    """A judge that takes for the cat exactly the pictures that the base draws of it, and nothing else."""

    name = "twin"
    heads: Mapping[str, tuple[str, ...]]

    def __init__(self, world: ListedWorld, cats: NDArray[np.uint8]) -> None:
        self.heads = {"object": world.names("object")}
        self._cats = {picture.tobytes() for picture in cats}

    def probabilities(self, pictures: NDArray[np.uint8], head: str) -> NDArray[np.float32]:
        found = np.zeros((len(pictures), len(self.heads[head])), np.float32)
        cat = self.heads[head].index("cat")
        found[:, cat] = [picture.tobytes() in self._cats for picture in pictures]
        found[:, cat - 1] = 0.5
        return found

    def features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        return pictures.reshape(len(pictures), -1).astype(np.float32)


def probed(base: Base, studio: Studio, delta: TextMap) -> list[Finding]:
    concept = Concept("cat")
    world = ListedWorld([concept])
    held = (Held(make_patch(base, concept, delta, {"name": "test"})),)
    judge = Twin(world, studio.draw((), world.ask("object", "cat", 2)))
    found = Bench(base, world, judge, studio, held)
    return Probes(pictures=2, clean=2, inversion=1, revival=1).run(found)


def test_probes_catch_a_patch_that_erases_nothing(base: Base, studio: Studio) -> None:
    idle = TextMap("text_encoder", torch.zeros(64, 1), torch.zeros(64, 1))
    rows = probed(base, studio, idle)
    assert value(rows, "cat", ACCURACY) == 1
    assert value(rows, "cat", "accuracy after 2 steps of the base") == 1


def test_probes_report_each_attack_on_a_patch_that_works(base: Base, studio: Studio) -> None:
    rows = probed(base, studio, STRONG)
    assert value(rows, "cat", "accuracy on the base") == 1
    assert value(rows, "cat", ACCURACY) == 0
    attacks = {row.metric for row in rows if row.subject == "average of the concepts"}
    assert attacks == {
        "accuracy after 2 steps of the base",
        "accuracy with added noise",
        "accuracy of a learned word",
        "accuracy after training on other pictures",
    }


def test_probes_need_an_object(base: Base, studio: Studio) -> None:
    concept = Concept("ink", "style")
    world = ListedWorld([concept])
    judge = Twin(world, np.zeros((1, 2, 2, 3), np.uint8))
    judge.heads = {"style": world.names("style")}
    held = (Held(make_patch(base, concept, STRONG, {"name": "test"})),)
    with pytest.raises(OverpaintError, match="no patch here erases one"):
        Probes().run(Bench(base, world, judge, studio, held))
