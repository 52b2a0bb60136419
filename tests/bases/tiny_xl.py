"""A random Stable Diffusion XL of a few thousand parameters: two text encoders side by side, and a pooled embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from overpaint.bases.base import Base
from overpaint.testing.contract import tiny_tokenizer

WIDTHS = {"text_encoder": 32, "text_encoder_2": 64, "text_encoder_2.pooled": 48}
"""What comes through each text input; no two are equal, so that a mix-up is noticed."""
TIME_IDS, PER_ID = 6, 8


def tiny_xl(*, length: int = 16, seed: int = 0) -> Any:
    """A pipeline with random weights."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(length)
    shared = {
        "vocab_size": len(tokenizer),
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": length,
        "projection_dim": WIDTHS["text_encoder_2.pooled"],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=WIDTHS["text_encoder"] + WIDTHS["text_encoder_2"],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=PER_ID,
        projection_class_embeddings_input_dim=WIDTHS["text_encoder_2.pooled"] + TIME_IDS * PER_ID,
    )
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=WIDTHS["text_encoder"], **shared)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=WIDTHS["text_encoder_2"], **shared)),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(length),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        add_watermarker=False,
    )


def tiny_xl_base(folder: Path, dtype: torch.dtype = torch.float16) -> Base:
    """The pipeline as a diffusers folder, opened."""
    tiny_xl().to(dtype=dtype).save_pretrained(folder)
    return Base.open(folder)
