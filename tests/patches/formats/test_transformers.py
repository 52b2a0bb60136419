"""Diffusion transformers and Kolors: diffusers loads what is written, tools' names are read, what none would load is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import lora_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.layout import layouts
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import TextMap
from overpaint.patches.formats.dialects import READERS, ForeignFile
from overpaint.patches.formats.exporting import About, NotExportable, export
from overpaint.patches.formats.importing import import_weights
from tests.bases.tiny_transformers import tiny_transformer
from tests.patches.formats.models import text_maps

FLUX = {"context": "context_embedder", "pooled": "time_text_embed.text_embedder.linear_1"}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The tiny base of a layout, saved once."""

    @cache
    def base(layout: str) -> Base:
        folder = tmp_path_factory.mktemp("bases") / layout
        tiny_transformer(layout).save_pretrained(folder)
        return Base.open(folder)

    return base


def terms(base: Base) -> list[Term]:
    first, *others = text_maps(base)
    return [Term("a", sum(others, start=first))] if others else [Term("a", first)]


@pytest.mark.parametrize("layout", ["flux", "stable-diffusion-3", "kolors"])
def test_diffusers_loads_and_fuses_a_patch_of_text_inputs(
    opened: Callable[[str], Base], tmp_path: Path, layout: str
) -> None:
    base = opened(layout)
    exported = export(base, terms(base), tmp_path / "x.safetensors", None, About("safe"), for_="diffusers")
    assert exported.format == "diffusers"
    assert exported.whole_for == list(base.layout.read_by)
    denoiser = "unet" if layout == "kolors" else "transformer"
    pipe: Any = base.pipeline()
    pipe.load_lora_weights(str(exported.path))
    pipe.fuse_lora(components=[denoiser])
    pipe.unload_lora_weights()
    composed = compose(base, terms(base))
    fused = getattr(pipe, denoiser).state_dict()
    assert sorted(composed) == base.projections()
    assert len(composed) == 2
    for name, value in composed.items():
        assert (fused[name.removeprefix(f"{denoiser}/")] - value).abs().max() < 2.4e-7
    again = compose(base, [Term("b", import_weights(base, exported.path).delta)])
    assert all((again[name] - composed[name]).abs().max() < 2.4e-7 for name in composed)


def test_what_no_tool_would_load_is_refused_by_its_name(opened: Callable[[str], Base], tmp_path: Path) -> None:
    base, file = opened("kolors"), tmp_path / "x.safetensors"
    for reader in ("kohya", "comfyui", "a1111"):
        with pytest.raises(NotExportable, match=r"loads? no LoRA that is written here for kolors; build a checkpoint"):
            export(base, terms(base), file, None, About("safe"), for_=reader)
    base = opened("flux")
    for format, tool, why in (
        ("kohya", None, "no reader of this format has a name for it"),
        ("kohya", "diffusers", "diffusers cannot load a kohya file of flux; export as diffusers"),
        (None, "a1111", "A1111 loads no LoRA that is written here for flux; build a checkpoint"),
        ("diffusers", "kohya", "kohya's scripts cannot load a diffusers file of flux; build a checkpoint"),
    ):
        with pytest.raises(NotExportable, match=why):
            export(base, terms(base), file, format, About("safe"), for_=tool)
    assert not file.exists()


def spelled(module: str) -> dict[str, str]:
    """FLUX's text inputs as tools begin their names."""
    native = {"context": "txt_in", "pooled": "vector_in.in_layer"}[module]
    diffusers_name = FLUX[module]
    return {
        "PEFT": f"transformer.{diffusers_name}",
        "OneTrainer": f"lora_transformer_{diffusers_name.replace('.', '_')}",
        "kohya": f"lora_unet_{native.replace('.', '_')}",
        "ComfyUI": f"diffusion_model.{native}",
    }


@pytest.mark.parametrize("tool", ["PEFT", "OneTrainer", "kohya", "ComfyUI"])
def test_every_tools_names_of_flux_are_read(opened: Callable[[str], Base], tmp_path: Path, tool: str) -> None:
    base, tensors = opened("flux"), {}
    down, up = ("lora_A", "lora_B") if tool == "PEFT" else ("lora_down", "lora_up")
    for module, name in FLUX.items():
        out, width = base.places[f"transformer/{name}.weight"].shape
        tensors[f"{spelled(module)[tool]}.{down}.weight"] = torch.ones(2, width)
        tensors[f"{spelled(module)[tool]}.{up}.weight"] = torch.ones(out, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    imported = import_weights(base, tmp_path / "x.safetensors")
    assert set(imported.changed) == {f"transformer/{name}.weight" for name in FLUX.values()}
    assert imported.proof.differing == 0


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_uces_edited_weights_of_flux_are_read(opened: Callable[[str], Base], tmp_path: Path, prefix: str) -> None:
    base = opened("flux")
    composed = compose(base, terms(base))
    save_file(
        {name.replace("transformer/", prefix): value for name, value in composed.items()}, tmp_path / "uce.safetensors"
    )
    imported = import_weights(base, tmp_path / "uce.safetensors")
    assert imported.edits.meaning == "weights"
    again = compose(base, [Term("b", imported.delta)])
    assert all(torch.equal(again[name], composed[name]) for name in composed)


# Layers that other code keeps in one matrix.


def with_width(code: CodeType, wide: int, width: int) -> CodeType:
    """diffusers' conversions, which have the width of the published model written into them, for a tiny one."""

    def changed(value: Any) -> Any:
        if isinstance(value, CodeType):
            return with_width(value, wide, width)
        if isinstance(value, tuple):
            return tuple(map(changed, value))
        return {wide: width, 4 * wide: 4 * width}.get(value, value) if type(value) is int else value

    return code.replace(co_consts=tuple(map(changed, code.co_consts)))


def factors(layers: dict[str, int], names: tuple[str, str], columns: dict[str, int] | None = None) -> dict[str, Tensor]:
    """Random factors of rank 3 for layers of a width of 16, by their number of rows."""
    rng, tensors = torch.Generator().manual_seed(0), {}
    for layer, rows in layers.items():
        width = (columns or {}).get(layer, 16)
        tensors[f"{layer}.{names[0]}.weight"] = torch.randn(3, width, generator=rng)
        tensors[f"{layer}.{names[1]}.weight"] = torch.randn(rows, 3, generator=rng)
    return tensors


XLABS = {
    "double_blocks.0.processor.qkv_lora1": 48,
    "double_blocks.0.processor.qkv_lora2": 48,
    "double_blocks.0.processor.proj_lora1": 16,
    "double_blocks.0.processor.proj_lora2": 16,
    "single_blocks.0.processor.qkv_lora": 48,
    "single_blocks.0.processor.proj_lora": 16,
}
NATIVE = {
    "double_blocks.0.img_attn.qkv": 48,
    "double_blocks.0.txt_attn.qkv": 48,
    "double_blocks.0.img_attn.proj": 16,
    "double_blocks.0.txt_mlp.0": 64,
    "single_blocks.0.linear1": 112,
    "single_blocks.0.linear2": 16,
}
HUNYUAN = {
    "double_blocks.0.img_attn_qkv": 48,
    "double_blocks.0.txt_attn_qkv": 48,
    "double_blocks.0.txt_attn_proj": 16,
    "double_blocks.0.img_mlp.fc1": 64,
    "double_blocks.0.img_mod.linear": 96,
    "single_blocks.0.linear1": 112,
    "single_blocks.0.linear2": 16,
    "single_blocks.0.modulation.linear": 48,
    "txt_in.input_embedder": 16,
}
COLUMNS = {
    "single_blocks.0.processor.proj_lora": 80,
    "single_blocks.0.linear2": 80,
}
CONVERSIONS = {
    "flux": "_convert_kohya_flux_lora_to_diffusers",
    "chroma": "_convert_kohya_flux_lora_to_diffusers",
    "hunyuan-video": "_convert_hunyuan_video_lora_to_diffusers",
}


def kohya(layers: dict[str, int], alpha: float | None = None) -> dict[str, Tensor]:
    renamed = {layer: f"lora_unet_{layer.replace('.', '_')}" for layer in layers}
    columns = {renamed[layer]: width for layer, width in COLUMNS.items() if layer in renamed}
    tensors = factors({renamed[layer]: rows for layer, rows in layers.items()}, ("lora_down", "lora_up"), columns)
    return tensors | {f"{name}.alpha": torch.tensor(alpha) for name in renamed.values() if alpha}


def prefixed(layers: dict[str, int], prefix: str, names: tuple[str, str]) -> dict[str, Tensor]:
    columns = {f"{prefix}{layer}": width for layer, width in COLUMNS.items()}
    return factors({f"{prefix}{layer}": rows for layer, rows in layers.items()}, names, columns)


FUSED: dict[str, tuple[str, str, dict[str, Tensor]]] = {
    "XLabs": ("flux", "XLabs LoRA", prefixed(XLABS, "", ("down", "up"))),
    "XLabs in ComfyUI": ("flux", "XLabs LoRA", prefixed(XLABS, "diffusion_model.", ("down", "up"))),
    "kohya": ("flux", "kohya LoRA", kohya(NATIVE, 2.0)),
    "kohya without alpha": ("flux", "kohya LoRA", kohya(NATIVE)),
    "kohya of Chroma": ("chroma", "kohya LoRA", kohya(NATIVE, 6.0)),
    "HunyuanVideo": ("hunyuan-video", "ComfyUI LoRA", prefixed(HUNYUAN, "diffusion_model.", ("lora_A", "lora_B"))),
}


@pytest.mark.parametrize("case", FUSED)
def test_a_file_of_fused_layers_becomes_what_diffusers_makes_of_it(
    opened: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    layout, dialect, tensors = FUSED[case]
    base, file = opened(layout), tmp_path / "x.safetensors"
    save_file(tensors, file)
    real = getattr(lora_pipeline, CONVERSIONS[layout])
    tiny = FunctionType(with_width(real.__code__, 3072, 16), real.__globals__)
    monkeypatch.setattr(lora_pipeline, CONVERSIONS[layout], tiny)
    imported = import_weights(base, file)
    assert (imported.edits.dialect, imported.unmatched, imported.proof.differing) == (dialect, (), 0)
    composed = compose(base, [Term("a", imported.delta)])
    pipe: Any = base.pipeline()
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    fused = pipe.transformer.state_dict()
    original = base.tensors(name for name in base.names if name.startswith("transformer/"))
    changed = {name for name, value in original.items() if not torch.equal(fused[name[12:]], value)}
    assert changed == composed.keys()
    for name, value in composed.items():
        assert (fused[name[12:]] - value).abs().max() <= 4e-7 * value.abs().max(), name


def test_kohyas_names_of_hunyuan_video_mean_what_the_models_own_names_mean(
    opened: Callable[[str], Base], tmp_path: Path
) -> None:
    base, deltas = opened("hunyuan-video"), []
    for file, tensors in (
        ("own", prefixed(HUNYUAN, "diffusion_model.", ("lora_A", "lora_B"))),
        ("kohya", kohya(HUNYUAN)),
    ):
        save_file(tensors, tmp_path / f"{file}.safetensors")
        deltas.append(import_weights(base, tmp_path / f"{file}.safetensors").delta)
    assert deltas[0] == deltas[1]


def test_the_halves_of_the_last_norm_are_turned(opened: Callable[[str], Base], tmp_path: Path) -> None:
    """As diffusers' conversion does it, whose loader then loses what it calls by a name without a prefix."""
    base, tensors = opened("flux"), kohya({"final_layer.adaLN_modulation.1": 32})
    save_file(tensors, tmp_path / "x.safetensors")
    (name,) = import_weights(base, tmp_path / "x.safetensors").changed
    composed = compose(base, [Term("a", import_weights(base, tmp_path / "x.safetensors").delta)])[name]
    converted = getattr(lora_pipeline, CONVERSIONS["flux"])(tensors)
    change = converted["norm_out.linear.lora_B.weight"] @ converted["norm_out.linear.lora_A.weight"]
    assert name == "transformer/norm_out.linear.weight"
    assert (composed - base.tensor(name) - change).abs().max() < 1e-6


def test_kohyas_file_of_sd3_changes_what_diffusers_makes_of_the_whole_model(
    opened: Callable[[str], Base], tmp_path: Path
) -> None:
    """diffusers reads no such LoRA: it converts the published model, and its conversion is linear."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as converted

    base = opened("stable-diffusion-3")
    blocks = {"x_block": ("attn.proj", "mlp.fc1", "mlp.fc2"), "context_block": ()}
    rows = {"attn.proj": 16, "mlp.fc1": 64, "mlp.fc2": 16}
    layers = {f"joint_blocks.0.{block}.{part}": rows[part] for block, parts in blocks.items() for part in parts}
    layers |= {f"joint_blocks.0.{block}.attn.qkv": 48 for block in blocks}
    layers |= {"joint_blocks.0.x_block.adaLN_modulation.1": 96, "joint_blocks.0.context_block.adaLN_modulation.1": 32}
    renamed = {f"lora_unet_{layer.replace('.', '_')}": layer for layer in layers}
    tensors = factors(
        {name: layers[layer] for name, layer in renamed.items()},
        ("lora_down", "lora_up"),
        {"lora_unet_joint_blocks_0_x_block_mlp_fc2": 64},
    )
    save_file(tensors, tmp_path / "x.safetensors")
    composed = compose(base, [Term("a", import_weights(base, tmp_path / "x.safetensors").delta)])

    class Zeros(dict[str, Tensor]):
        def __missing__(self, key: str) -> Tensor:
            return torch.zeros(12, 16)

        def pop(self, key: str, *default: Any) -> Any:
            return super().pop(key) if key in self else self[key]

    checkpoint = Zeros()
    for name, layer in renamed.items():
        checkpoint[f"{layer}.weight"] = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    checkpoint["context_embedder.weight"] = torch.zeros(16, 40)
    wanted = {name: value for name, value in converted(checkpoint).items() if value.any()}
    assert {f"transformer/{name}" for name in wanted} == composed.keys()
    for name, change in wanted.items():
        value = base.tensor(f"transformer/{name}") + change
        assert (composed[f"transformer/{name}"] - value).abs().max() <= 4e-7 * value.abs().max(), name


def test_edited_weights_and_differences_of_fused_layers_are_read(opened: Callable[[str], Base], tmp_path: Path) -> None:
    base, rng = opened("flux"), torch.Generator().manual_seed(0)
    parts = [
        f"transformer/single_transformer_blocks.0.{part}"
        for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    change = 0.01 * torch.randn(112, 16, generator=rng)
    whole = torch.cat([base.tensor(f"{part}.weight") for part in parts])
    biases = torch.cat([base.tensor(f"{part}.bias") for part in parts])
    files = {
        "edited weights": {
            "diffusion_model.single_blocks.0.linear1.weight": whole + change,
            "diffusion_model.single_blocks.0.linear1.bias": biases,
        },
        "kohya LoRA": {"lora_unet_single_blocks_0_linear1.diff": change},
    }
    for dialect, tensors in files.items():
        save_file(tensors, tmp_path / f"{dialect}.safetensors")
        imported = import_weights(base, tmp_path / f"{dialect}.safetensors")
        composed = compose(base, [Term("a", imported.delta)])
        assert imported.edits.dialect == dialect
        assert torch.equal(torch.cat([composed[f"{part}.weight"] for part in parts]), whole + change)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(47, 3)},
            r"\[47, 3\].*in one matrix with it.*\[48, 16\]",
        ),
        ({"lora_transformer_transformer_blocks_0_attn_to_k.lora_up.weight": torch.ones(16, 3)}, "about the same layer"),
        ({"lora_unet_double_blocks_7_img_attn_qkv.lora_up.weight": torch.ones(48, 3)}, "1 of its 13 keys name nothing"),
    ],
)
def test_a_file_of_fused_layers_that_does_not_fit_is_refused(
    opened: Callable[[str], Base], tmp_path: Path, changes: dict[str, Tensor], why: str
) -> None:
    save_file({**kohya(NATIVE), **changes}, tmp_path / "x.safetensors")
    with pytest.raises(ForeignFile, match=why):
        import_weights(opened("flux"), tmp_path / "x.safetensors")


def test_diffusers_has_a_loader_for_every_layout_that_it_is_said_to_load() -> None:
    for layout in layouts():
        can = any(hasattr(getattr(diffusers, each, None), "load_lora_weights") for each in layout.pipelines)
        if layout.is_caught:
            assert can == ("diffusers" in layout.read_by), layout.name
        assert set(layout.read_by) <= set(READERS)


def test_the_header_of_a_transformer_says_which_one(opened: Callable[[str], Base], tmp_path: Path) -> None:
    from safetensors import safe_open

    base = opened("flux")
    exported = export(base, terms(base), tmp_path / "x.safetensors", None, About("safe"))
    with safe_open(exported.path, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "flux-1-dev/lora"
        assert file.metadata()["ss_base_model_version"] == "flux1"
    assert all(key.startswith("transformer.") for key in load_file(exported.path))
    assert isinstance(terms(base)[0].delta.parts[0], TextMap)
