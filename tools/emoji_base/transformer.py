"""The `emoji-dit` base: Stable Diffusion 3's architecture on the `emoji` base's 8 x 8 x 8 latents.

Rectified flow with logit-normal times (Esser et al. 2024, arXiv 2403.03206). The T5 is trained along with the
transformer. The pooled embedding is zero in half of the training pictures, so that the sequence carries the concept.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Tokenizer

from tools.emoji_base import autoencoder, text_encoders
from tools.emoji_base.artwork import NARROW
from tools.emoji_base.catalogue import random_caption, small
from tools.emoji_base.loop import Place, Schedule, train
from tools.emoji_base.pictures import pool
from tools.emoji_base.text_encoders import POOLED, T5_WIDTH

VARIATIONS, CAPTIONS = 4, 6
"""Pictures per scene, and captions drawn beforehand per picture."""
EMPTY, POOLED_DROPPED = 0.1, 0.5
HEADS, HEAD_WIDTH, BLOCKS = 4, 32, 4


def architecture() -> Any:
    """Four joint blocks of width 128; patches of one latent pixel."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=autoencoder.LATENT_CHANNELS,
        out_channels=autoencoder.LATENT_CHANNELS,
        num_layers=BLOCKS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=2 * POOLED,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def scheduler() -> Any:
    """Rectified flow, without a shift of the times."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def normalised(vae: Any, latents: Tensor) -> Any:
    """The same autoencoder with latents of mean 0 and spread 1 in every channel, in place.

    The pipeline knows one scale and one shift for all channels; here both go into the convolutions next to the latents,
    which is the same map. `latents` [n, 8, 8, 8] are unscaled posterior means.
    """
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    count = len(mean)
    with torch.no_grad():
        vae.quant_conv.weight[:count] /= spread[:, None, None, None]
        vae.quant_conv.bias[:count] = (vae.quant_conv.bias[:count] - mean) / spread
        vae.quant_conv.bias[count:] -= 2 * spread.log()
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= spread[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    return vae


class Model(nn.Module):
    """The transformer and the T5, trained together."""

    def __init__(self, transformer: Any, encoder: Any) -> None:
        super().__init__()
        self.transformer, self.encoder = transformer, encoder

    def forward(self, noisy: Tensor, sigma: Tensor, clip: Tensor, pooled: Tensor, tokens: Tensor) -> Tensor:
        """The velocity [n, 8, 8, 8]; `clip` [n, LENGTH, 2 * CLIP_WIDTH] is padded with zeros and stands before the T5's."""
        heard = self.encoder(tokens)[0]
        padded = nn.functional.pad(clip, (0, heard.shape[-1] - clip.shape[-1]))
        found: Tensor = self.transformer(
            hidden_states=noisy,
            timestep=sigma * 1000,
            encoder_hidden_states=torch.cat([padded, heard], dim=1),
            pooled_projections=pooled,
        ).sample
        return found


@torch.no_grad()
def clip_said(place: Place, texts: list[str]) -> tuple[Tensor, Tensor]:
    """What both CLIP towers say, as the pipeline joins it: float16 [n, LENGTH, 2 * CLIP_WIDTH] and [n, 2 * POOLED]."""
    sequences, pooled = [], []
    for name in ("", "_2"):
        tok = CLIPTokenizer.from_pretrained(place.out / f"tokenizer{name}")
        tower: Any = CLIPTextModelWithProjection.from_pretrained(
            place.out / f"text_encoder{name}", torch_dtype=torch.float32
        )
        parts = [tower.eval()(p, output_hidden_states=True) for p in text_encoders.ids(tok, texts).split(512)]
        sequences.append(torch.cat([p.hidden_states[-2].half() for p in parts]))
        pooled.append(torch.cat([p.text_embeds.half() for p in parts]))
    return torch.cat(sequences, -1), torch.cat(pooled, -1)


def run(place: Place, schedule: Schedule) -> None:
    """Train; save `out` as a Stable Diffusion 3 pipeline."""
    torch.manual_seed(place.seed)
    emoji = Place(place.work, place.out.parent / "emoji", place.data, place.device, place.seed)
    pictures, scenes = pool(place, VARIATIONS, placement=NARROW, words=small())
    vae = autoencoder.load(emoji)
    vae = normalised(vae, autoencoder.encoded(vae, pictures[::7]))
    x0 = autoencoder.encoded(vae, pictures).to(place.device)
    rng = random.Random(place.seed)
    texts = [random_caption(scene, rng)[0] for scene in scenes for _ in range(CAPTIONS)] + [""]
    unique = list(dict.fromkeys(texts))
    place_of = {text: i for i, text in enumerate(unique)}
    row = torch.tensor([place_of[text] for text in texts])
    clip, pooled = (said.to(place.device) for said in clip_said(place, unique))
    tok: Any = T5Tokenizer.from_pretrained(place.out / "tokenizer_3")
    tokens = text_encoders.ids(tok, unique).to(place.device)
    model = Model(architecture(), text_encoders.t5(tok)).to(place.device)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(x0), (schedule.batch,), generator=generator)
        caption = chosen * CAPTIONS + torch.randint(CAPTIONS, (schedule.batch,), generator=generator)
        caption[torch.rand(schedule.batch, generator=generator) < EMPTY] = len(texts) - 1
        sigma = torch.randn(schedule.batch, generator=generator).sigmoid().to(place.device)
        noise = torch.randn((schedule.batch, *x0.shape[1:]), generator=generator).to(place.device)
        heard = (torch.rand(schedule.batch, 1, generator=generator) >= POOLED_DROPPED).to(place.device)
        s, which = sigma[:, None, None, None], row[caption]
        found = model(
            (1 - s) * x0[chosen] + s * noise, sigma, clip[which].float(), pooled[which].float() * heard, tokens[which]
        )
        loss: Tensor = (found - (noise - x0[chosen])).square().mean()
        return loss

    train("dit", model, loss_of, place, schedule)
    save(place, vae, model, tok)


def save(place: Place, vae: Any, model: Model, tok: Any) -> None:
    """Everything that the pipeline needs, in half precision; the towers and tokenizers are there already."""
    vae.half().save_pretrained(place.out / "vae", safe_serialization=True)
    model.encoder.half().save_pretrained(place.out / "text_encoder_3", safe_serialization=True)
    model.transformer.half().save_pretrained(place.out / "transformer", safe_serialization=True)
    scheduler().save_pretrained(place.out / "scheduler")
    towers: list[Any] = []
    for name in ("", "_2"):
        towers.append(CLIPTextModelWithProjection.from_pretrained(place.out / f"text_encoder{name}"))
        towers.append(CLIPTokenizer.from_pretrained(place.out / f"tokenizer{name}"))
    pipe: Any = StableDiffusion3Pipeline(
        model.transformer, scheduler(), vae, towers[0], towers[1], towers[2], towers[3], model.encoder, tok
    )
    pipe.save_config(place.out)


def load_pipeline(folder: Path, device: torch.device) -> Any:
    """The finished base, in single precision."""
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
