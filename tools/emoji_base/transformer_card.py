"""The card of the `emoji-dit` base: what it draws with both text inputs, and with either of them silenced."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tools.emoji_base.card import (
    LICENCES,
    LIMITS,
    by_style,
    contact_sheet,
    main_table,
    protocol,
    save_verdicts,
    sizes,
    weakest,
)
from tools.emoji_base.catalogue import small, write_words
from tools.emoji_base.judge import Judge
from tools.emoji_base.loop import Place, Schedule
from tools.emoji_base.measuring import Draw, Verdict, drawing, judged, questions, share
from tools.emoji_base.text_encoders import LENGTH
from tools.emoji_base.transformer import load_pipeline

STEPS, GUIDANCE, LATENT = 20, 3.0, (8, 8, 8)
HELD_OUT, TRAINING, SILENCED = 14, 5, 5
"""Pictures per object on either kind of template, and with one input silenced."""


def run(place: Place, schedule: Schedule) -> None:
    """Measure the finished base and write its README.md and measured.json; the judge is the `emoji` base's."""
    shutil.copytree(place.out.parent / "emoji" / "judge", place.out / "judge", dirs_exist_ok=True)
    pipe = load_pipeline(place.out, place.device)
    draw = drawing(pipe, LATENT, STEPS, GUIDANCE, LENGTH)
    write_words(place.out, small(), {"guidance": GUIDANCE, "prompt_length": LENGTH, "size": 64})
    judge = Judge.load(place.out / "judge")
    held_out = judged(draw, judge, questions(HELD_OUT, held_out=True, words=small()), schedule.batch)
    training = judged(draw, judge, questions(TRAINING, held_out=False, words=small()), schedule.batch)
    save_verdicts(place.out, held_out, training)
    contact_sheet(draw, place.work / "emoji-dit.png", small())
    asked = questions(SILENCED, held_out=True, words=small())
    silenced = {name: judged(without(pipe, name), judge, asked, schedule.batch) for name in ("pooled", "sequence")}
    (place.out / "README.md").write_text(_card(place, held_out, training, silenced), "utf-8")


def without(pipe: Any, silenced: str) -> Draw:
    """Draw with one text input zero, "pooled" or "sequence", for the prompt and for the empty prompt alike."""

    @torch.no_grad()
    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        sequence, empty, pooled, empty_pooled = pipe.encode_prompt(
            prompts, None, None, max_sequence_length=LENGTH, device=pipe.device
        )
        if silenced == "pooled":
            pooled, empty_pooled = torch.zeros_like(pooled), torch.zeros_like(empty_pooled)
        else:
            sequence, empty = torch.zeros_like(sequence), torch.zeros_like(empty)
        noise = torch.stack([torch.randn(LATENT, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        images = pipe(
            prompt_embeds=sequence,
            negative_prompt_embeds=empty,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=empty_pooled,
            latents=noise.to(pipe.device),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=64,
            width=64,
            output_type="pt",
        ).images
        found: Tensor = images.float().cpu() * 2 - 1
        return found

    return draw


def _silenced(silenced: dict[str, list[Verdict]]) -> str:
    lines = ["| zero | object | style | background |", "| --- | --- | --- | --- |"]
    for name, verdicts in silenced.items():
        cells = [str(share(verdicts, head)) for head in ("object", "style", "background")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _card(
    place: Place, held_out: Sequence[Verdict], training: Sequence[Verdict], silenced: dict[str, list[Verdict]]
) -> str:
    known = small()
    counts = f"{len(known.objects)} objects in {len(known.styles)} emoji styles on {len(known.backgrounds)} background"
    return f"""# Model card: the emoji-dit base

A small Stable Diffusion 3 that draws {counts} colours, 64 x 64 pixels. It ships with Overpaint so that erasing from a
diffusion transformer can be tried, tested and judged without a network and without a graphics card.

Call the pipeline with `max_sequence_length={LENGTH}`: the T5 was trained at that length and reads its padding too.

## Measured

{protocol(HELD_OUT, TRAINING)}

{main_table(held_out, training)}

The objects it draws least reliably (held-out templates):

{weakest(held_out)}

By style, over the held-out prompts that name one:

{by_style(held_out)}

## Where the concept enters

The transformer reads text through `context_embedder` (the sequence) and `time_text_embed.text_embedder` (the pooled
embedding). The pooled embedding was zero in half of the training pictures. With one of the two zero for the prompt and the
empty prompt alike, {SILENCED} pictures per object on held-out templates:

{_silenced(silenced)}

## Shapes and sizes

{sizes(place.out)}

Two CLIP towers with projection, 96 wide each, are joined, padded with zeros to 384, and stand before a T5 of the same
width; {LENGTH} tokens each. The transformer has four joint blocks of width 128 and patches of one latent pixel.

## How it was trained

By `python -m tools.emoji_base`: the `emoji` base's autoencoder, its latents brought to mean 0 and spread 1 in every channel;
two CLIP towers that learned from captions what the `emoji` base's CLIP says, then frozen; a T5 that reads both ways, trained
along with the transformer; rectified flow with logit-normal times (arXiv 2403.03206), one caption in ten empty. There is one
drawing for each object and style; each is scaled, shifted, turned and laid on a colour. Weights are stored in half
precision.

## Intended use

Trying, testing, teaching and comparing ways of erasing concepts from diffusion transformers. It is an ordinary diffusers
folder; the code that loads it loads larger bases too.

## Limits

{LIMITS}

## Licences of the artwork

The model was trained on resized artwork of these sets. Whoever passes on the model, or pictures made with it, passes on this
table.

{LICENCES}
"""
