"""The card of the `emoji` base: what it draws, measured, with its shapes, sizes and the artwork's licences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from tools.emoji_base.catalogue import Catalogue, catalogue
from tools.emoji_base.judge import NONE, Judge
from tools.emoji_base.judge_training import confusion_of
from tools.emoji_base.loop import Place, Schedule
from tools.emoji_base.measuring import Draw, Share, Verdict, drawing, judged, questions, share
from tools.emoji_base.pictures import sheet
from tools.emoji_base.unet import load_pipeline

STEPS, GUIDANCE, LATENT = 20, 3.0, (8, 8, 8)
HELD_OUT, TRAINING = 12, 6
"""Pictures per object on either kind of template."""

LICENCES = """| style | artwork | licence |
| --- | --- | --- |
| flat | Twemoji, by Twitter, Inc and other contributors | CC BY 4.0 |
| clay | Fluent Emoji, by Microsoft, 3D | MIT |
| ink | EmojiTwo, from EmojiOne 2, black and white | CC BY 4.0 |
| sepia | Noto Emoji, by Google; redrawn in two colours | Apache-2.0 |
| blueprint | Fluent Emoji, by Microsoft, high contrast; redrawn in two colours | MIT |
| neon | Blobmoji, from Noto Emoji; redrawn in two colours | Apache-2.0 |"""


def run(place: Place, schedule: Schedule) -> None:
    """Measure the finished base and write its README.md and measured.json."""
    pipe = load_pipeline(place.out, place.device)
    draw = drawing(pipe, LATENT, STEPS, GUIDANCE)
    judge = Judge.load(place.out / "judge")
    held_out = judged(draw, judge, questions(HELD_OUT, held_out=True), schedule.batch)
    training = judged(draw, judge, questions(TRAINING, held_out=False), schedule.batch)
    save_verdicts(place.out, held_out, training)
    contact_sheet(draw, place.work / "emoji.png", catalogue())
    (place.out / "README.md").write_text(_card(place, held_out, training), "utf-8")


def save_verdicts(out: Path, held_out: Sequence[Verdict], training: Sequence[Verdict]) -> None:
    """Every prompt with its seed and what the judge said of the picture, as measured.json."""
    rows = [
        {"prompt": v.asked.prompt, "seed": v.asked.seed, "held_out": kind, **v.named}
        for kind, verdicts in ((True, held_out), (False, training))
        for v in verdicts
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    (out / "measured.json").write_text(f"[\n{lines}\n]\n", "utf-8")


def contact_sheet(draw: Draw, path: Path, words: Catalogue, per_style: int = 20) -> None:
    """A row for each style, of objects spread over the catalogue."""
    chosen = words.objects[:: max(1, len(words.objects) // per_style)][:per_style]
    prompts = [f"a picture of a {name} in {style} style" for style in words.styles for name in chosen]
    sheet(draw(prompts, list(range(len(prompts)))), len(chosen), path)


def main_table(held_out: Sequence[Verdict], training: Sequence[Verdict]) -> str:
    """Objects, styles and backgrounds on both kinds of templates."""
    rows = [
        f"| {head} | {share(held_out, head)} | {share(training, head)} |" for head in ("object", "style", "background")
    ]
    return "\n".join(["| right | held-out templates | training templates |", "| --- | --- | --- |", *rows])


def weakest(verdicts: Sequence[Verdict], count: int = 12) -> str:
    """The objects drawn least reliably, and what the judge names in their place."""
    rows = []
    for name in dict.fromkeys(str(v.asked.scene.object) for v in verdicts):
        own = [v for v in verdicts if v.asked.scene.object == name]
        instead = Counter(v.named["object"] for v in own if not v.right("object")).most_common(2)
        rows.append((share(own, "object"), name, ", ".join(f"{n} ({k})" for n, k in instead)))
    rows.sort(key=lambda row: (row[0].right / max(1, row[0].n), row[1]))
    lines = [f"| {name} | {found} | {instead} |" for found, name, instead in rows[:count]]
    return "\n".join(["| object | right | named instead (times) |", "| --- | --- | --- |", *lines])


def by_style(verdicts: Sequence[Verdict]) -> str:
    """Style and object, over the prompts that name a style."""
    lines = []
    for style in dict.fromkeys(v.asked.scene.style for v in verdicts if v.asked.scene.style):
        own = [v for v in verdicts if v.asked.scene.style == style]
        lines.append(f"| {style} | {share(own, 'style')} | {share(own, 'object')} |")
    return "\n".join(["| style | style right | object right |", "| --- | --- | --- |", *lines])


def judge_tables(out: Path) -> str:
    """What the judge says of held-out drawings and of pictures that show none of the objects."""
    found = confusion_of(out)
    lines = ["| held-out pictures | object | style | background |", "| --- | --- | --- | --- |"]
    for kind, right in found["right"].items():
        cells = [str(Share(round(right[head] * found["n"]), found["n"])) for head in ("object", "style", "background")]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += ["", f'| nothing to name | said "{NONE}" |', "| --- | --- |"]
    for kind, said in found["nothing"].items():
        lines.append(f"| {kind} | {Share(round(said[NONE] * said['n']), said['n'])} |")
    sure = found["calibration"]
    lines += [
        "",
        f"On held-out drawings its mean confidence is {sure['confidence']:.1%} at an accuracy of {sure['accuracy']:.1%} "
        f"(expected calibration error {sure['expected calibration error']:.1%}). `judge/confusion.json` lists what it "
        "takes for what.",
    ]
    return "\n".join(lines)


def sizes(out: Path) -> str:
    """Values and megabytes by folder."""
    lines, total = ["| folder | values | on disk |", "| --- | --- | --- |"], 0
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        files = list(folder.rglob("*"))
        weights = sorted(folder.glob("*.safetensors"))
        total += sum(f.stat().st_size for f in files if f.is_file())
        if weights:
            size = sum(f.stat().st_size for f in weights)
            lines.append(f"| {folder.name} | {sum(_values(f) for f in weights):,} | {size / 1e6:.2f} MB |")
    return "\n".join([*lines, "", f"Together {total / 1e6:.1f} MB. Pictures become 8 x 8 x 8 latents."])


def _values(path: Path) -> int:
    total = 0
    with safe_open(path, "pt") as file:
        for name in list(file.keys()):
            size = 1
            for edge in file.get_slice(name).get_shape():
                size *= edge
            total += size
    return total


def protocol(held_out: int, training: int) -> str:
    """How the figures above came about."""
    return (
        f"{STEPS} steps of the model's own scheduler, guidance {GUIDANCE:g}, {held_out} pictures per object on held-out "
        f"templates and {training} on training templates, each with its own seed; a third of the prompts name the object "
        "alone, a third a style too, a third a background too. The verdicts are those of the judge that ships with the "
        "model: a small classifier trained on the drawings and on pictures that show none of the objects. Intervals are "
        "95% Wilson intervals; they cover the choice of seeds, not the mistakes of the judge. `measured.json` has every "
        "prompt, seed and verdict."
    )


LIMITS = f"""- It knows the words of its catalogue and no others; other words give arbitrary pictures.
- One drawing per object and style: it has learned those drawings, and little about the things they show.
- The judge knows the same classes and "{NONE}", which it learned from smears, mixtures, noise and drawings of other things;
  its confusion is above.
- The held-out templates are new sentences made of words that training used; they do not test new words.
- What erases a concept here need not erase it from a large model: it is a test bench, not evidence about other bases.
- The artwork carries the choices of its authors about what a thing looks like."""


def _card(place: Place, held_out: Sequence[Verdict], training: Sequence[Verdict]) -> str:
    known = catalogue()
    counts = f"{len(known.objects)} objects in {len(known.styles)} emoji styles on {len(known.backgrounds)} background"
    return f"""# Model card: the emoji base

A small Stable Diffusion that draws {counts} colours, 64 x 64 pixels. It ships with Overpaint so that erasing can be tried,
tested and judged without a network and without a graphics card.

## Measured

{protocol(HELD_OUT, TRAINING)}

{main_table(held_out, training)}

The objects it draws least reliably (held-out templates):

{weakest(held_out)}

By style, over the held-out prompts that name one:

{by_style(held_out)}

## The judge

{judge_tables(place.out)}

## Shapes and sizes

{sizes(place.out)}

The text is 384 wide and at most 24 tokens long; every word of the catalogue is one token.

## How it was trained

In stages, by `python -m tools.emoji_base`: an autoencoder on pixels and their differences; a tiny CLIP, whose text tower
conditions the U-Net and is frozen by then; a judge; and a U-Net that predicts the velocity (arXiv 2202.00512) on Stable
Diffusion's scaled-linear schedule, one caption in ten empty for classifier-free guidance. The autoencoder,
CLIP's picture tower and the U-Net began with the weights of the earlier, smaller emoji base of 50 objects (`--start`). There
is one drawing for each object and style; each is scaled, shifted, turned and laid on a colour. Captions are filled from
templates and name the object or a synonym of it, the style, the background, or several of these. Weights are stored in half
precision.

## Intended use

Trying, testing, teaching and comparing ways of erasing concepts from text-to-image models. It is an ordinary diffusers
folder; the code that loads it loads larger bases too.

## Limits

{LIMITS}

## Licences of the artwork

The model was trained on resized artwork of these sets. Whoever passes on the model, or pictures made with it, passes on this
table.

{LICENCES}
"""
