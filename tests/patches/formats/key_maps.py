"""Which keys other tools look for, worked out from their naming rules alone, with true names of full-sized models.

None of these tools is needed: a reader of LoRAs is, up to here, a map from the names that it accepts to its layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.checkpoints import single_file_keys
from benchmarks.shapes import CONFIGS
from overpaint.bases.layout import layouts

ENCODER_LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
ENCODER_DEPTHS = {"1.x": (12,), "2.x": (23,), "XL": (12, 32)}


@cache
def true_model(architecture: str) -> Any:
    """What names need of a base: its layout and all canonical names of a published model, without any weight."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**CONFIGS[architecture])
    names = [f"unet/{name}" for name in unet.state_dict()]
    for number, depth in enumerate(ENCODER_DEPTHS[architecture]):
        encoder = "text_encoder" if number == 0 else "text_encoder_2"
        for layer in range(depth):
            for part in ENCODER_LAYERS:
                names += [f"{encoder}/text_model.encoder.layers.{layer}.{part}.{kind}" for kind in ("weight", "bias")]
    layout = next(
        x for x in layouts() if x.name == ("stable-diffusion-xl" if architecture == "XL" else "stable-diffusion")
    )
    return SimpleNamespace(names=sorted(names), layout=layout)


def unet_weights(model: Any) -> list[str]:
    """Canonical names of the U-Net's weights of more than one dimension."""
    return [n for n in model.names if n.startswith("unet/") and n.endswith(".weight") and "norm" not in n]


@cache
def ldm_of(architecture: str) -> dict[str, str]:
    """The old name of each weight of the U-Net, by canonical name, from the benchmarks' own naming."""
    names = [name for name in true_model(architecture).names if name.startswith("unet/")]
    found = single_file_keys([*names, "vae/decoder.up_blocks.0.x"])
    return {name: found[name].removeprefix("model.diffusion_model.") for name in names}


def comfyui(architecture: str) -> dict[str, str]:
    """ComfyUI's map: for every weight its old name and diffusers' with underscores, and the six layers of its text towers."""
    found = {}
    for name, old in ldm_of(architecture).items():
        if name.endswith(".weight"):
            found["lora_unet_" + old.removesuffix(".weight").replace(".", "_")] = name
            found["lora_unet_" + name.removeprefix("unet/").removesuffix(".weight").replace(".", "_")] = name
    for name in _encoder_weights(true_model(architecture)):
        encoder, _, local = name.removesuffix(".weight").partition("/")
        prefixes = ("lora_te2",) if encoder == "text_encoder_2" else ("lora_te", "lora_te1")
        found.update({f"{prefix}_{local.replace('.', '_')}": name for prefix in prefixes})
    return found


_A1111_UNET: tuple[tuple[str, Callable[[tuple[str, ...]], str]], ...] = (
    (r"lora_unet_conv_in(.*)", lambda m: f"diffusion_model_input_blocks_0_0{m[0]}"),
    (r"lora_unet_conv_out(.*)", lambda m: f"diffusion_model_out_2{m[0]}"),
    (r"lora_unet_time_embedding_linear_(\d+)(.*)", lambda m: f"diffusion_model_time_embed_{2 * int(m[0]) - 2}{m[1]}"),
    (
        r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
        lambda m: (
            f"diffusion_model_{'input' if m[0] == 'down' else 'output'}_blocks_"
            f"{3 * int(m[1]) + int(m[3]) + (m[0] == 'down')}_{int(m[2] == 'attentions')}_{_a1111_resnet(m[4])}"
        ),
    ),
    (
        r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)",
        lambda m: f"diffusion_model_middle_block_{1 if m[0] == 'attentions' else 2 * int(m[1])}_{_a1111_resnet(m[2])}",
    ),
    (
        r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv",
        lambda m: f"diffusion_model_input_blocks_{3 * int(m[0]) + 3}_0_op",
    ),
    (
        r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv",
        lambda m: f"diffusion_model_output_blocks_{3 * int(m[0]) + 2}_{2 if int(m[0]) else 1}_conv",
    ),
)
_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def _a1111_resnet(rest: str) -> str:
    return _RESNET.get(rest, rest)


def a1111(key: str, architecture: str) -> str | None:
    """The U-Net weight that A1111 finds for a key's module: its rules rewrite it to the old name, which it looks up."""
    layers = _a1111_layers(architecture)
    for pattern, rewrite in _A1111_UNET:
        if found := re.fullmatch(pattern, key):
            return layers.get(rewrite(found.groups()))
    return layers.get(key.replace("lora_unet", "diffusion_model"))


@cache
def _a1111_layers(architecture: str) -> dict[str, str]:
    old = {name: key for name, key in ldm_of(architecture).items() if key.endswith(".weight")}
    return {"diffusion_model_" + key.removesuffix(".weight").replace(".", "_"): name for name, key in old.items()}


def sd_scripts(architecture: str) -> dict[str, str]:
    """sd-scripts' names: of diffusers' modules for 1.x and 2.x, of the old ones for XL; `lora_te_` alone for one encoder.

    It finds linear layers and convolutions inside of transformers, residual blocks and samplers.
    """
    inside = (".attentions.", ".resnets.", ".downsamplers.", ".upsamplers.")
    found = {}
    for name, old in ldm_of(architecture).items():
        if name.endswith(".weight") and any(part in name for part in inside):
            module = old if architecture == "XL" else name.removeprefix("unet/")
            found["lora_unet_" + module.removesuffix(".weight").replace(".", "_")] = name
    for name in _encoder_weights(true_model(architecture)):
        encoder, _, local = name.removesuffix(".weight").partition("/")
        number = "" if architecture != "XL" else "2" if encoder == "text_encoder_2" else "1"
        found[f"lora_te{number}_{local.replace('.', '_')}"] = name
    return found


def _encoder_weights(model: Any) -> Iterator[str]:
    return (n for n in model.names if n.startswith("text_encoder") and n.endswith(".weight"))
