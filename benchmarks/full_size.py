"""Bases of published models' true shapes with random weights, written as diffusers folders.

`scale` narrows the denoiser and takes layers from the text encoders, whose widths stay as they are. FLUX.1's transformer has
one block of either kind: no benchmark here draws with it, and its text inputs stand in front of the blocks.
"""

from __future__ import annotations

import itertools
import json
import math
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoints import write_single_file

PIPELINES = {"1.5": "StableDiffusionPipeline", "XL": "StableDiffusionXLPipeline", "FLUX.1": "FluxPipeline"}
ENCODERS = {"text_encoder", "text_encoder_2"}
CLIP_WORDS, T5_WORDS = 49408, 32128
"""Rows of the embedding tables of the published text encoders."""


def write_base(
    folder: Path,
    family: str,
    scale: float,
    words: int,
    dtype: torch.dtype = torch.float16,
    tokenizer: Any = None,
) -> dict[str, int]:
    """Write a base of a family (see PIPELINES), whose tokenizers know so many words of three letters.

    `tokenizer` is another one for CLIP's text encoders. Returns the bytes of each component.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(1 << 24, generator=generator) / 50).to(dtype)

    def value(shapes: dict[str, tuple[int, ...]], key: str) -> Tensor:
        if "norm" in key and key.endswith("weight"):
            return torch.ones(shapes[key], dtype=dtype)
        count = torch.Size(shapes[key]).numel()
        start = int(torch.randint(1 << 20, (1,), generator=generator))
        return torch.cat([values[start:]] * (count // (len(values) - start) + 1))[:count].reshape(shapes[key])

    sizes: dict[str, int] = {}
    index: dict[str, Any] = {"_class_name": PIPELINES[family], "_diffusers_version": "0.42.0"}
    clip = tokenizer or clip_tokenizer(words)
    for name, model in list(models(family, scale, clip)):
        shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
        file = folder / name / f"{'model' if name in ENCODERS else 'diffusion_pytorch_model'}.safetensors"
        file.parent.mkdir(parents=True)
        described = [(key, dtype, shape) for key, shape in shapes.items()]
        write_single_file(file, described, lambda key, shapes=shapes: value(shapes, key))  # type: ignore[misc]
        model.config.save_pretrained(file.parent) if name in ENCODERS else model.save_config(file.parent)
        sizes[name] = file.stat().st_size
        index[name] = ["transformers" if name in ENCODERS else "diffusers", type(model).__name__]
    tokenizers = {"tokenizer": clip}
    if family != "1.5":
        tokenizers["tokenizer_2"] = t5_tokenizer(words) if family == "FLUX.1" else clip
    for name, each in tokenizers.items():
        each.save_pretrained(folder / name)
        index[name] = ["transformers", type(each).__name__]
    scheduler = FlowMatchEulerDiscreteScheduler() if family == "FLUX.1" else DDIMScheduler()
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    if family == "1.5":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    return sizes


def models(family: str, scale: float, tokenizer: Any = None) -> Iterator[tuple[str, Any]]:
    """The components of a family by name, without storage; CLIP's text encoders end prompts as `tokenizer` does."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    known = {
        "vocab_size": CLIP_WORDS,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id if tokenizer else 52,
        "eos_token_id": tokenizer.eos_token_id if tokenizer else 53,
        "pad_token_id": tokenizer.pad_token_id if tokenizer else 53,
    }
    first = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    second = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
    t5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "feed_forward_proj": "gated-gelu"}

    def layers(count: int) -> int:
        return max(2, round(count * scale))

    with torch.device("meta"):
        yield "text_encoder", CLIPTextModel(CLIPTextConfig(num_hidden_layers=layers(12), **first, **known))
        if family == "XL":
            config = CLIPTextConfig(num_hidden_layers=layers(32), **second, **known)
            yield "text_encoder_2", CLIPTextModelWithProjection(config)
        if family == "FLUX.1":
            yield "text_encoder_2", T5EncoderModel(T5Config(vocab_size=T5_WORDS, num_layers=layers(24), **t5))
        yield from _denoiser(family, scale)


def _denoiser(family: str, scale: float) -> Iterator[tuple[str, Any]]:
    """The U-Net or transformer, and the autoencoder."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel

    width = max(32, round(320 * math.sqrt(scale) / 32) * 32)
    if family == "FLUX.1":
        yield "transformer", FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    elif family == "XL":
        yield (
            "unet",
            UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(width, 2 * width, 4 * width),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=2,
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
        )
    else:
        blocks = (width, 2 * width, 4 * width, 4 * width)
        yield (
            "unet",
            UNet2DConditionModel(
                sample_size=64, block_out_channels=blocks, cross_attention_dim=768, attention_head_dim=8
            ),
        )
    channels = 16 if family == "FLUX.1" else 4
    yield (
        "vae",
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=channels,
            **({"shift_factor": 0.1159, "scaling_factor": 0.3611} if family == "FLUX.1" else {}),
        ),
    )


def words_of_three(count: int) -> list[str]:
    """So many words of three letters, the first in alphabetical order."""
    return [
        "".join(letters) for letters in itertools.islice(itertools.product(string.ascii_lowercase, repeat=3), count)
    ]


def clip_tokenizer(words: int) -> Any:
    """CLIP's tokenizer that knows every letter, and so many words of three letters as one token each."""
    from transformers import CLIPTokenizer

    alphabet = string.ascii_lowercase
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    known = words_of_three(words)
    pairs = list(dict.fromkeys((word[0], word[1]) for word in known))
    merges = [*pairs, *((word[:2], f"{word[2]}</w>") for word in known)]
    tokens += ["".join(pair) for pair in merges]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)


def t5_tokenizer(words: int) -> Any:
    """T5's tokenizer that knows every letter, and so many words of three letters as one piece each."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in words_of_three(words)), *string.ascii_lowercase]
    scores = [(piece, -1.0 if len(piece) > 2 else -9.0) for piece in pieces]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512)
