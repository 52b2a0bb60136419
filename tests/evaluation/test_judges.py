"""Judges of every kind see what pictures show, and say clearly when they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import CLIPImageProcessorPil, ResNetConfig, ResNetForImageClassification

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.evaluation import judges
from overpaint.evaluation.images import Sampler, generate
from overpaint.evaluation.judges import Judge, JudgeNetwork, open_judge
from overpaint.evaluation.prompts import EmojiPrompts, EvalPrompt, ListedPrompts, catalogue, read_prompts

CPU = torch.device("cpu")
WORLD = ListedPrompts([Concept("cat", "object", ("kitty",)), Concept("ink", "style")])
NOISE = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def emoji() -> Base:
    return Base.open("emoji")


@pytest.fixture(scope="module")
def drawings(emoji: Base) -> tuple[list[EvalPrompt], NDArray[np.uint8]]:
    """A few pictures of the embedded base."""
    asked = [q for name in ("sun", "bus", "rose", "robot") for q in EmojiPrompts().prompts("object", name, 1)]
    sampler = Sampler(steps=8, guidance=3.0)
    return asked, generate(emoji.pipeline(), [q.prompt for q in asked], [q.seed for q in asked], sampler)


@pytest.mark.parametrize("spec", ["", "cnn", "clip"])
def test_the_embedded_judges_see_what_the_embedded_base_draws(emoji: Base, drawings: Any, spec: str) -> None:
    asked, pictures = drawings
    judge = open_judge(spec, emoji, EmojiPrompts(), CPU)
    assert isinstance(judge, Judge)
    found = judge.probabilities(pictures, "object")
    assert found.shape == (4, len(judge.heads["object"]))
    assert judge.heads["object"][:124] == catalogue().objects
    assert found.sum(1) == pytest.approx(1, abs=1e-4)
    seen = [judge.heads["object"][i] for i in found.argmax(1)]
    assert sum(a == q.shows["object"] for a, q in zip(seen, asked, strict=True)) >= 3
    assert judge.features(pictures).shape[0] == 4
    assert len(judge.name.split()[1]) == 12


def test_batches_do_not_change_what_a_judge_sees(emoji: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = open_judge("cnn", emoji, EmojiPrompts(), CPU)
    whole = judge.probabilities(NOISE, "object")
    monkeypatch.setattr(judges, "PICTURES_AT_ONCE", 2)
    assert judge.probabilities(NOISE, "object") == pytest.approx(whole, abs=1e-5)  # sums in another order


def test_the_embedded_judge_refuses_pictures_of_another_kind(emoji: Base) -> None:
    judge = open_judge("cnn", emoji, EmojiPrompts(), CPU)
    floats: Any = NOISE / 255
    with pytest.raises(OverpaintError, match="got float64"):
        judge.probabilities(floats, "object")
    with pytest.raises(OverpaintError, match="32, 32"):
        judge.features(NOISE[:, ::2, ::2])


def test_a_base_without_a_judge_is_refused_with_the_reason(tmp_path: Path, judge: JudgeNetwork) -> None:
    with pytest.raises(NotFound, match="no judge in"):
        judges.load_judge(tmp_path)
    judge.save(tmp_path / "judge")
    assert judges.load_judge(tmp_path).classes == judge.classes


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image classifier with random weights and ImageNet's way to write labels."""
    folder = tmp_path_factory.mktemp("classifier")
    labels = {0: "tabby, kitty", 1: "sports_car, car", 2: "cat", 3: "spoon"}
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", id2label=labels,
        label2id={label: i for i, label in labels.items()},
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_classifier_answers_for_every_label_of_a_class(base: Base, classifier: Path) -> None:
    judge = open_judge(f"classifier:{classifier}", base, WORLD, CPU)
    assert judge.heads["object"] == ("cat", "car")
    found = judge.probabilities(NOISE, "object")
    logits = torch.from_numpy(judge.features(NOISE)).softmax(1).numpy()
    assert found[:, 0] == pytest.approx(logits[:, 0] + logits[:, 2])
    assert found[:, 1] == pytest.approx(logits[:, 1])


def test_a_classifier_that_knows_no_concept_is_refused(base: Base, classifier: Path) -> None:
    prompt_set = ListedPrompts([Concept("unicorn")])
    prompt_set.classes = {"object": {"unicorn": ("unicorn",)}}
    with pytest.raises(NotFound, match=r"has no label for any concept here \(it has: cat"):
        open_judge(f"classifier:{classifier}", base, prompt_set, CPU)


def test_a_hook_brings_ones_own_judge(base: Base) -> None:
    judge = open_judge("hook:tests.evaluation.scripted:one_class", base, WORLD, CPU)
    assert judge.name == "cats"
    with pytest.raises(OverpaintError, match="gave a str; a judge has name, heads"):
        open_judge("hook:tests.evaluation.scripted:no_judge", base, WORLD, CPU)
    with pytest.raises(OverpaintError, match="cannot be loaded: No module named 'nowhere'"):
        open_judge("hook:nowhere:judge", base, WORLD, CPU)


def test_words_that_name_no_judge_are_refused(base: Base, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no judge in .* --judge"):
        open_judge("", base, WORLD, CPU)
    with pytest.raises(NotFound, match="no clip/ of its own"):
        open_judge("clip", base, WORLD, CPU)
    for spec in ("crystal ball", "classifier", "hook:module"):
        with pytest.raises(OverpaintError, match="names no judge; use cnn, clip"):
            open_judge(spec, base, WORLD, CPU)
    with pytest.raises(OverpaintError, match="cannot load the judge"):
        open_judge(f"classifier:{tmp_path}", base, WORLD, CPU)


# Worlds


WORLDS = (EmojiPrompts(), WORLD)


@pytest.mark.parametrize("prompt_set", WORLDS)
def test_questions_do_not_depend_on_their_company_and_name_what_they_show(prompt_set: Any) -> None:
    for head, name in (("object", "cat"), ("style", "ink")):
        asked = prompt_set.prompts(head, name, 6)
        assert asked[:3] == prompt_set.prompts(head, name, 3)
        assert len({q.seed for q in asked}) == 6
        assert all(q.shows[head] == name and name in q.prompt for q in asked)
        assert {q.seed for q in prompt_set.prompts(head, name, 6, seed=7)} == {q.seed + 7 for q in asked}


@pytest.mark.parametrize("prompt_set", WORLDS)
def test_synonyms_are_asked_for_without_the_name(prompt_set: Any) -> None:
    asked = prompt_set.synonym_prompts("cat", 4)
    assert len(asked) == 4 * (len(prompt_set.classes["object"]["cat"]) - 1)
    assert all("kitty" in q.prompt or "feline" in q.prompt for q in asked)
    assert all(q.shows == {"object": "cat"} for q in asked)
    assert prompt_set.synonym_prompts("car", 0) == []


@pytest.mark.parametrize("prompt_set", WORLDS)
def test_a_grid_has_every_cell_and_one_seed_for_all_of_a_turn(prompt_set: Any) -> None:
    asked = prompt_set.grid(["ink"], ["cat", "car"], 2)
    assert [(q.shows["style"], q.shows["object"], q.seed) for q in asked] == [
        ("ink", "cat", 0),
        ("ink", "cat", 1),
        ("ink", "car", 0),
        ("ink", "car", 1),
    ]


def test_a_concept_is_found_by_any_of_its_names() -> None:
    assert EmojiPrompts().class_of(Concept("Kitty")) == ("object", "cat")
    assert WORLD.class_of(Concept("Ink", "style")) == ("style", "ink")
    with pytest.raises(NotFound, match="recognises the style 'cat'"):
        WORLD.class_of(Concept("cat", "style"))


def test_prompts_of_ones_own_are_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text('prompt,concept,seed\n"a kitty, asleep",Kitty,7\nink on paper,ink,\n', "utf-8")
    found = read_prompts(file, WORLD)
    (cat,), (ink,) = found["object", "cat"], found["style", "ink"]
    assert (cat.prompt, cat.seed, cat.shows) == ("a kitty, asleep", 7, {"object": "cat"})
    assert (ink.prompt, ink.seed) == ("ink on paper", 3)


@pytest.mark.parametrize(
    ("text", "output"),
    [
        (
            "prompt,concept\na cat,cat\na griffin,griffin\n",
            "line 3 of .* asks for 'griffin', which nobody here can judge",
        ),
        ("prompt,concept,seed\na cat,cat,-1\n", "line 2 of .* has the seed '-1'"),
        ("sentence\na cat\n", "no rows with the columns prompt and concept"),
        ("", "no rows with the columns"),
    ],
)
def test_prompts_that_cannot_be_judged_are_named(tmp_path: Path, text: str, output: str) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text(text, "utf-8")
    with pytest.raises(OverpaintError, match=output):
        read_prompts(file, WORLD)
    with pytest.raises(OverpaintError, match="cannot read the prompts"):
        read_prompts(tmp_path / "none.csv", WORLD)
