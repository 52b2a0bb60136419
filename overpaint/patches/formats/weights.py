"""Edited weights themselves, as most erasers save them: ESD, UCE, Concept Ablation, whole U-Nets, whole state dicts.

Names are diffusers' (a U-Net's without any prefix) or those of the first publication.
"""

from __future__ import annotations

from collections.abc import Iterator

from overpaint.bases.base import Base
from overpaint.patches.formats.dialect import Dialect, Endings
from overpaint.patches.formats.modules import (
    ENCODERS,
    INNER,
    encoder_modules,
    ldm_unet_modules,
    lookup,
    modules_of,
    unet_modules,
)

ENDINGS: Endings = {".weight": ("value", "weight"), ".bias": ("value", "bias")}


def _names(base: Base) -> Iterator[tuple[str, str]]:
    for module, local in unet_modules(base):
        yield module, local
        yield module, f"unet.{local}"
    for module, local in ldm_unet_modules(base):
        yield module, f"model.diffusion_model.{local}"
        yield module, f"diffusion_model.{local}"
    for encoder in ENCODERS:
        for module, local in encoder_modules(base, encoder):
            yield module, f"{encoder}.{local}"
            if local.startswith(INNER):
                yield module, local
    for module, local in encoder_modules(base, ENCODERS[0]):
        yield module, f"cond_stage_model.transformer.{local}"
    for local in modules_of(base).get("vae", ()):
        yield f"vae/{local}", f"vae.{local}"


def written(base: Base) -> dict[str, str]:
    """The name that erasers give a module, by canonical module: a U-Net's own, another component's with its prefix."""
    return {
        f"{component}/{local}": local if component == "unet" else f"{component}.{local}"
        for component, modules in modules_of(base).items()
        for local in modules
    }


WEIGHTS = Dialect("edited weights", ENDINGS, lambda base: lookup(_names(base)))
