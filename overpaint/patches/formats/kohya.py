"""kohya's LoRA files, the only LoRA that diffusers, ComfyUI, A1111 and sd-scripts all read; and LyCORIS's full differences.

Layers are named with underscores: `lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k`. SPM, LECO and
concept sliders write the same, ComfyUI and A1111 read the differences too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from overpaint.bases.base import Base
from overpaint.patches.formats.dialect import Dialect, Endings
from overpaint.patches.formats.modules import ENCODERS, encoder_modules, ldm_unet_modules, lookup, unet_modules

_PREFIXES = {"text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}

ENDINGS: Endings = {
    ".lora_down.weight": ("down", "weight"),
    ".lora_up.weight": ("up", "weight"),
    ".lora_mid.weight": ("mid", "weight"),
    ".alpha": ("alpha", "weight"),
    ".diff": ("difference", "weight"),
    ".diff_b": ("difference", "bias"),
    ".w_norm": ("difference", "weight"),
    ".b_norm": ("difference", "bias"),
}


def _spelled(base: Base) -> Mapping[str, str]:
    return lookup(_names(base))


def _names(base: Base) -> Iterator[tuple[str, str]]:
    for module, local in (*unet_modules(base), *ldm_unet_modules(base)):
        yield module, _underscored("lora_unet", local)
    for encoder in ENCODERS:
        for module, local in encoder_modules(base, encoder):
            for prefix in _PREFIXES[encoder]:
                yield module, _underscored(prefix, local)


def written(base: Base) -> dict[str, str]:
    """The name under which every reader finds a module, by canonical module.

    For SDXL, trained on the U-Net as first published, the old names of its modules; diffusers' for all others.
    """
    is_xl = ENCODERS[1] in base.layout.components
    unet = ldm_unet_modules(base) if is_xl else unet_modules(base)
    found = {module: _underscored("lora_unet", local) for module, local in unet}
    prefixes = {ENCODERS[0]: "lora_te1" if is_xl else "lora_te", ENCODERS[1]: "lora_te2"}
    for encoder, prefix in prefixes.items():
        for module, _ in encoder_modules(base, encoder):
            found[module] = _underscored(prefix, module.partition("/")[2])
    return found


def _underscored(prefix: str, local: str) -> str:
    return f"{prefix}_{local.replace('.', '_')}"


KOHYA = Dialect("kohya LoRA", ENDINGS, _spelled)
