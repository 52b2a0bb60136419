"""The text side of the `emoji-dit` base: two small CLIP towers with projection, and a T5 that reads both ways.

The towers learn, from captions alone, to say what the `emoji` base's CLIP says, each through its own projection; then
they are frozen, as in Stable Diffusion 3. The T5 is trained along with the transformer.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tools.emoji_base.catalogue import Scene, catalogue, random_caption
from tools.emoji_base.loop import Place, Schedule, train
from tools.emoji_base.tokens import tokenizer, words

LENGTH = 20
"""Tokens of a prompt in each encoder; the pipeline is called with `max_sequence_length` of this."""
CLIP_WIDTH, POOLED, T5_WIDTH = 96, 64, 384


def clip_tower(tok: CLIPTokenizer) -> Any:
    """Two layers, 96 wide; its state before the last layer and its projection are what the pipeline reads."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tok),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=LENGTH,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
            projection_dim=POOLED,
        )
    )


def t5(tok: Any) -> Any:
    """Two layers, 384 wide."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tok),
            d_model=T5_WIDTH,
            d_kv=32,
            num_heads=4,
            d_ff=320,
            num_layers=2,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def clip_tokenizer() -> CLIPTokenizer:
    """The catalogue's tokenizer, at this base's length."""
    tok = tokenizer()
    tok.model_max_length = LENGTH
    return tok


def t5_tokenizer() -> Any:
    """A unigram vocabulary of the catalogue's words, and letters for all others; every word is one token."""
    known = sorted({word.strip(",") for sentence in words() for word in sentence.split()})
    letters = ["\u2581", ",", *(chr(c) for c in range(33, 127) if chr(c) != ",")]
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    scored += [(f"\u2581{word}", -1.0) for word in known] + [(letter, -10.0) for letter in letters]
    tok: Any = T5Tokenizer(vocab=scored, extra_ids=0)
    tok.model_max_length = LENGTH
    for word in known:
        if len(tok(word).input_ids) != 2:
            raise ValueError(f"{word!r} is not one token")
    return tok


def ids(tok: Any, texts: list[str]) -> Tensor:
    """Token ids [n, LENGTH], padded and truncated as the pipeline does."""
    found: Tensor = tok(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    return found


class Towers(nn.Module):
    """Both CLIP towers, and a matrix each, thrown away afterwards, from their projection to the teacher's."""

    def __init__(self, tok: CLIPTokenizer, taught: int) -> None:
        super().__init__()
        self.towers = nn.ModuleList([clip_tower(tok), clip_tower(tok)])
        self.out = nn.ModuleList([nn.Linear(POOLED, taught), nn.Linear(POOLED, taught)])

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        """How far the captions' embeddings, and their likeness to one another, are from the unit-length `target` [n, taught]."""
        total = target.new_zeros(())
        for tower, out in zip(self.towers, self.out, strict=True):
            said = nn.functional.normalize(out(tower(tokens).text_embeds), dim=-1)
            same = target @ target.T
            total = total + (said @ target.T - same).square().mean() * 10 + (1 - (said * target).sum(-1)).mean()
        return total


def run(place: Place, schedule: Schedule) -> None:
    """Train both CLIP towers; save `text_encoder`, `text_encoder_2` and the three tokenizers."""
    torch.manual_seed(place.seed)
    tok = clip_tokenizer()
    teacher: Any = CLIPModel.from_pretrained(place.out.parent / "emoji" / "clip", torch_dtype=torch.float32).eval()
    teacher.to(place.device)
    module = Towers(tok, teacher.config.projection_dim).to(place.device)
    scenes = list(catalogue().scenes())

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        rng = random.Random(place.seed * 1_000_003 + step)
        texts = [_caption(rng, scenes) for _ in range(schedule.batch)]
        tokens = ids(tok, texts).to(place.device)
        with torch.no_grad():
            said = teacher.text_projection(teacher.text_model(input_ids=tokens).pooler_output)
        loss: Tensor = module(tokens, nn.functional.normalize(said, dim=-1))
        return loss

    train("dit-text", module, loss_of, place, schedule)
    for i, name in enumerate(("", "_2")):
        tower: Any = module.towers[i]
        tower.half().save_pretrained(place.out / f"text_encoder{name}", safe_serialization=True)
        tok.save_pretrained(place.out / f"tokenizer{name}")
    t5_tokenizer().save_pretrained(place.out / "tokenizer_3")


def _caption(rng: random.Random, scenes: list[Scene]) -> str:
    return random_caption(rng.choice(scenes), rng)[0]
