"""The U-Net: predicts the noise on 8 x 8 x 8 latents, conditioned by the frozen text tower (Rombach et al. 2022).

Noise prediction on Stable Diffusion's scaled-linear schedule, one caption in ten empty for classifier-free guidance,
and the min-SNR weights of Hang et al. (2023, arXiv 2303.09556, gamma 5), which spend the few steps we have on the
noise levels where a picture is decided.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from overpaint.bases import emoji
from overpaint.bases.emoji.catalogue import Scene, catalogue, random_caption
from overpaint.bases.emoji.training.clip import WIDTH, tokenize
from overpaint.bases.emoji.training.loop import Run, sheet, train
from overpaint.bases.emoji.training.pictures import TRAINING_SEED, as_input, pool
from overpaint.bases.emoji.training.vae import LATENT_CHANNELS

VARIATIONS, CAPTIONS = 5, 3
"""Pictures per scene, and captions drawn beforehand per picture (encoding them in the loop would cost a tenth of it)."""
EMPTY = 0.1
SNR_CAP = 5.0


def architecture() -> UNet2DConditionModel:
    """4.3 million parameters; cross-attention at both resolutions."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )


def scheduler() -> Any:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def latents(vae: Any, pictures: Tensor) -> Tensor:
    """Scaled posterior means, float32 [n, 8, 8, 8]."""
    parts = [vae.encode(as_input(batch)).latent_dist.mean for batch in pictures.split(256)]
    found: Tensor = torch.cat(parts) * vae.config.scaling_factor
    return found


@torch.no_grad()
def embeddings(encoder: CLIPTextModel, tok: CLIPTokenizer, texts: list[str]) -> Tensor:
    """The text tower's last hidden states, float16 [n, length, width]; equal texts are encoded once."""
    unique = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(unique)}
    ids = tokenize(tok, unique)
    found = torch.cat([encoder(batch).last_hidden_state.half() for batch in ids.split(256)])
    return found[[place[text] for text in texts]]


def run(spec: Run) -> None:
    """Train; save `out/unet`, `out/scheduler` and `model_index.json`."""
    torch.manual_seed(spec.seed)
    vae: Any = AutoencoderKL.from_pretrained(spec.out / "vae", dtype=torch.float32, low_cpu_mem_usage=False).eval()
    tok = CLIPTokenizer.from_pretrained(spec.out / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(spec.out / "text_encoder", dtype=torch.float32).eval()
    pictures, scenes = pool(spec.data, VARIATIONS, TRAINING_SEED)
    x0 = latents(vae, pictures).to(spec.device)
    texts = _captions(scenes, spec.seed)
    hidden = embeddings(encoder, tok, [*texts, ""]).to(spec.device)
    unet: Any = architecture()
    unet.to(spec.device)
    noise_schedule = scheduler()
    alphas = noise_schedule.alphas_cumprod
    weights = (SNR_CAP * (1 - alphas) / alphas).clamp(max=1).to(spec.device)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(x0), (spec.batch,), generator=generator)
        caption = chosen * CAPTIONS + torch.randint(CAPTIONS, (spec.batch,), generator=generator)
        caption[torch.rand(spec.batch, generator=generator) < EMPTY] = len(texts)
        t = torch.randint(len(alphas), (spec.batch,), generator=generator)
        noise = torch.randn((spec.batch, *x0.shape[1:]), generator=generator).to(spec.device)
        noisy = noise_schedule.add_noise(x0[chosen], noise, t.to(spec.device))
        predicted = unet(noisy, t.to(spec.device), hidden[caption].float()).sample
        loss: Tensor = (weights[t] * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()
        return loss

    def draw(module: nn.Module, step: int) -> None:
        pipe: Any = StableDiffusionPipeline(
            vae, encoder, tok, module, noise_schedule, None, None, requires_safety_checker=False
        )
        pipe.set_progress_bar_config(disable=True)
        prompts = [f"a picture of a {o} in {s} style" for s in catalogue().styles for o in _SHOWN]
        found = pipe(
            prompts,
            num_inference_steps=20,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        sheet([p * 2 - 1 for p in found.images], len(_SHOWN), spec.work / f"unet-{step}.png")

    train("unet", unet, loss_of, spec, every=draw)
    shutil.copyfile(Path(str(emoji.__file__)).parent / "overpaint.json", spec.out / "overpaint.json")
    unet.half().save_pretrained(spec.out / "unet", safe_serialization=True)
    noise_schedule.save_pretrained(spec.out / "scheduler")
    pipe: Any = StableDiffusionPipeline(
        vae, encoder, tok, unet, noise_schedule, None, None, requires_safety_checker=False
    )
    pipe.save_config(spec.out)


_SHOWN = ("cat", "dog", "fox", "tiger", "car", "bus", "apple", "pizza", "rose", "pistol", "beer", "robot")


def _captions(scenes: list[Scene], seed: int) -> list[str]:
    rng = random.Random(seed)
    return [random_caption(scene, rng)[0] for scene in scenes for _ in range(CAPTIONS)]
