"""Tiny models, built in memory: a base of Stable Diffusion's anatomy with random weights, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from overpaint.bases.base import Base

WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "picture",
    "image",
    "drawing",
    "painting",
    "in",
    "room",
    "outdoors",
    "style",
    "by",
    "art",
)
THINGS = ("cat", "dog", "fox", "car", "bus", "sun", "moon", "tree", "pistol", "rose", "house", "person", "landscape")


def tiny_tokenizer(length: int = 16) -> CLIPTokenizer:
    """Letters, and every word of the tests as one token."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens, merges = letters + [f"{c}</w>" for c in letters], []
    for word in (*WORDS, *THINGS):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            parts = ["".join(pair), *parts[2:]]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=cast(Any, merges), model_max_length=length)


def tiny_pipeline(*, width: int = 64, length: int = 16, seed: int = 0) -> Any:
    """A random Stable Diffusion of a few thousand parameters, its text `width` wide and `length` tokens long."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(length)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_base(folder: Path, dtype: torch.dtype = torch.float16, **shape: int) -> Base:
    """A tiny base in the new `folder`, opened; fp16 as published bases are. `shape` is what `tiny_pipeline` takes."""
    tiny_pipeline(**shape).to(dtype=dtype).save_pretrained(folder)
    return Base.open(folder)
