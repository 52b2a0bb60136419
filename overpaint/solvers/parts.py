"""Which tensors a solver may train, by the names that papers give to parts of the models."""

from __future__ import annotations

import fnmatch
import re

from overpaint.bases.base import Base

KEYS_AND_VALUES = "keys-and-values"
CROSS_ATTENTION = "cross-attention"
ATTENTION = "attention"
UNET = "unet"

_LAYERS = "text_encoder/text_model.encoder.layers."
_PATTERNS = {
    CROSS_ATTENTION: ("unet/*.attn2.*",),
    ATTENTION: ("unet/*.attn1.*", "unet/*.attn2.*"),
    UNET: ("unet/*",),
}


def tensors(base: Base, part: str) -> list[str]:
    """Canonical names of a part's tensors, biases included, sorted."""
    if part == KEYS_AND_VALUES:
        return base.readers()
    return [name for name in base.names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _PATTERNS[part])]


def layers(base: Base, pattern: str) -> list[str]:
    """The weights of all linear layers and convolutions (norms have none) whose names fit a pattern, sorted."""
    return [
        name
        for name in fnmatch.filter(base.names, pattern)
        if name.endswith(".weight") and len(base.places[name].shape) > 1
    ]


def with_biases(base: Base, weights: list[str]) -> list[str]:
    """Weights and the biases beside them, sorted."""
    beside = (name.removesuffix("weight") + "bias" for name in weights)
    return sorted([*weights, *(name for name in beside if name in base.places)])


def encoder_layers(base: Base) -> int:
    """How many layers a base's text encoder has."""
    return 1 + max(int(found[1]) for name in base.names if (found := re.match(f"{_LAYERS}([0-9]+)[.]", name)))


def encoder_layer_tensors(base: Base, *, feed_forward: int, attention: int) -> list[str]:
    """The feed-forward tensors of the text encoder's last so many layers, and the attention's of its last so many, sorted."""
    count = encoder_layers(base)
    wanted = [f"{_LAYERS}{count - 1 - i}.mlp.*" for i in range(min(feed_forward, count))]
    wanted += [f"{_LAYERS}{count - 1 - i}.self_attn.*" for i in range(min(attention, count))]
    return sorted(name for pattern in wanted for name in fnmatch.filter(base.names, pattern))
