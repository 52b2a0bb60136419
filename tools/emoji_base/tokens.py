"""The words as tokens: a CLIP tokenizer of which every word of the catalogue's captions is one token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from tools.emoji_base.catalogue import Scene, captions, catalogue

LENGTH = 24
"""Most tokens of a prompt, start and end included."""


def words() -> Iterator[str]:
    """Every training caption that names an object, and those of styles and backgrounds alone; synonyms included."""
    known = catalogue()
    first = Scene(None, known.styles[0], known.backgrounds[0])
    for name in known.objects:
        yield from captions(Scene(name))
        yield from captions(Scene(name, first.style, first.background))
        yield from captions(Scene(name), held_out=True)
    for style in known.styles:
        yield from captions(Scene(style=style))
    for background in known.backgrounds:
        yield from captions(Scene(background=background))


def tokenizer() -> CLIPTokenizer:
    """A byte-level BPE trained on the captions until every word of theirs is one token; raises ValueError if one is not."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    sentences = sorted(set(words()))
    trainer = trainers.BpeTrainer(
        vocab_size=4096, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sentences, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(alphabet)
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    found = CLIPTokenizer(vocab=vocabulary, merges=cast(Any, merges), model_max_length=LENGTH)
    for word in sorted({word.strip(",") for sentence in sentences for word in sentence.split()}):
        if len(found(word).input_ids) != 3:
            raise ValueError(f"{word!r} is not one token")
    return found


def tokenize(tok: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids [n, length], padded and truncated as the pipeline does."""
    found = tok(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return cast(Tensor, found.input_ids)
