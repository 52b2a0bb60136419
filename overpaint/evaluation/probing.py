"""How far a patch moves what the model draws of a concept, measured on the model itself.

For deltas that reach beyond cross-attention. At a few noise levels, `|eps_i(x, c_j) - eps_0(x, c_j)|` relative to what
the prompt contributes without the patch, `|eps_0(x, c_j) - eps_0(x, '')|`; x is Gaussian, the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.concepts import Concept
from overpaint.patches.compose import Term
from overpaint.patches.live import Overlay
from overpaint.patches.patch import Patch
from overpaint.solvers.keys import sentences

LEVELS = (0.9, 0.6, 0.3)
"""Where to look, as shares of the noise schedule; the first decides the composition, the last the details."""
SENTENCES, SAMPLES = 4, 2


@torch.no_grad()
def probe(base: Base, patch: Patch, concepts: Sequence[Concept], device: torch.device) -> list[float]:
    """The relative change of the predicted noise for each concept, in their order."""
    pipe = base.pipeline(device=str(device))
    prompts = [_prompts(base, concept) for concept in concepts]
    before = [_noise(pipe, asked) for asked in prompts]
    empty = _noise(pipe, [""] * SENTENCES)
    overlay = Overlay(pipe, base)
    with overlay.applied([Term(patch.id, patch.delta)]):
        after = [_noise(pipe, asked) for asked in prompts]
    return [float((b - a).norm() / (a - empty).norm()) for a, b in zip(before, after, strict=True)]


def _prompts(base: Base, concept: Concept) -> list[str]:
    """`SENTENCES` sentences that name the concept, spread over those the base knows for its kind."""
    known = sentences(base, concept.kind).pairs
    chosen = [known[i * len(known) // SENTENCES][0] for i in range(SENTENCES)]
    return [template.format(concept.words[i % len(concept.words)]) for i, template in enumerate(chosen)]


def _noise(pipe: Any, prompts: list[str]) -> Tensor:
    """The predicted noise at every level, float32 [levels, sentences * SAMPLES, c, h, w]."""
    config, device = pipe.unet.config, pipe.unet.device
    ids = pipe.tokenizer(
        prompts,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    hidden = pipe.text_encoder(ids.to(device)).last_hidden_state.repeat_interleave(SAMPLES, 0)
    shape = (SAMPLES, config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(hidden).repeat(len(prompts), 1, 1, 1)
    levels = len(pipe.scheduler.alphas_cumprod)
    found = [pipe.unet(x, int(share * (levels - 1)), encoder_hidden_states=hidden).sample for share in LEVELS]
    return torch.stack(found).float()
