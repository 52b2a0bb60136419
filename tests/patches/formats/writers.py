"""Files as other tools write them, from factors or weights by canonical name; made of each tool's own rules of naming."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.checkpoints import single_file_keys

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""up (out x r) and down (r x in, or r x in x h x w) by canonical name of the weight."""


def local(name: str) -> tuple[str, str]:
    """Component and module of a canonical name."""
    component, _, rest = name.partition("/")
    return component, rest.rpartition(".")[0]


def underscored(name: str, te: str = "lora_te") -> str:
    component, module = local(name)
    prefix = {"unet": "lora_unet", "text_encoder": te, "text_encoder_2": "lora_te2"}[component]
    return f"{prefix}_{module.replace('.', '_')}"


def up_as_kernel(up: Tensor, down: Tensor) -> Tensor:
    return up.reshape(*up.shape, *(1,) * (down.ndim - 2))


def kohya(file: Path, factors: Factors, alpha: float | None = None, **metadata: str) -> Path:
    """kohya's scripts, SPM, LECO and sliders: three tensors a layer, alpha without dimensions."""
    tensors = {}
    for name, (up, down) in factors.items():
        key = underscored(name)
        tensors[f"{key}.lora_down.weight"] = down.contiguous()
        tensors[f"{key}.lora_up.weight"] = up_as_kernel(up, down).contiguous()
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=up.dtype)
    save_file(tensors, file, metadata={"ss_network_module": "networks.lora", **metadata})
    return file


def kohya_xl(file: Path, factors: Factors, names: list[str]) -> Path:
    """kohya's scripts for SDXL: the U-Net's old names, numbered through; `names` are all of the base's."""
    old = single_file_keys(names)
    tensors = {}
    for name, (up, down) in factors.items():
        key = underscored(name, "lora_te1")
        if name.startswith("unet/"):
            module = old[name].removeprefix("model.diffusion_model.").removesuffix(".weight")
            key = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = down.contiguous()
        tensors[f"{key}.lora_up.weight"] = up_as_kernel(up, down).contiguous()
    save_file(tensors, file)
    return file


def attention_processors(file: Path, factors: Factors, prefix: str = "unet.") -> Path:
    """diffusers before PEFT: the attention processor is named instead of the layer."""
    tensors = {}
    for name, (up, down) in factors.items():
        _, module = local(name)
        parent, _, layer = module.replace(".to_out.0", ".to_out").rpartition(".")
        tensors[f"{prefix}{parent}.processor.{layer}_lora.down.weight"] = down
        tensors[f"{prefix}{parent}.processor.{layer}_lora.up.weight"] = up
    save_file(tensors, file)
    return file


def linear_layers(file: Path, factors: Factors) -> Path:
    """diffusers in between: `lora_linear_layer` in text encoders, `lora` in the U-Net."""
    tensors = {}
    for name, (up, down) in factors.items():
        component, module = local(name)
        middle = "lora" if component == "unet" else "lora_linear_layer"
        tensors[f"{component}.{module}.{middle}.down.weight"] = down
        tensors[f"{component}.{module}.{middle}.up.weight"] = up
    save_file(tensors, file)
    return file


def lycoris_full(file: Path, changes: Mapping[str, Tensor]) -> Path:
    """LyCORIS's `full`: differences of weights, biases and norms."""
    endings = {
        ("weight", False): "diff",
        ("bias", False): "diff_b",
        ("weight", True): "w_norm",
        ("bias", True): "b_norm",
    }
    tensors = {}
    for name, change in changes.items():
        attribute = name.rpartition(".")[2]
        tensors[f"{underscored(name)}.{endings[attribute, 'norm' in name]}"] = change
    save_file(tensors, file)
    return file


def comfyui(file: Path, factors: Factors, changes: Mapping[str, Tensor], names: list[str]) -> Path:
    """ComfyUI's own names: those that weights have in its memory."""
    old = single_file_keys(names)

    def spelled(name: str) -> str:
        if name.startswith("unet/"):
            return old[name].removeprefix("model.").rpartition(".")[0]
        return f"text_encoders.clip_l.transformer.{local(name)[1]}"

    tensors: dict[str, Tensor] = {}
    for name, (up, down) in factors.items():
        tensors[f"{spelled(name)}.lora_down.weight"] = down.contiguous()
        tensors[f"{spelled(name)}.lora_up.weight"] = up_as_kernel(up, down).contiguous()
    for name, change in changes.items():
        tensors[f"{spelled(name)}.{'diff_b' if name.endswith('.bias') else 'diff'}"] = change
    save_file(tensors, file)
    return file


def bare(file: Path, values: Mapping[str, Tensor]) -> Path:
    """ESD and UCE: a U-Net's edited weights under diffusers' names, without a prefix or any metadata."""
    tensors = {name.removeprefix("unet/"): value.contiguous() for name, value in values.items()}
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return file


def concept_ablation(file: Path, values: Mapping[str, Tensor]) -> Path:
    """Concept Ablation's `delta.bin`: replaced weights, in one map for each model."""
    parts: dict[str, Any] = {"unet": {}, "text_encoder": {}}
    for name, value in values.items():
        component, _, rest = name.partition("/")
        parts[component][rest] = value
    torch.save({**parts, "modifier_token": None}, file)
    return file


def ldm_state(file: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Old ESD, SalUn and others: a whole checkpoint as a pickle of a state dict."""
    keys = single_file_keys(tensors)
    state = {key: tensors[name].contiguous() for name, key in keys.items() if not name.startswith("vae/")}
    torch.save({"state_dict": state, "global_step": 1000}, file)
    return file


def adapter_config(**settings: Any) -> str:
    """What PEFT writes beside an adapter, cut to what counts."""
    return json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", **settings})
