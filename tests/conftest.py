"""Tiny models, built in memory: a base of Stable Diffusion's anatomy with random weights, in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from overpaint.bases.base import Base
from tests.registry.s3_server import BUCKET, s3_server

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
    """A random Stable Diffusion of a few thousand parameters."""
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


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base as a diffusers folder, fp16 as published bases are. Tests do not write into it."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_pipeline().to(dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture
def base(base_folder: Path) -> Base:
    """The tiny base, opened."""
    return Base.open(base_folder)


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URL of a bucket on a real S3 server, one for the whole run: clients keep connections to the first they meet."""
    if any(find_spec(name) is None for name in ("moto", "s3fs", "flask")):
        pytest.skip('moto and s3fs are not installed; pip install -e ".[dev]" does')
    with pytest.MonkeyPatch.context() as patch, s3_server() as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"
