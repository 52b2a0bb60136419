"""The LoRA files of diffusers, today's (`unet.….to_k.lora_A.weight`) and its older ones, and PEFT's adapters.

Today's header or `adapter_config.json` may say by how much the factors count; `AdapterConfig` reads it. Older files name
the attention processor instead of the layer (`….attn2.processor.to_k_lora.down.weight`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from overpaint.bases.base import Base
from overpaint.patches.formats.dialect import Dialect, Endings, ForeignFile
from overpaint.patches.formats.modules import ENCODERS, encoder_modules, lookup, unet_modules

HEADER = "lora_adapter_metadata"

ENDINGS: Endings = {
    ".lora_A.weight": ("down", "weight"),
    ".lora_B.weight": ("up", "weight"),
    ".lora_A.default.weight": ("down", "weight"),
    ".lora_B.default.weight": ("up", "weight"),
    ".lora.down.weight": ("down", "weight"),
    ".lora.up.weight": ("up", "weight"),
    ".lora_linear_layer.down.weight": ("down", "weight"),
    ".lora_linear_layer.up.weight": ("up", "weight"),
    "_lora.down.weight": ("down", "weight"),
    "_lora.up.weight": ("up", "weight"),
    ".alpha": ("alpha", "weight"),
}
_PROJECTIONS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_ENCODER_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _names(base: Base) -> Iterator[tuple[str, str]]:
    for module, local in unet_modules(base):
        yield module, f"unet.{local}"
        for layer, old in _PROJECTIONS.items():
            if local.endswith(f".{layer}"):
                block = f"unet.{local.removesuffix(layer)}"
                yield module, f"{block}processor.{old}"
                yield module, f"{block}{old}"
    for encoder in ENCODERS:
        for module, local in encoder_modules(base, encoder):
            yield module, f"{encoder}.{local}"
            parent, _, layer = local.rpartition(".")
            if layer in _ENCODER_PROJECTIONS:
                yield module, f"{encoder}.{parent}.{_ENCODER_PROJECTIONS[layer]}"


def _bare(base: Base) -> Iterator[tuple[str, str]]:
    """Names without a component: of attention processors that were saved alone."""
    return ((module, name.removeprefix("unet.")) for module, name in _names(base) if name.startswith("unet."))


def _peft_names(base: Base) -> Iterator[tuple[str, str]]:
    for module, local in unet_modules(base):
        yield module, f"base_model.model.{local}"
    for encoder in ENCODERS:
        for module, local in encoder_modules(base, encoder):
            yield module, f"base_model.model.{local}"


def written(base: Base) -> dict[str, str]:
    """The name under which diffusers finds a module, by canonical module."""
    found = {module: f"unet.{local}" for module, local in unet_modules(base)}
    for encoder in ENCODERS:
        found.update({module: module.replace("/", ".", 1) for module, _ in encoder_modules(base, encoder)})
    return found


DIFFUSERS = Dialect("diffusers LoRA", ENDINGS, lambda base: lookup(_names(base)))
PROCESSORS = Dialect("diffusers attention processors", ENDINGS, lambda base: lookup(_bare(base)))
PEFT = Dialect("PEFT adapter", ENDINGS, lambda base: lookup(_peft_names(base)))

_UNREAD = ("use_dora", "fan_in_fan_out", "lora_bias", "megatron_config", "layer_replication")


@dataclass(frozen=True)
class AdapterConfig:
    """By how much the factors of an adapter count: its alpha over the rank, unless a pattern names a module."""

    alpha: float
    alphas: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> AdapterConfig:
        """Of a LoraConfig. Raises ForeignFile for what it asks for beyond a plain LoRA."""
        kind = raw.get("peft_type", "LORA")
        if kind != "LORA":
            raise ForeignFile(f"its configuration is of a {kind} adapter; only LORA is read")
        if asked := [name for name in _UNREAD if raw.get(name)]:
            raise ForeignFile(f"its configuration asks for {', '.join(asked)}, which is not read; merge it first")
        try:
            alphas = {str(name): float(alpha) for name, alpha in (raw.get("alpha_pattern") or {}).items()}
            found = cls(float(raw["lora_alpha"]), alphas, bool(raw.get("use_rslora", False)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ForeignFile(f"its configuration is not that of a LoRA ({error}); get the file again") from error
        if unclear := [name for name in alphas if not re.fullmatch(r"\^?[\w.]+", name)]:
            raise ForeignFile(f"its alpha_pattern {unclear[0][:80]!r} is more than a module's name, which is not read")
        return found

    def scale(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied by. `module` is the name without a component."""
        alpha = self.alpha
        for name, other in self.alphas.items():
            if module == name.removeprefix("^") or (name[0] != "^" and module.endswith(f".{name}")):
                alpha = other
                break
        return alpha / (rank**0.5 if self.by_root else rank)


def configs_of(metadata: Mapping[str, str]) -> dict[str, AdapterConfig]:
    """The configuration of each component's adapter, as diffusers writes them into a file's header; most have none."""
    if HEADER not in metadata:
        return {}
    try:
        flat = json.loads(metadata[HEADER])
        by_component: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            component, _, setting = name.partition(".")
            by_component.setdefault(component, {})[setting] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise ForeignFile(f"its header's {HEADER} is not JSON ({error}); get the file again") from error
    return {component: AdapterConfig.from_json(raw) for component, raw in by_component.items()}
