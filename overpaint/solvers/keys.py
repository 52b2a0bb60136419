"""Keys and values: the text embeddings that speak of a concept, and those that should stand in their place.

Embeddings are contextual, so a concept's keys come from several sentences; and the text encoder is causal, so they are
taken from every position at and after the concept's first token: later tokens and the padding carry the concept too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.text import TextEncoder
from overpaint.concepts import Concept


@dataclass(frozen=True)
class Sentences:
    """For one kind of concept: pairs of a sentence with `{}` for the concept, and the same sentence without it."""

    pairs: tuple[tuple[str, str], ...]


@cache
def _defaults() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(files("overpaint.solvers").joinpath("sentences.json").read_text("utf-8"))
    return raw


def sentences(base: Base, kind: str) -> Sentences:
    """The sentences for a kind of concept: the base's own (`overpaint.json`) or the package's."""
    table = {**_defaults(), **base.extras.get("sentences", {})}
    found = table["style" if kind == "style" else "object"]
    return Sentences(tuple((pair[0], pair[1]) for pair in found))


def neutral_sentences(base: Base) -> tuple[str, ...]:
    """Sentences in which every word of the vocabulary is preserved."""
    table = {**_defaults(), **base.extras.get("sentences", {})}
    return tuple(table["neutral"])


def keys_of(encoder: TextEncoder, words: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Embeddings of every word in every template, from its first token on: float64 [d, m]."""
    prompts = [(t.format(w), encoder.first_position(t, w)) for w in words for t in templates]
    hidden = encoder.hidden([p for p, _ in prompts])
    return torch.cat([h[start:] for h, (_, start) in zip(hidden, prompts, strict=True)]).double().T.cpu()


def keys_and_values(encoder: TextEncoder, base: Base, concept: Concept) -> tuple[Tensor, Tensor]:
    """K and V of a concept, float64 [d, m] each: where its words are now, and where they should be sent.

    With an anchor, V are the anchor's embeddings in the same sentence at the same positions; without one, those of the
    sentence with the concept left out.
    """
    asked: list[str] = []
    starts: list[int] = []
    for word in concept.words:
        for template, without in sentences(base, concept.kind).pairs:
            asked += [template.format(word), template.format(concept.anchor) if concept.anchor else without]
            starts.append(encoder.first_position(template, word))
    hidden = encoder.hidden(asked).double().cpu()
    keys = torch.cat([h[start:] for h, start in zip(hidden[0::2], starts, strict=True)])
    values = torch.cat([h[start:] for h, start in zip(hidden[1::2], starts, strict=True)])
    return keys.T, values.T
