"""Random pipelines of diffusers' own classes, tiny: one for each layout whose prompts are caught at the projections."""

from __future__ import annotations

import inspect
import io
import re
import string
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers.pre_tokenizers import ByteLevel

from overpaint.testing.contract import THINGS, WORDS, tiny_tokenizer

INSTRUCTION = " ".join(
    inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
)
LENGTH = 16
"""Tokens that a tiny CLIP reads."""


VIDEO_VAE: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "num_res_blocks": 1,
    "dim_mult": [1, 1, 1, 1],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}


def t5_tokenizer(**settings: Any) -> Any:
    """T5's tokenizer with the words of the tests, and letters."""
    pieces = [f"▁{word}" for word in (*WORDS, *THINGS)]
    known = ["<pad>", "</s>", "<unk>", "▁", *pieces, *string.ascii_lowercase]
    scores = [(piece, -1.0 if len(piece) > 2 else -9.0) for piece in known]
    return transformers.T5Tokenizer(vocab=scores, extra_ids=0, **settings)


def t5(width: int, kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def clip(width: int, projected: int = 0, length: int = LENGTH) -> Any:
    tokenizer = tiny_tokenizer(length)
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projected or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


VAE: dict[str, Any] = {
    "block_out_channels": (4,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": 64,
}


def vae() -> Any:
    return diffusers.AutoencoderKL(shift_factor=0.0, **VAE)


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def stable_diffusion_3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=40,
            caption_projection_dim=16,
            pooled_projection_dim=24,
            out_channels=4,
            pos_embed_max_size=64,
        ),
        scheduler=flow(),
        vae=vae(),
        text_encoder=clip(16, 16),
        tokenizer=tiny_tokenizer(LENGTH),
        text_encoder_2=clip(8, 8),
        tokenizer_2=tiny_tokenizer(LENGTH),
        text_encoder_3=t5(40),
        tokenizer_3=t5_tokenizer(),
    )


FLUX_BLOCKS: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (2, 2, 4),
}
"""What FLUX, Chroma and, with a few of its own, FLUX.2 have alike."""


def flux() -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(pooled_projection_dim=16, **FLUX_BLOCKS),
        scheduler=flow(),
        vae=vae(),
        text_encoder=clip(16),
        tokenizer=tiny_tokenizer(LENGTH),
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(),
    )


def byte_level(also: str = "", **settings: Any) -> Any:
    """Qwen's tokenizer: bytes, and the words of the tests and of another text with a blank before them."""
    words = [f"Ġ{word}" for word in (*WORDS, *THINGS, *re.findall("[a-z]+", also))]
    letters = [*sorted(ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    parts: list[str] = []
    for word in words:
        joined = word[0]
        for letter in word[1:]:
            merges.append((joined, letter))
            joined += letter
            parts.append(joined)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*letters, *parts, *special]))}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=cast(Any, list(dict.fromkeys(merges))), **settings)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


CHAT = (
    "{% for message in messages %}<|im_start|>{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{{ message['content'][0]['text'] }}{% endif %}<|im_end|>{% endfor %}"
)


def gemma_tokenizer(also: str = "") -> Any:
    """Gemma's tokenizer, letter by letter but for the words of the tests and of another text."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    merges: list[tuple[str, str]] = []
    parts: list[str] = []
    for word in (*WORDS, *THINGS, *re.findall("[A-Za-z]+", also)):
        joined = "▁"
        for letter in word:
            merges.append((joined, letter))
            joined += letter
            parts.append(joined)
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*special, "▁", *string.printable[:94], *parts]))}
    return transformers.GemmaTokenizer(vocab=vocab, merges=cast(Any, list(dict.fromkeys(merges))))


def causal(family: str, kind: str, width: int, layers: int = 3, **more: Any) -> Any:
    """A language model that reads from left to right."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=1200,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
        max_position_embeddings=1024,
        pad_token_id=0,
        **more,
    )
    return getattr(transformers, kind)(config)


def chroma() -> Any:
    return diffusers.ChromaPipeline(
        transformer=diffusers.ChromaTransformer2DModel(
            approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **FLUX_BLOCKS
        ),
        scheduler=flow(),
        vae=vae(),
        text_encoder=t5(32),
        tokenizer=t5_tokenizer(),
    )


def pixart(kind: type[Any]) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=1,
        caption_channels=32,
        use_additional_conditions=False,
    )
    return kind(t5_tokenizer(), t5(32), vae(), transformer, diffusers.DPMSolverMultistepScheduler())


def auraflow() -> Any:
    return diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(32, "UMT5"),
        vae=vae(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=256,
        ),
        scheduler=flow(),
    )


def sana() -> Any:
    return diffusers.SanaPipeline(
        tokenizer=gemma_tokenizer(INSTRUCTION),
        text_encoder=causal("Gemma2", "Gemma2Model", 16),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
        ),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=16,
            sample_size=8,
        ),
        scheduler=flow(),
    )


def lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=causal("Gemma2", "Gemma2Model", 16),
        vae=vae(),
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(512, 32, 32),
            cap_feat_dim=16,
        ),
        scheduler=flow(),
    )


def qwen_image() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 1200,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1024,
            "rope_scaling": rope,
        },
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16},
    )
    return diffusers.QwenImagePipeline(
        scheduler=flow(),
        vae=diffusers.AutoencoderKLQwenImage(**VIDEO_VAE),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=byte_level(),
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
        ),
    )


def z_image() -> Any:
    return diffusers.ZImagePipeline(
        scheduler=flow(),
        vae=vae(),
        text_encoder=causal("Qwen3", "Qwen3Model", 16),
        tokenizer=byte_level(),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 2, 2],
            axes_lens=[512, 64, 64],
        ),
    )


def wan_transformer() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )


def wan() -> Any:
    """Wan 2.2: two denoisers that take turns."""
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(32, "UMT5"),
        vae=diffusers.AutoencoderKLWan(**VIDEO_VAE),
        scheduler=flow(),
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.5,
    )


def cogvideox() -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(32),
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=4,
            text_embed_dim=32,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=1,
            patch_size=2,
            max_text_seq_length=226,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def ltx_video() -> Any:
    return diffusers.LTXPipeline(
        scheduler=flow(),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=t5(32),
        tokenizer=t5_tokenizer(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=32,
        ),
    )


def hunyuan_video() -> Any:
    return diffusers.HunyuanVideoPipeline(
        text_encoder=causal("Llama", "LlamaModel", 16),
        tokenizer=byte_level(str(DEFAULT_PROMPT_TEMPLATE["template"])),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 2, 4),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        ),
        scheduler=flow(),
        text_encoder_2=clip(8, length=77),
        tokenizer_2=tiny_tokenizer(77),
    )


def flux2_transformer() -> Any:
    own = {"attention_head_dim": 16, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4)}
    return diffusers.Flux2Transformer2DModel(timestep_guidance_channels=16, **{**FLUX_BLOCKS, **own})


def flux2_klein() -> Any:
    return diffusers.Flux2KleinPipeline(
        scheduler=flow(),
        vae=diffusers.AutoencoderKLFlux2(**VAE),
        text_encoder=causal("Qwen3", "Qwen3ForCausalLM", 8, layers=28),
        tokenizer=byte_level(),
        transformer=flux2_transformer(),
        is_distilled=True,
    )


def flux2() -> Any:
    config = transformers.Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": 1200,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 31,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "max_position_embeddings": 1024,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    )
    return diffusers.Flux2Pipeline(
        scheduler=flow(),
        vae=diffusers.AutoencoderKLFlux2(**VAE),
        text_encoder=transformers.Mistral3ForConditionalGeneration(config),
        tokenizer=byte_level(SYSTEM_MESSAGE),
        transformer=flux2_transformer(),
    )


def kolors() -> Any:
    """A U-Net whose text passes a projection first, and whose text encoder and tokenizer come with diffusers."""
    sentencepiece = pytest.importorskip("sentencepiece", reason='pip install -e ".[dev]" installs sentencepiece')
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel, RMSNorm
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join((*WORDS, *THINGS))] * 4 + [string.ascii_lowercase]),
        model_writer=vocabulary,
        model_type="bpe",
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with tempfile.NamedTemporaryFile(suffix=".model", delete=False) as file:
        file.write(vocabulary.getvalue())
    tokenizer = ChatGLMTokenizer(file.name)
    weakref.finalize(tokenizer, Path(file.name).unlink)
    config = ChatGLMConfig(
        num_layers=3,
        padded_vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        ffn_hidden_size=32,
        kv_channels=8,
        num_attention_heads=2,
        seq_length=64,
        multi_query_attention=True,
        add_qkv_bias=True,
        original_rope=True,
        use_cache=False,
    )
    text_encoder = ChatGLMModel(config, empty_init=False)
    for module in text_encoder.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.ones_(module.weight)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return diffusers.KolorsPipeline(vae(), text_encoder, tokenizer, unet, diffusers.EulerDiscreteScheduler())


PIPELINES: dict[str, Callable[[], Any]] = {
    "stable-diffusion-3": stable_diffusion_3,
    "flux": flux,
    "chroma": chroma,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "pixart-alpha": partial(pixart, diffusers.PixArtAlphaPipeline),
    "pixart-sigma": partial(pixart, diffusers.PixArtSigmaPipeline),
    "sana": sana,
    "lumina2": lumina2,
    "auraflow": auraflow,
    "wan": wan,
    "cogvideox": cogvideox,
    "ltx-video": ltx_video,
    "hunyuan-video": hunyuan_video,
    "flux2": flux2,
    "flux2-klein": flux2_klein,
    "kolors": kolors,
}
"""How a random pipeline of a layout is made."""


def tiny_transformer(layout: str, seed: int = 0) -> Any:
    """The random pipeline of a layout, always the same."""
    torch.manual_seed(seed)
    pipe = PIPELINES[layout]()
    pipe.set_progress_bar_config(disable=True)
    return pipe
