"""One random model in every container: folders, shards, single files of three kinds, and pickles.

The single files are written here from what the two naming schemes are (OpenCLIP's from its own modules, the U-Net's and
the decoder's in `benchmarks.checkpoints`), apart from the package's rules, so that each checks the other.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.checkpoints import single_file_keys, single_file_shape
from overpaint.bases.base import Base
from overpaint.testing import tiny_pipeline
from tests.bases.tiny_xl import tiny_xl
from tests.checkpoints import rename_weights, shard

ARCHITECTURES = ("1.x", "2.x", "XL")
CONTAINERS = ("folder", "shards", "variant", "single file", "pickle", "bare pickle")
LAYERS_2 = 23
"""Layers of Stable Diffusion 2.x's text encoder; its single files hold one more, which nothing reads."""

OPEN_CLIP_ENDS = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def tiny_2(*, width: int = 8, seed: int = 0) -> Any:
    """A random Stable Diffusion 2.x: as many layers as the true text encoder, and linear projections in the U-Net."""
    pipe = tiny_pipeline(width=width, seed=seed)
    old = pipe.text_encoder.config
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=old.vocab_size,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=LAYERS_2,
            num_attention_heads=2,
            max_position_embeddings=old.max_position_embeddings,
            hidden_act="gelu",
            bos_token_id=old.bos_token_id,
            eos_token_id=old.eos_token_id,
            pad_token_id=old.pad_token_id,
        )
    )
    unet = type(pipe.unet).from_config({**pipe.unet.config, "use_linear_projection": True})
    kept = {name: pipe.components[name] for name in ("vae", "tokenizer", "scheduler")}
    nothing: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(text_encoder=text, unet=unet, **kept, **nothing)


MAKERS: dict[str, Any] = {"1.x": tiny_pipeline, "2.x": tiny_2, "XL": tiny_xl}


def folder_of(architecture: str, folder: Path) -> Path:
    """A tiny random model in half precision, as a diffusers folder."""
    MAKERS[architecture]().to(dtype=torch.float16).save_pretrained(folder)
    return folder


def converted(folder: Path, container: str, target: Path) -> Path:
    """The same weights in another container, named after `target`."""
    if container == "folder":
        return folder
    if container in ("shards", "variant"):
        shutil.copytree(folder, target)
        found = [c for c in ("unet", "vae", "text_encoder", "text_encoder_2") if (target / c).is_dir()]
        if container == "shards":
            shard(target, "unet", 3)
            shard(target, "text_encoder", 2)
        else:
            rename_weights(target, "fp16", found)
        return target
    tensors = single_file_tensors(Base.open(folder))
    if container == "single file":
        save_file(tensors, target.with_suffix(".safetensors"), metadata={"format": "pt"})
        return target.with_suffix(".safetensors")
    whole: Any = tensors if container == "bare pickle" else {"state_dict": tensors, "global_step": 7, "epoch": 1}
    torch.save(whole, target.with_suffix(".ckpt"))
    return target.with_suffix(".ckpt")


def architecture_of(base: Base) -> str:
    """Which of the three a base is: told by its components, and by how many layers its text encoder has."""
    if any(name.startswith("text_encoder_2/") for name in base.names):
        return "XL"
    return "2.x" if any(f".layers.{LAYERS_2 - 1}." in name for name in base.names) else "1.x"


def single_file_tensors(base: Base) -> dict[str, Tensor]:
    """What a published single file of this base holds, buffers and unused tensors too."""
    tensors, architecture = base.tensors(base.names), architecture_of(base)
    rest = {n: t for n, t in tensors.items() if n.startswith(("unet/", "vae/"))}
    keys = single_file_keys(rest)
    found = {keys[n]: t.reshape(single_file_shape(keys[n], tuple(t.shape))) for n, t in rest.items()}
    first = _of(tensors, "text_encoder")
    length = first["text_model.embeddings.position_embedding.weight"].shape[0]
    if architecture == "2.x":
        found.update(open_clip(first, "cond_stage_model.model."))
        found.update(_unused("cond_stage_model.model.", first["text_model.final_layer_norm.weight"]))
    else:
        start = f"{'conditioner.embedders.0' if architecture == 'XL' else 'cond_stage_model'}.transformer."
        found.update({start + name: tensor for name, tensor in first.items()})
        found[f"{start}text_model.embeddings.position_ids"] = torch.arange(length)[None]
    if architecture == "XL":
        found.update(open_clip(_of(tensors, "text_encoder_2"), "conditioner.embedders.1.model."))
        found["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    else:
        found["alphas_cumprod"] = torch.linspace(0.99, 0.01, 1000)
    return {key: found[key].contiguous().clone() for key in sorted(found)}


def open_clip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text encoder as OpenCLIP writes it: queries, keys and values in one, the projection the other way round."""
    found = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "text_projection.weight":
            found[f"{prefix}text_projection"] = tensor.T
        elif name in OPEN_CLIP_ENDS:
            found[prefix + OPEN_CLIP_ENDS[name]] = tensor
        elif layer is not None and layer[2] in OPEN_CLIP_LAYER:
            found[f"{prefix}transformer.resblocks.{layer[1]}.{OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}"] = tensor
        elif layer is not None and layer[2] == "self_attn.q_proj":
            three = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[f"{prefix}transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(three)
        else:
            assert layer is not None, name
            assert layer[2] in ("self_attn.k_proj", "self_attn.v_proj"), name
    return found


def _unused(prefix: str, like: Tensor) -> dict[str, Tensor]:
    """The last layer and the projection of OpenCLIP's tower, which Stable Diffusion 2.x stops before."""
    width = len(like)
    layer = f"{prefix}transformer.resblocks.{LAYERS_2}."
    return {
        f"{layer}attn.in_proj_weight": torch.randn(3 * width, width).to(like.dtype),
        f"{layer}ln_1.weight": torch.randn(width).to(like.dtype),
        f"{prefix}text_projection": torch.randn(width, width).to(like.dtype),
        f"{prefix}logit_scale": torch.tensor(4.6),
    }


def _of(tensors: dict[str, Tensor], component: str) -> dict[str, Tensor]:
    start = f"{component}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
