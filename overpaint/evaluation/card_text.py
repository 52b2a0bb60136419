"""The words of the embedded base's model card, around the numbers that `model_card` measures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from overpaint.bases.emoji.catalogue import catalogue
from overpaint.evaluation.images import Sampler
from overpaint.evaluation.judging import Score

WORST = 10
"""Objects listed as the hardest."""
LICENCES = {
    "twemoji": ("Twemoji, by Twitter, Inc and other contributors", "CC BY 4.0"),
    "noto": ("Noto Emoji, by Google", "Apache-2.0"),
    "blobmoji": ("Blobmoji, from Noto Emoji", "Apache-2.0"),
    "emojitwo-bw": ("EmojiTwo, from EmojiOne 2", "CC BY 4.0"),
    "fluent-3d": ("Fluent Emoji, by Microsoft", "MIT"),
    "fluent-hc": ("Fluent Emoji, by Microsoft", "MIT"),
}


@dataclass(frozen=True)
class CardTable:
    """What `model_card.measure` found.

    `sweep` is (guidance, object accuracy on training templates), empty when only one guidance was tried. `held_out` and
    `trained` are accuracies by judge head; `per_style` is (style, object) accuracy over the prompts that name it.
    """

    sampler: Sampler
    sweep: tuple[tuple[float, Score], ...]
    held_out: dict[str, Score]
    trained: dict[str, Score]
    per_object: dict[str, Score]
    per_style: dict[str, tuple[Score, Score]]


@dataclass(frozen=True)
class Component:
    """A part of the model: its class, how many values its files hold, and its weights' size on disk in bytes."""

    name: str
    kind: str
    values: int
    size: int
    facts: str = ""


def components(folder: Path) -> list[Component]:
    """The parts of a diffusers folder that have weights, read from file headers only."""
    found = []
    for path in sorted(folder.glob("*/*.safetensors")):
        config = path.parent / "config.json"
        raw: dict[str, Any] = json.loads(config.read_text("utf-8")) if config.exists() else {}
        with safe_open(path, "pt") as tensors:
            count = sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        kind = raw.get("_class_name") or next(iter(raw.get("architectures") or ()), "Judge")
        found.append(Component(path.parent.name, kind, count, path.stat().st_size, _facts(raw)))
    return found


def _facts(config: dict[str, Any]) -> str:
    shown = ("block_out_channels", "cross_attention_dim", "latent_channels", "hidden_size", "num_hidden_layers")
    parts = [f"{key.replace('_', ' ')} {config[key]}" for key in (*shown, "max_position_embeddings") if config.get(key)]
    return "; ".join(parts)


def card_markdown(table: CardTable, parts: Sequence[Component]) -> str:
    """The model card, Markdown. Numbers are those of `table` and of the files; nothing else is claimed."""
    words = catalogue()
    blocks = [
        "# Model card: the emoji base",
        f"A small Stable Diffusion that draws {len(words.objects)} objects in {len(words.styles)} emoji styles on "
        f"{len(words.backgrounds)} background colours, 64 x 64 pixels. It ships with Overpaint so that erasing can be "
        "tried, tested and judged without a network and without a graphics card.",
        *_measurements(table),
        "## Shapes and sizes",
        _markdown(
            ("folder", "class", "values", "on disk", "shape"),
            ((p.name, p.kind, f"{p.values:,}", f"{p.size / 1e6:.2f} MB", p.facts) for p in parts),
        ),
        f"Together {sum(p.size for p in parts) / 1e6:.1f} MB. Pictures become 8 x 8 x 8 latents.",
        files(__package__).joinpath("card_prose.md").read_text("utf-8").strip(),
        "## Licences of the artwork",
        "The model was trained on resized artwork of these sets. Whoever passes on the model, or pictures made with "
        "it, passes on this table.",
        _markdown(("style", "artwork", "licence"), (_licence_row(style) for style in words.styles)),
    ]
    return "\n\n".join(blocks) + "\n"


def _licence_row(style: str) -> tuple[str, str, str]:
    words = catalogue()
    artwork, licence = LICENCES[words.artwork[style]]
    variant = {"emojitwo-bw": ", black and white", "fluent-3d": ", 3D", "fluent-hc": ", high contrast"}
    extra = variant.get(words.artwork[style], "")
    if style in words.duotones:
        extra += "; redrawn in two colours"
    return style, artwork + extra, licence


def _measurements(table: CardTable) -> Iterable[str]:
    sampler, first = table.sampler, next(iter(table.per_object.values()))
    yield "## Measured"
    yield (
        f"{sampler.steps} steps of the model's own scheduler, guidance {sampler.guidance:g}, {first.n} pictures per "
        "object, each with its own seed; a third of the prompts name the object alone, a third a style too, a third a "
        "background too. The verdicts are those of the judge that ships with the model: a small classifier trained on "
        "the drawings alone. Intervals are 95% Wilson intervals; they cover the choice of seeds, not the mistakes of "
        "the judge."
    )
    yield _markdown(
        ("right", "held-out templates", "training templates"),
        ((head, str(score), str(table.trained[head])) for head, score in table.held_out.items()),
    )
    yield f"The {WORST} objects it draws least reliably (held-out templates):"
    worst = sorted(table.per_object.items(), key=lambda pair: (pair[1].rate, pair[0]))[:WORST]
    yield _markdown(("object", "right"), ((name, str(score)) for name, score in worst))
    yield "By style, over the held-out prompts that name one:"
    yield _markdown(
        ("style", "style right", "object right"), ((name, str(a), str(b)) for name, (a, b) in table.per_style.items())
    )
    if table.sweep:
        yield "The guidance was chosen on training templates, with seeds that are not used above:"
        yield _markdown(("guidance", "object right"), ((f"{g:g}", str(score)) for g, score in table.sweep))


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
