"""What the nodes need of ComfyUI, written down from its API: model patchers, CLIP, and the functions of `comfy.lora`.

ComfyUI itself is no package that tests could install. A patcher here computes the patched weights when asked for them, in the
same arithmetic: what a LoRA adds is `strength * alpha / rank * up @ down`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor


class ModelPatcher:
    """A model and what lies on its weights; a clone shares the model, and has a list of its own."""

    def __init__(self, model: Any, patches: Mapping[str, list[Any]] | None = None) -> None:
        self.model = model
        self.patches = {key: list(listed) for key, listed in (patches or {}).items()}

    def clone(self) -> ModelPatcher:
        return ModelPatcher(self.model, self.patches)

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0) -> list[Any]:
        """Those that have a weight here are kept; their keys are returned."""
        placed = [key for key in patches if (key if isinstance(key, str) else key[0]) in self.model.state_dict()]
        for key in placed:
            name, part = (key, None) if isinstance(key, str) else key
            self.patches.setdefault(name, []).append((strength_patch, patches[key], part))
        return placed

    def get_key_patches(self) -> dict[str, list[Any]]:
        return {k: [(w, lambda a, **_: a), *self.patches.get(k, ())] for k, w in self.model.state_dict().items()}

    def weights(self) -> dict[str, Tensor]:
        """What the model computes with: float32, as ComfyUI sums."""
        found = {name: weight.float().clone() for name, weight in self.model.state_dict().items()}
        for name, listed in self.patches.items():
            for strength, change, part in listed:
                place = found[name] if part is None else found[name].narrow(*part)
                place += strength * change.reshape(place.shape)
        return found


class Clip:
    """A text encoder's model and its patcher."""

    def __init__(self, patcher: ModelPatcher) -> None:
        self.patcher, self.cond_stage_model = patcher, patcher.model

    def clone(self) -> Clip:
        return Clip(self.patcher.clone())

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0) -> list[Any]:
        return self.patcher.add_patches(patches, strength_patch)


def model(weights: Mapping[str, Tensor], keys: Mapping[str, Any]) -> Any:
    """A model with its weights by ComfyUI's names, and the names of a LoRA file by which each is found."""
    return SimpleNamespace(state_dict=lambda: dict(weights), keys=keys)


def _known(model: Any, key_map: dict[str, Any]) -> dict[str, Any]:
    key_map.update(model.keys)
    return key_map


def _load_lora(lora: Mapping[str, Tensor], to_load: Mapping[str, Any], log_missing: bool = True) -> dict[Any, Tensor]:
    """What a file adds to each weight; its other keys are passed over."""
    found = {}
    for module, key in to_load.items():
        for up, down in ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")):
            if f"{module}{up}" in lora:
                factors = lora[f"{module}{up}"].flatten(1), lora[f"{module}{down}"].flatten(1)
                alpha = float(lora[f"{module}.alpha"]) if f"{module}.alpha" in lora else len(factors[1])
                found[key] = factors[0] @ factors[1] * (alpha / len(factors[1]))
        if f"{module}.diff" in lora:
            found[key] = lora[f"{module}.diff"]
        if f"{module}.diff_b" in lora:
            found[f"{key.removesuffix('.weight')}.bias"] = lora[f"{module}.diff_b"]
    return found


def modules() -> Iterable[tuple[str, ModuleType]]:
    """`comfy` and `comfy.lora`, to be put where Python looks for modules."""
    comfy, lora = ModuleType("comfy"), ModuleType("comfy.lora")
    lora.__dict__.update(model_lora_keys_unet=_known, model_lora_keys_clip=_known, load_lora=_load_lora)
    comfy.__dict__["lora"] = lora
    return (("comfy", comfy), ("comfy.lora", lora))
