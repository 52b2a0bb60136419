"""The embedded diffusion transformer: small, judged, erased from and restored through both of its text inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from overpaint.bases.base import EMBEDDED_BASES, Base
from overpaint.bases.text_encoder import PipelineTextInput, text_sources
from overpaint.core.concepts import Concept
from overpaint.evaluation.images import Sampler, generate
from overpaint.evaluation.judges import EmbeddedJudge, load_judge
from overpaint.evaluation.prompts import EmojiPrompts, catalogue
from overpaint.patches.compose import Term
from overpaint.patches.live import Overlay
from overpaint.patches.patch import uncovered_inputs
from overpaint.solvers.closed_form.separable import Separable
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.sentences import PADDING, AverageWord

FOLDER = EMBEDDED_BASES["emoji-dit"]
SEQUENCE, POOLED = "context", "pooled"


@pytest.fixture(scope="module")
def transformer() -> Base:
    return Base.open("emoji-dit")


def test_it_is_a_stable_diffusion_3_of_at_most_30_mb(transformer: Base) -> None:
    assert transformer.layout.name == "stable-diffusion-3"
    assert set(transformer.text_inputs) == {SEQUENCE, POOLED}
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 30_000_000


def test_it_knows_40_objects_in_4_styles_and_its_judge_knows_them_too(transformer: Base) -> None:
    words, judge = catalogue(FOLDER), load_judge(FOLDER)
    assert len(words.objects) == 40
    assert len(words.styles) == 4
    assert set(words.objects) <= set(judge.classes["object"])
    assert set(words.styles) <= set(judge.classes["style"])


def test_its_card_states_measurements_and_licences() -> None:
    card = (FOLDER / "README.md").read_text("utf-8")
    for word in ("held-out", "95% Wilson", "CC BY 4.0", "Apache-2.0", "MIT", "max_sequence_length"):
        assert word in card


def test_a_concept_that_begins_with_a_word_of_the_average_keeps_all_of_its_keys(transformer: Base) -> None:
    encoder = text_sources(transformer)[SEQUENCE]
    assert isinstance(encoder, PipelineTextInput)
    words = AverageWord(encoder).words

    def keys(name: str) -> int:
        others = [f"a {word}" for word in words]
        both = encoder.keys_and_mean_values([(f"a {name}", others)], PADDING)
        assert both[0].shape == both[1].shape
        assert all(side.isfinite().all() for side in both)
        return int(both[0].shape[1])

    # The first of the words lines up with it otherwise than the rest, which decide.
    assert keys(f"{words[0]} {words[1]}") == keys(f"{words[1]} {words[0]}")
    # What is the same to CLIP, which reads no capitals, is none of the others there.
    assert keys(words[0].upper()) > 0


def test_one_concept_is_erased_through_both_inputs_others_stay_and_the_base_comes_back(transformer: Base) -> None:
    words, judge = catalogue(FOLDER), EmbeddedJudge(transformer, torch.device("cpu"))
    concepts = tuple(Concept(name) for name in words.objects)
    cat = next(concept for concept in concepts if concept.name == "cat")
    delta = Separable(vocabulary=60).solve(EditProblem(transformer, cat, concepts[::4])).delta
    assert uncovered_inputs(transformer, delta) == ()
    (half,) = (part for part in delta.text_maps if part.encoder == POOLED)
    assert uncovered_inputs(transformer, half) == (SEQUENCE,)

    pipe, sampler = transformer.pipeline(), Sampler.of(transformer, 12)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    overlay = Overlay(pipe, transformer)

    def share(names: list[str], each: int) -> float:
        asked = [prompt for name in names for prompt in EmojiPrompts(words).prompts("object", name, each)]
        pictures = generate(pipe, [a.prompt for a in asked], [a.seed for a in asked], sampler)
        seen = [judge.heads["object"][i] for i in judge.probabilities(pictures, "object").argmax(1)]
        return float(np.mean([name == a.shows["object"] for name, a in zip(seen, asked, strict=True)]))

    others = ["dog", "sun", "car"]
    assert share(["cat"], 6) >= 4 / 6
    with overlay.applied([Term("cat", delta)]):
        assert share(["cat"], 6) <= 1 / 6
        assert share(others, 4) >= 9 / 12
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
