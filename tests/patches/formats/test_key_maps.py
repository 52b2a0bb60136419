"""The names we write are the names that other tools look for: all of them, on full-sized models, and of the right layers."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest

from overpaint.patches.formats import dialects
from overpaint.patches.formats.dialects import DIALECTS, READERS, XLABS, ldm_modules, modules_of, split
from tests.patches.formats.conftest import ARCHITECTURES
from tests.patches.formats.key_maps import a1111, comfyui, ldm_of, sd_scripts, true_model, unet_weights

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def ours(model: Any) -> dict[str, str]:
    """The name that an export gives each layer with a weight, by canonical name of the weight."""
    spelled = dialects.kohya_written(model)
    names = [n for n in model.names if n.endswith(".weight") and "norm" not in n]
    return {name: spelled[split(name)[0]] for name in names}


@architectures
def test_comfyui_finds_every_layer(architecture: str) -> None:
    model = true_model(architecture)
    theirs = comfyui(architecture)
    assert {key: theirs.get(key) for key in ours(model).values()} == {key: name for name, key in ours(model).items()}


@architectures
def test_a1111_finds_every_layer_of_the_unet(architecture: str) -> None:
    model = true_model(architecture)
    spelled = ours(model)
    wanted = {spelled[name]: name for name in unet_weights(model)}
    assert {key: a1111(key, architecture) for key in wanted} == wanted


@architectures
def test_sd_scripts_find_every_layer_but_those_that_they_are_known_to_pass_over(architecture: str) -> None:
    model = true_model(architecture)
    theirs, spelled = sd_scripts(architecture), ours(model)
    assert all(theirs.get(key) in (None, name) for name, key in spelled.items())
    missed = {name for name, key in spelled.items() if key not in theirs}
    skipped = READERS["kohya"].skips["kohya"]
    assert missed == {name for name in spelled if any(fnmatchcase(name, pattern) for pattern in skipped)}
    if architecture == "XL":
        parts = ("label_emb_0_0", "label_emb_0_2", "input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2")
        assert {spelled[name] for name in missed} == {f"lora_unet_{part}" for part in parts}


@architectures
def test_a1111_finds_the_norm_before_the_output(architecture: str) -> None:
    """By its old name, which ComfyUI knows too; diffusers' name matches nothing there."""
    name = "unet/conv_norm_out"
    key = dialects.kohya_written(true_model(architecture))[name]
    assert a1111("lora_unet_conv_norm_out", architecture) is None
    assert a1111(key, architecture) == comfyui(architecture)[key] == f"{name}.weight"


@architectures
def test_the_old_names_of_the_unet_are_those_of_single_files(architecture: str) -> None:
    model = true_model(architecture)
    old = ldm_modules(modules_of(model)["unet"])
    wanted = {split(name)[0].removeprefix("unet/"): split(key)[0] for name, key in ldm_of(architecture).items()}
    assert old == wanted
    assert len(set(old.values())) == len(old)


@architectures
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_no_spelled_name_means_two_layers(architecture: str, dialect: Any) -> None:
    """Underscores for dots could make two names one; no layer gets lost by it."""
    model = true_model(architecture)
    reached = set(dialect.module_names(model).values())
    if dialect is XLABS:
        assert not reached, "it is one of FLUX"
        return
    every = {module for module in (split(name)[0] for name in model.names) if not module.startswith("vae/")}
    if dialect.name in ("PEFT adapter", "diffusers attention processors"):
        # These leave out the component: text encoders of XL are alike there, and processors are the U-Net's alone.
        assert reached >= {module for module in every if module.startswith("unet/")}
    else:
        assert reached >= every


@architectures
def test_what_is_written_is_read_in_its_dialect(architecture: str) -> None:
    model = true_model(architecture)
    for spelled, dialect in (
        (dialects.kohya_written(model), dialects.KOHYA),
        (dialects.diffusers_written(model), dialects.DIFFUSERS),
        (dialects.weights_written(model), dialects.WEIGHTS),
    ):
        known = dialect.module_names(model)
        assert {module: known.get(name) for module, name in spelled.items()} == {module: module for module in spelled}
    assert set(dialects.COMFY.module_names(model).values()) >= {split(name)[0] for name in unet_weights(model)}
