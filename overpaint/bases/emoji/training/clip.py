"""A tiny CLIP: its text tower conditions the U-Net, and the whole serves as a judge.

Contrastive as in CLIP, with two differences. A caption may leave style or background open and so fit many pictures of a
batch; every picture that satisfies a caption counts as its positive, and each row's target is uniform over them. And
linear heads, thrown away afterwards, name object, style and background from both towers' embeddings: batches of 64 say
little about objects, because style and background alone tell most of their pictures apart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

from overpaint.bases.emoji.catalogue import Scene, captions, catalogue, random_caption
from overpaint.bases.emoji.training.loop import Run, train
from overpaint.bases.emoji.training.pictures import HELD_OUT_SEED, TRAINING_SEED, as_input, pool

LENGTH, WIDTH = 24, 192


def corpus() -> Iterator[str]:
    """Every training caption once; synonyms included."""
    words = catalogue()
    for scene in words.scenes():
        yield from captions(scene)
    for style in words.styles:
        yield from captions(Scene(style=style))
    for background in words.backgrounds:
        yield from captions(Scene(background=background))


def tokenizer() -> CLIPTokenizer:
    """A byte-level BPE trained on the captions until every word of theirs is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    sentences = sorted(set(corpus()))
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences, trainer)
    model = json.loads(bpe.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges = [tuple(pair) for pair in model["merges"]]
    tokens += [t for t in ("".join(pair) for pair in merges) if t not in set(tokens)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocabulary, merges=cast(Any, merges), model_max_length=LENGTH)


def architecture(tok: CLIPTokenizer) -> CLIPModel:
    """Three text layers and four picture layers (8 x 8 patches)."""
    return CLIPModel(
        CLIPConfig(
            text_config={
                "vocab_size": len(tok),
                "hidden_size": WIDTH,
                "intermediate_size": 4 * WIDTH,
                "num_hidden_layers": 3,
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


def tokenize(tok: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids [n, length], padded and truncated as the pipeline does."""
    found = tok(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return cast(Tensor, found.input_ids)


def run(spec: Run) -> None:
    """Train; save `out/tokenizer`, `out/text_encoder` and the whole as `out/clip`."""
    torch.manual_seed(spec.seed)
    tok = tokenizer()
    clip: Any = architecture(tok)
    heads = Heads(clip.config.projection_dim)
    both = nn.ModuleDict({"clip": clip, "heads": heads}).to(spec.device)
    pictures, scenes = pool(spec.data, 6, TRAINING_SEED)
    print(f"vocabulary of {len(tok)} tokens")

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(scenes), (spec.batch,), generator=generator).tolist()
        rng = random.Random(spec.seed * 1_000_003 + step)
        texts, asked = zip(*(random_caption(scenes[i], rng) for i in chosen), strict=True)
        fits = torch.tensor([[a.allows(scenes[i]) for i in chosen] for a in asked], dtype=torch.float32).to(spec.device)
        found = clip(
            input_ids=tokenize(tok, list(texts)).to(spec.device),
            pixel_values=as_input(pictures[chosen]).to(spec.device),
        )
        contrast = _soft_cross_entropy(found.logits_per_text, fits) + _soft_cross_entropy(
            found.logits_per_image, fits.T
        )
        named: Tensor = heads(found.image_embeds, [scenes[i] for i in chosen]) + heads(found.text_embeds, asked)
        return contrast + named

    train("clip", both, loss_of, spec)
    held_out, shown = pool(spec.data, 1, HELD_OUT_SEED)
    print(f"clip zero-shot object accuracy {zero_shot(clip, tok, held_out, shown):.4f} on held-out drawings")
    save(clip, tok, spec.out)


class Heads(nn.Module):
    """Linear classifiers of an embedding; what a caption leaves open is not asked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        words = catalogue()
        self.classes = {"object": words.objects, "style": words.styles, "background": words.backgrounds}
        self.linear = nn.ModuleDict({name: nn.Linear(width, len(known)) for name, known in self.classes.items()})

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
    objects, right = catalogue().objects, 0
    texts = tokenize(tok, [captions(Scene(name))[1] for name in objects]).to(clip.device)
    for part, shown in zip(pictures.split(256), _parts(scenes, 256), strict=True):
        found = clip(input_ids=texts, pixel_values=as_input(part).to(clip.device)).logits_per_image.argmax(1)
        right += sum(objects[i] == scene.object for i, scene in zip(found.tolist(), shown, strict=True))
    return right / len(scenes)


def _parts(scenes: list[Scene], size: int) -> list[list[Scene]]:
    return [scenes[start : start + size] for start in range(0, len(scenes), size)]


def _soft_cross_entropy(logits: Tensor, fits: Tensor) -> Tensor:
    target = fits / fits.sum(1, keepdim=True)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def save(clip: Any, tok: CLIPTokenizer, out: Path) -> None:
    """The text tower as Stable Diffusion's `text_encoder`, the tokenizer, and the whole CLIP with its preprocessing."""
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    text.half().save_pretrained(out / "text_encoder", safe_serialization=True)
    tok.save_pretrained(out / "tokenizer")
    CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size=64, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    ).save_pretrained(out / "clip")
    tok.save_pretrained(out / "clip")
    clip.half().save_pretrained(out / "clip", safe_serialization=True)
