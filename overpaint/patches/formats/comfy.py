"""ComfyUI's own spelling of LoRA and full differences: the names that weights have in its memory.

`diffusion_model.input_blocks.1.1.….attn2.to_k.diff`, `text_encoders.clip_l.transformer.text_model.….fc1.lora_up.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator

from overpaint.bases.base import Base
from overpaint.patches.formats import diffusers_lora, kohya
from overpaint.patches.formats.dialect import Dialect
from overpaint.patches.formats.modules import ENCODERS, encoder_modules, ldm_unet_modules, lookup

_TOWERS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}


def _names(base: Base) -> Iterator[tuple[str, str]]:
    for module, local in ldm_unet_modules(base):
        yield module, f"diffusion_model.{local}"
    for encoder in ENCODERS:
        for module, local in encoder_modules(base, encoder):
            for tower in _TOWERS[encoder]:
                yield module, f"text_encoders.{tower}.transformer.{local}"


COMFY = Dialect("ComfyUI LoRA", {**kohya.ENDINGS, **diffusers_lora.ENDINGS}, lambda base: lookup(_names(base)))
