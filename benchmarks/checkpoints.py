"""Single-file checkpoints of Stable Diffusion 1.x, made from diffusers' names: for measuring, and to test reading them.

Written from the two naming schemes alone, apart from the package's own rules, so that each checks the other.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def single_file_keys(names: Iterable[str]) -> dict[str, str]:
    """The key that each canonical name has in a single file."""
    names = list(names)
    unet = [name.removeprefix("unet/") for name in names if name.startswith("unet/")]
    levels = 1 + max(int(found[1]) for name in names if (found := re.match(r"vae/decoder\.up_blocks\.(\d+)", name)))
    keys = {}
    for name in names:
        component, _, local = name.partition("/")
        if component == "unet":
            keys[name] = "model.diffusion_model." + _unet_key(local, unet)
        elif component == "vae":
            keys[name] = "first_stage_model." + _vae_key(local, levels)
        else:
            keys[name] = "cond_stage_model.transformer." + local
    return keys


def single_file_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The VAE's attention is written as 1 x 1 convolutions."""
    return (*shape, 1, 1) if re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", key) else shape


def write_single_file(
    file: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], value: Callable[[str], Tensor]
) -> None:
    """A safetensors file written tensor by tensor: names, dtypes and shapes first, then each value when its turn comes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, order = 0, []
    for key, dtype, shape in tensors:
        end = position + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
        order.append(key)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for key in order:
            out.write(value(key).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def as_single_file(file: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> None:
    """Write canonical tensors, and tensors of any other key, as one checkpoint."""
    keys = single_file_keys(tensors)
    stored = {
        **{
            key: tensors[name].reshape(single_file_shape(key, tuple(tensors[name].shape))) for name, key in keys.items()
        },
        **extra,
    }
    described = [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in stored.items()]
    write_single_file(file, described, stored.__getitem__)


def stable_diffusion_shapes(width: int = 320) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical names and shapes of Stable Diffusion 1.5, or of one whose U-Net begins with another width."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel(
                block_out_channels=(width, 2 * width, 4 * width, 4 * width), cross_attention_dim=768
            ),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
        }
    for component, model in models.items():
        for name, parameter in model.named_parameters():
            whole = name if component != "text_encoder" or name.startswith("text_model.") else f"text_model.{name}"
            yield f"{component}/{whole}", tuple(parameter.shape)


def _unet_key(name: str, names: list[str]) -> str:
    module, _, kind = name.rpartition(".")
    if module in UNET_ENDS:
        return f"{UNET_ENDS[module]}.{kind}"
    if name.startswith("mid_block.attentions.0."):
        return name.replace("mid_block.attentions.0", "middle_block.1")
    if name.startswith("mid_block.resnets."):
        number, _, rest = name.removeprefix("mid_block.resnets.").partition(".")
        return f"middle_block.{2 * int(number)}.{_resnet(rest)}"
    found = _BLOCK.fullmatch(name)
    assert found is not None, name
    side, part, rest = found[1], found[3], found[5]
    block, layer = int(found[2]), int(found[4])
    resnets = {int(one[1]) for other in names if (one := re.match(r"down_blocks\.0\.resnets\.(\d+)", other))}
    per_level = len(resnets) + 1
    if part == "downsamplers":
        return f"input_blocks.{per_level * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        attends = any(other.startswith(f"up_blocks.{block}.attentions.") for other in names)
        return f"output_blocks.{per_level * block + per_level - 1}.{1 + attends}.{rest}"
    at = per_level * block + layer + (side == "down")
    inner = f"0.{_resnet(rest)}" if part == "resnets" else f"1.{rest}"
    return f"{'input' if side == 'down' else 'output'}_blocks.{at}.{inner}"


def _resnet(rest: str) -> str:
    module, _, kind = rest.partition(".")
    return f"{RESNET[module]}.{kind}"


def _vae_key(name: str, levels: int) -> str:
    for found, text in (
        (re.fullmatch(r"(.+)_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", name), "block.{}"),
        (re.fullmatch(r"(.+)_blocks\.(\d+)\.(?:down|up)samplers\.(\d+)\.(.+)", name), "{}sample"),
    ):
        if found is not None:
            way = found[1].rpartition(".")[2]
            level = int(found[2]) if way == "down" else levels - 1 - int(found[2])
            inner = text.format(found[3] if "block" in text else way)
            return f"{found[1]}.{level}.{inner}.{found[4].replace('conv_shortcut', 'nin_shortcut')}"
    if found := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", name):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"
    if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        return f"{found[1]}.mid.attn_1.{VAE_ATTENTION[found[2]]}.{found[3]}"
    return name.replace("conv_norm_out", "norm_out")
