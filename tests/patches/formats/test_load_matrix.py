"""Every export in every tool that can run here: what it loads is what we compose, within the rounding of float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.patches.compose import Term, compose
from overpaint.patches.formats.exporting import FORMATS, About, export
from overpaint.patches.formats.importing import import_weights
from overpaint.patches.live import Overlay
from tests.patches.formats.conftest import ARCHITECTURES
from tests.patches.formats.models import low_rank, some_terms

# One rounding of a weight of size 1 to float32, twice: where factors are stored, and where the tool adds their product.
WEIGHTS_ALIKE = 2.4e-7
# What these roundings become in a picture of values from 0 to 1 after two steps: 1.6e-6 at most where it was measured.
PICTURES_ALIKE = 1e-5

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


@dataclass(frozen=True)
class Exports:
    """A base, patches on it, the weights they compose to, and the patches as a file of every format."""

    base: Base
    terms: list[Term]
    composed: dict[str, Tensor]
    files: dict[str, Path]


@pytest.fixture(scope="module")
def exports(
    model: Callable[[str, torch.dtype], Base], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Exports]:
    """The exports of an architecture, made once."""

    @cache
    def made(architecture: str) -> Exports:
        base, folder = model(architecture, torch.float32), tmp_path_factory.mktemp("exports")
        terms = some_terms(base)
        files = {}
        for format in FORMATS:
            files[format] = export(base, terms, folder / f"{format}.safetensors", format, About("test")).path
        return Exports(base, terms, compose(base, terms), files)

    return made


def module(pipe: Any, name: str) -> tuple[nn.Module, str]:
    """The module of a pipeline that holds a canonical tensor, and the attribute."""
    component, _, local = name.partition("/")
    root = getattr(pipe, component)
    path, _, attribute = local.rpartition(".")
    if not hasattr(root, "text_model"):
        path = path.removeprefix("text_model.")
    return root.get_submodule(path), attribute


def apart(pipe: Any, base: Base, composed: dict[str, Tensor]) -> float:
    """The largest difference between a pipeline's weights and what is composed; the base's where nothing lies."""
    worst = 0.0
    for name in base.names:
        if name.startswith("vae/"):
            continue
        holder, attribute = module(pipe, name)
        wanted = composed[name] if name in composed else base.tensor(name)
        worst = max(worst, float((getattr(holder, attribute).detach() - wanted).abs().max()))
    return worst


def picture(pipe: Any) -> Any:
    """What a pipeline draws, [height, width, 3] from 0 to 1."""
    generator = torch.Generator().manual_seed(3)
    drawn = pipe("a photo of a cat", num_inference_steps=2, generator=generator, height=16, width=16, output_type="np")
    return drawn.images[0]


@architectures
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_loads_and_fuses_what_we_compose(
    exports: Callable[[str], Exports], architecture: str, format: str
) -> None:
    made = exports(architecture)
    pipe = made.base.pipeline()
    overlay = Overlay(pipe, made.base)
    overlay.set(made.terms)
    ours = picture(pipe)
    overlay.close()
    assert numpy.abs(ours - picture(pipe)).max() > 100 * PICTURES_ALIKE
    pipe.load_lora_weights(str(made.files[format]))
    assert numpy.abs(picture(pipe) - ours).max() < PICTURES_ALIKE
    pipe.fuse_lora(components=[name for name in ("unet", "text_encoder", "text_encoder_2") if name in pipe.components])
    assert numpy.abs(picture(pipe) - ours).max() < PICTURES_ALIKE
    pipe.unload_lora_weights()
    assert apart(pipe, made.base, made.composed) < WEIGHTS_ALIKE


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("layer", ["self_attn.q_proj", "mlp.fc1", "self_attn.out_proj"])
def test_diffusers_loads_a_patch_of_one_layer_of_a_text_encoder(
    base: Base, tmp_path: Path, format: str, layer: str
) -> None:
    """It takes the spelling of such files from the layers in them, and from some it cannot."""
    terms = [Term("a", low_rank(base, [f"text_encoder/text_model.encoder.layers.1.{layer}.weight"]))]
    file = export(base, terms, tmp_path / "x.safetensors", format, About("test")).path
    pipe = base.pipeline()
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=["text_encoder"])
    pipe.unload_lora_weights()
    assert apart(pipe, base, compose(base, terms)) < WEIGHTS_ALIKE
    assert import_weights(base, file).delta == terms[0].delta


@architectures
def test_peft_loads_and_merges_what_we_compose(exports: Callable[[str], Exports], architecture: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    made = exports(architecture)
    tensors, pipe = load_file(made.files["diffusers"]), made.base.pipeline()
    for component in ("unet", "text_encoder", "text_encoder_2"):
        root = getattr(pipe, component, None)
        if root is None:
            continue
        mine = {k.removeprefix(f"{component}."): t for k, t in tensors.items() if k.startswith(f"{component}.")}
        if not hasattr(root, "text_model"):
            mine = {key.removeprefix("text_model."): tensor for key, tensor in mine.items()}
        rank = next(len(tensor) for key, tensor in mine.items() if key.endswith("lora_A.weight"))
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted({k.rpartition(".lora_")[0] for k in mine}))
        inject_adapter_in_model(config, root)
        outcome: Any = set_peft_model_state_dict(root, mine)
        assert not outcome.unexpected_keys
        for path, part in list(root.named_modules()):
            if isinstance(part, BaseTunerLayer):
                part.merge()
                parent, _, attribute = path.rpartition(".")
                setattr(root.get_submodule(parent), attribute, part.get_base_layer())
    assert apart(pipe, made.base, made.composed) < WEIGHTS_ALIKE


@architectures
def test_our_own_import_composes_what_was_exported(exports: Callable[[str], Exports], architecture: str) -> None:
    made = exports(architecture)
    for format, file in made.files.items():
        found = import_weights(made.base, file)
        assert not found.unmatched
        assert found.proof.differing == 0
        again = compose(made.base, [Term("again", found.delta)])
        assert again.keys() == made.composed.keys()
        worst = max(float((again[name] - made.composed[name]).abs().max()) for name in made.composed)
        assert worst == 0 if format == "full" else worst < WEIGHTS_ALIKE


def test_full_weights_of_a_unet_are_loaded_as_a_state_dict(exports: Callable[[str], Exports], tmp_path: Path) -> None:
    """The way in which ESD and UCE load what they saved."""
    made = exports("1.x")
    terms = [term for term in made.terms if term.id == "aa"]
    file = export(made.base, terms, tmp_path / "uce.safetensors", "full", About("test")).path
    pipe = made.base.pipeline()
    assert not pipe.unet.load_state_dict(load_file(file), strict=False).unexpected_keys
    assert apart(pipe, made.base, compose(made.base, terms)) == 0
