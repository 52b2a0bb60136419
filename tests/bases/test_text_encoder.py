"""Prompts are encoded as the pipeline encodes them, whatever is in them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder, encoders
from overpaint.core.concepts import Concept
from overpaint.solvers.sentences import keys_and_values
from overpaint.testing import tiny_base, tiny_pipeline
from tests.bases.containers import folder_of

PROMPTS = [
    "",
    "a photo of a cat",
    "A PHOTO of a  cat,\n(weighted:1.3) [x]",
    "\u00e9moji \U0001f600 \u732b",
    "cat " * 200,
    "a photo of <frida>",
    "a photo of <toy> in a room",
    "<toy>, <frida> and <toy>",
    "<toy>_1 alone",
    "<|endoftext|> in the middle",
]


def with_inversions(pipe: Any, name: str = "text_encoder", tokenizer: str = "tokenizer") -> None:
    """A token of one vector, and one of three, as `load_textual_inversion` adds them."""
    model = getattr(pipe, name)
    torch.manual_seed(3)
    for token, count in (("<frida>", 1), ("<toy>", 3)):
        vectors = torch.randn(count, model.config.hidden_size)
        pipe.load_textual_inversion(vectors, token=token, text_encoder=model, tokenizer=getattr(pipe, tokenizer))


def assert_same_beginnings(encoder: TextEncoder, prompt: str, theirs: torch.Tensor) -> None:
    """Asked for a part of it, of each of many prompts another part, an encoder gives what it gives of a whole prompt."""
    lengths = [(3 + 5 * at) % (encoder.length + 1) or 1 for at in range(len(PROMPTS))]
    at = PROMPTS.index(prompt)
    mine = encoder.hidden(PROMPTS, lengths)[at]
    end = 1 if encoder.is_pooled else lengths[at]
    torch.testing.assert_close(mine[:end], theirs[:end])
    torch.testing.assert_close(encoder.hidden(["a", prompt, "a"], 2)[1], theirs[: 1 if encoder.is_pooled else 2])
    starts = [length * 2 // 3 for length in lengths]
    few = encoder.hidden([*PROMPTS[:4], prompt], [*lengths[:4], lengths[at]], [*starts[:4], starts[at]])[-1]
    torch.testing.assert_close(
        few[starts[at] : end] if end > 1 else few[:1], theirs[starts[at] : end] if end > 1 else theirs[:1]
    )


@pytest.mark.parametrize("mask", [False, True])
def test_prompts_reach_the_unet_as_the_pipeline_hands_them(tmp_path: Path, mask: bool) -> None:
    pipe = tiny_pipeline()
    with_inversions(pipe)
    if mask:
        pipe.text_encoder.config.use_attention_mask = True
    pipe.save_pretrained(tmp_path / "base")
    base = Base.open(tmp_path / "base")
    encoder, pipe = TextEncoder.of(base), base.pipeline()
    found = encoder.hidden(PROMPTS)
    for prompt, mine in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            theirs = pipe.encode_prompt(prompt, "cpu", 1, False)[0][0]
        torch.testing.assert_close(mine, theirs)
        assert_same_beginnings(encoder, prompt, theirs)
        converted = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
        assert encoder.tokens(prompt) == pipe.tokenizer(converted, add_special_tokens=False).input_ids


def test_both_encoders_of_xl_encode_as_its_pipeline_does(tmp_path: Path) -> None:
    folder_of("XL", tmp_path / "plain")
    pipe = Base.open(tmp_path / "plain").pipeline()
    with_inversions(pipe)
    with_inversions(pipe, "text_encoder_2", "tokenizer_2")
    pipe.save_pretrained(tmp_path / "base")
    base = Base.open(tmp_path / "base")
    pipe, every = base.pipeline(), encoders(base)
    found = {name: encoder.hidden(PROMPTS) for name, encoder in every.items()}
    for at, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            theirs, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        mine = torch.cat([found["text_encoder"][at], found["text_encoder_2"][at]], -1)
        torch.testing.assert_close(mine, theirs[0])
        torch.testing.assert_close(found["text_encoder_2.pooled"][at], pooled)
        assert_same_beginnings(every["text_encoder_2.pooled"], prompt, pooled)
        assert_same_beginnings(every["text_encoder_2"], prompt, found["text_encoder_2"][at])


def test_what_stands_before_the_subject_is_read_once_for_all_of_them(tmp_path: Path) -> None:
    encoder = TextEncoder.of(tiny_base(tmp_path / "base"))
    read: list[int] = []
    encoder.model.register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))
    sentences = ("a {}", "a photo of a {}", "an image of a {}")
    starts = [encoder.first_position(sentence, "cat") for sentence in sentences]
    subjects = ("cat", "dog", "sun")
    for subject in subjects:
        prompts = [sentence.format(subject) for sentence in sentences]
        lengths = [start + 2 for start in starts]
        found, whole = encoder.hidden(prompts, lengths, starts), encoder.hidden(prompts)
        for mine, theirs, start, length in zip(found, whole, starts, lengths, strict=True):
            torch.testing.assert_close(mine[start:length], theirs[start:length])
    prefixes, of_subjects = read[0], read[1::2]
    assert prefixes < sum(starts), "what prefixes have in common is read once, too"
    assert of_subjects == [len(sentences) * 2] * len(subjects)


def test_a_word_of_several_vectors_takes_as_many_positions(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    with_inversions(pipe)
    pipe.save_pretrained(tmp_path / "base")
    encoder = TextEncoder.of(Base.open(tmp_path / "base"))
    assert len(encoder.tokens("<toy>")) == 3
    before = encoder.first_position("a photo of {}", "cat")
    assert encoder.first_position("a photo of <toy> and {}", "cat") == before + 3 + len(encoder.tokens("and"))


def test_how_the_last_text_was_padded_does_not_change_how_prompts_are_read(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    fresh, used = TextEncoder.of(base), TextEncoder.of(base)
    used.tokenizer(["a", "cat in a room"], padding="max_length", truncation=True, max_length=7)
    assert used.reading == fresh.reading
    used.tokenizer.add_tokens(["<new>"])
    assert TextEncoder(used.tokenizer, used.model, used.output, used._memory).reading != fresh.reading


def long_xl(folder: Path) -> Base:
    """A tiny Stable Diffusion XL that reads 77 tokens, so that the beginnings of all sentences have room in a row."""
    folder_of("XL", folder / "short")
    pipe = Base.open(folder / "short").pipeline()
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        config = getattr(pipe, encoder).config
        config.max_position_embeddings = 77
        torch.manual_seed(5)
        setattr(pipe, encoder, type(getattr(pipe, encoder))(config))
        getattr(pipe, tokenizer).model_max_length = 77
    pipe.save_pretrained(folder / "long")
    return Base.open(folder / "long")


@pytest.mark.parametrize("concept", [Concept("cat"), Concept("monet", "style"), Concept("cat", anchor="dog")], ids=str)
def test_keys_and_values_are_those_of_whole_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concept: Concept
) -> None:
    base, hidden = long_xl(tmp_path), TextEncoder.hidden
    for name in base.text_inputs:
        found = keys_and_values(encoders(base)[name], base, concept)
        with monkeypatch.context() as patch:
            patch.setattr(TextEncoder, "hidden", lambda self, prompts, *_: hidden(self, prompts))
            whole = keys_and_values(encoders(base)[name], base, concept)
        for mine, theirs in zip(found, whole, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_threads_read_prompts_without_getting_into_each_others_way(tmp_path: Path) -> None:
    encoder = TextEncoder.of(tiny_base(tmp_path / "base"))
    prompts = [f"a photo of {word}" for word in ("cat", "dog", "sun", "moon", "tree", "car")]
    whole = encoder.hidden(prompts).clone()
    wrong: list[str] = []

    def read(turn: int) -> None:
        for i in range(30):
            asked = [prompts[(turn + i) % 6], prompts[(turn + i + 1) % 6]]
            encoder._memory.answers.make_room(encoder._memory.answers.limit)
            found = encoder.hidden(asked, [8, 8], [4, 4])[0]
            wrong.extend(
                asked[:1] if not torch.allclose(found[4:8], whole[prompts.index(asked[0]), 4:8], atol=1e-4) else ()
            )

    threads = [threading.Thread(target=read, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    encoder._memory.answers.make_room(encoder._memory.answers.limit)
    torch.testing.assert_close(encoder.hidden(prompts), whole)


def test_what_was_read_without_gradients_can_be_trained_on(tmp_path: Path) -> None:
    encoder = TextEncoder.of(tiny_base(tmp_path / "base"))
    with torch.inference_mode():
        encoder.hidden(["a cat", "a dog"], [4, 4], [2, 2])
    weight = torch.ones(encoder.width, requires_grad=True)
    (encoder.hidden(["a cat", "a dog"], [4, 4], [2, 2]) * weight).sum().backward()
    assert weight.grad is not None
