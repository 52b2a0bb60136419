"""A Stable Diffusion with random weights, a hundredth of the embedded base's size, built in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from overpaint.evaluation.judges import JudgeNetwork
from overpaint.evaluation.prompts import catalogue
from overpaint.workspace.workspace import Workspace

from .pages import evaluated


def tiny_tokenizer() -> CLIPTokenizer:
    """Letters only, no merges."""
    letters = [*"abcdefghijklmnopqrstuvwxyz,"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


@pytest.fixture(scope="session")
def pipe() -> Any:
    """Draws 64 x 64 noise that depends on the prompt and the seed."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def workspace(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The tiny base with six patches on the recipe safe, and the numbers of every suite, by script."""
    return evaluated(tmp_path_factory.mktemp("evaluated") / "registry", base_folder)


@pytest.fixture(scope="session")
def judge() -> JudgeNetwork:
    """A judge that guesses."""
    torch.manual_seed(0)
    words = catalogue()
    return JudgeNetwork({"object": words.objects, "style": words.styles, "background": words.backgrounds}).eval()
