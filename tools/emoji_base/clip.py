"""A tiny CLIP: its text tower conditions the U-Net, and the whole serves as a second judge.

Contrastive as in CLIP, with two differences. A caption may leave style or background open and so fit many pictures of a
batch; every picture that satisfies a caption counts as its positive, and each row's target is uniform over them. And
linear heads, thrown away afterwards, name object, style and background from both towers' embeddings: batches of 64 say
little about objects, because style and background alone tell most of their pictures apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

from tools.emoji_base.catalogue import Scene, allows, captions, catalogue, random_caption
from tools.emoji_base.loop import Place, Schedule, train
from tools.emoji_base.pictures import HELD_OUT_SEED, as_input, pool
from tools.emoji_base.tokens import LENGTH, tokenize, tokenizer

WIDTH = 384
"""Of the text tower's hidden states, which the U-Net reads."""


def architecture(tok: CLIPTokenizer) -> CLIPModel:
    """Two text layers and four picture layers (8 x 8 patches)."""
    return CLIPModel(
        CLIPConfig(
            text_config={
                "vocab_size": len(tok),
                "hidden_size": WIDTH,
                "intermediate_size": 2 * WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 6,
                "max_position_embeddings": LENGTH,
                "bos_token_id": tok.bos_token_id,
                "eos_token_id": tok.eos_token_id,
                "pad_token_id": tok.pad_token_id,
                "projection_dim": 128,
            },
            vision_config={
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 8,
                "projection_dim": 128,
            },
            projection_dim=128,
        )
    )


def load_text(place: Place) -> tuple[CLIPTokenizer, Any]:
    """The finished tokenizer and text tower, in single precision."""
    encoder: Any = CLIPTextModel.from_pretrained(place.out / "text_encoder", torch_dtype=torch.float32)
    return CLIPTokenizer.from_pretrained(place.out / "tokenizer"), encoder.eval()


def run(place: Place, schedule: Schedule) -> None:
    """Train; save `out/tokenizer`, `out/text_encoder` and the whole as `out/clip`."""
    torch.manual_seed(place.seed)
    tok = tokenizer()
    clip: Any = architecture(tok)
    if place.start:
        before: Any = CLIPModel.from_pretrained(place.start / "clip", torch_dtype=torch.float32)
        clip.vision_model.load_state_dict(before.vision_model.state_dict())
        clip.visual_projection.load_state_dict(before.visual_projection.state_dict())
    heads = Heads(clip.config.projection_dim)
    both = nn.ModuleDict({"clip": clip, "heads": heads}).to(place.device)
    pictures, scenes = pool(place, 2)
    print(f"vocabulary of {len(tok)} tokens", flush=True)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(scenes), (schedule.batch,), generator=generator).tolist()
        rng = random.Random(place.seed * 1_000_003 + step)
        texts, asked = zip(*(random_caption(scenes[i], rng) for i in chosen), strict=True)
        fits = torch.tensor([[allows(a, scenes[i]) for i in chosen] for a in asked], dtype=torch.float32)
        ids = tokenize(tok, list(texts))
        # Padding follows the end in a causal tower and changes nothing before it: cut it off, but for one token.
        longest = int((ids == tok.eos_token_id).int().argmax(1).max()) + 1
        found = clip(
            input_ids=ids[:, :longest].to(place.device), pixel_values=as_input(pictures[chosen]).to(place.device)
        )
        fits = fits.to(place.device)
        contrast = _soft_cross_entropy(found.logits_per_text, fits) + _soft_cross_entropy(
            found.logits_per_image, fits.T
        )
        named: Tensor = heads(found.image_embeds, [scenes[i] for i in chosen]) + heads(found.text_embeds, asked)
        return contrast + named

    train("clip", both, loss_of, place, schedule)
    held_out, shown = pool(place, 1, HELD_OUT_SEED)
    print(f"clip zero-shot object accuracy {zero_shot(clip, tok, held_out, shown):.4f}, n = {len(shown)}", flush=True)
    save(clip, tok, place.out)


class Heads(nn.Module):
    """Linear classifiers of an embedding; what a caption leaves open is not asked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        known = catalogue()
        self.classes = {"object": known.objects, "style": known.styles, "background": known.backgrounds}
        self.linear = nn.ModuleDict({name: nn.Linear(width, len(found)) for name, found in self.classes.items()})

    def forward(self, embeddings: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """The sum of the heads' cross-entropies. Embeddings have unit length, so logits are scaled up."""
        total = embeddings.new_zeros(())
        for name, known in self.classes.items():
            truth = [known.index(value) if (value := getattr(scene, name)) is not None else -1 for scene in scenes]
            target = torch.tensor(truth, device=embeddings.device)
            if (target >= 0).any():
                total = total + nn.functional.cross_entropy(10 * self.linear[name](embeddings), target, ignore_index=-1)
        return total


@torch.no_grad()
def zero_shot(clip: Any, tok: CLIPTokenizer, pictures: Tensor, scenes: list[Scene]) -> float:
    """How often the caption nearest to a picture, of one for each object, names what it shows."""
    objects = catalogue().objects
    texts = tokenize(tok, [captions(Scene(name))[1] for name in objects]).to(clip.device)
    found = torch.cat(
        [
            clip(input_ids=texts, pixel_values=as_input(part).to(clip.device)).logits_per_image.argmax(1).cpu()
            for part in pictures.split(256)
        ]
    )
    right = sum(objects[int(i)] == scene.object for i, scene in zip(found, scenes, strict=True))
    return right / len(scenes)


def _soft_cross_entropy(logits: Tensor, fits: Tensor) -> Tensor:
    target = fits / fits.sum(1, keepdim=True)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def save(clip: Any, tok: CLIPTokenizer, out: Path) -> None:
    """The text tower as Stable Diffusion's `text_encoder`, the tokenizer, and the whole CLIP with its preprocessing."""
    text: Any = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    text.half().save_pretrained(out / "text_encoder", safe_serialization=True)
    tok.save_pretrained(out / "tokenizer")
    CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size=64, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    ).save_pretrained(out / "clip")
    tok.save_pretrained(out / "clip")
    clip.half().save_pretrained(out / "clip", safe_serialization=True)
