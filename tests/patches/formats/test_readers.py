"""An export says for which tools it is whole, and is refused for a tool that would pass over a layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from overpaint.bases.base import Base
from overpaint.bases.safetensors_file import SafetensorsFile
from overpaint.core.errors import OverpaintError
from overpaint.patches.compose import Term, compose
from overpaint.patches.formats.dialects import READERS
from overpaint.patches.formats.exporting import About, Exported, NotExportable, export
from overpaint.patches.formats.importing import import_weights
from tests.bases.test_channels import with_channels
from tests.patches.formats.models import dense, low_rank, text_maps

Models = Callable[[str, torch.dtype], Base]
ABOUT = About("safe")
PASSED_OVER = ["unet/add_embedding.linear_1.weight"]


@pytest.fixture
def xl(model: Models) -> Base:
    return model("XL", torch.float32)


def pooled(xl: Base) -> list[Term]:
    """A text map of every text input of XL, the pooled one among them."""
    first, *others = text_maps(xl)
    return [Term("a", sum((text_map for text_map in others), start=first))]


def layer(encoder: str, number: int, part: str) -> str:
    return f"{encoder}/text_model.encoder.layers.{number}.{part}"


def test_an_export_names_the_tools_for_which_it_is_whole(xl: Base, tmp_path: Path) -> None:
    exported = export(xl, pooled(xl), tmp_path / "x.safetensors", "kohya", ABOUT)
    assert exported.whole_for == ["a1111", "comfyui", "diffusers"]
    assert exported.skipped["kohya"] == PASSED_OVER
    said = exported.readers_sentence()
    assert said.startswith("whole for A1111")
    assert f"kohya's scripts would pass over 1 tensors, first {PASSED_OVER[0]}" in said


def test_an_export_for_a_tool_that_would_pass_over_a_layer_is_refused(xl: Base, tmp_path: Path) -> None:
    for format in (None, "kohya"):
        with pytest.raises(NotExportable, match=f"kohya's scripts would pass over 1 of .*{PASSED_OVER[0]}.* a1111 or"):
            export(xl, pooled(xl), tmp_path / "x.safetensors", format, ABOUT, for_="kohya")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ["1.x", "2.x", "XL"])
def test_the_first_layer_of_an_inpainting_model_is_none_that_a1111_changes(tmp_path: Path, architecture: str) -> None:
    inpainting = Base.open(with_channels(architecture, 9, tmp_path / "inpainting"))
    terms = [Term("a", dense(inpainting, ["unet/conv_in.weight", "unet/conv_out.weight"]))]
    exported = export(inpainting, terms, tmp_path / "x.safetensors", "comfy-diff", ABOUT)
    assert exported.skipped["a1111"] == ["unet/conv_in.weight"]
    with pytest.raises(NotExportable, match="A1111 would pass over 1 of 2"):
        export(inpainting, terms, tmp_path / "y.safetensors", None, ABOUT, for_="a1111")
    others = export(inpainting, [Term("a", text_maps(inpainting)[0])], tmp_path / "z.safetensors", None, ABOUT)
    assert "a1111" in others.whole_for


def test_a_title_is_a_name_that_can_stand_in_a_prompt_of_a1111(base: Base, tmp_path: Path) -> None:
    (text_map,) = text_maps(base)
    export(base, [Term("a", text_map)], tmp_path / "x.safetensors", None, replace(ABOUT, title="cat > dog: all"))
    header = SafetensorsFile.open(tmp_path / "x.safetensors").metadata
    assert header["ss_output_name"] == "cat _ dog_ all"
    assert header["modelspec.title"] == "cat > dog: all"


@pytest.mark.parametrize(
    ("tool", "thin", "full"),
    [
        ("a1111", "kohya", "comfy-diff"),
        ("comfyui", "kohya", "comfy-diff"),
        ("diffusers", "diffusers", None),
        ("kohya", "kohya", None),
    ],
)
def test_a_tool_gets_the_format_of_which_it_loads_everything(
    base: Base, tmp_path: Path, tool: str, thin: str, full: str | None
) -> None:
    (text_map,) = text_maps(base)
    exported = export(base, [Term("a", text_map)], tmp_path / "thin.safetensors", None, ABOUT, for_=tool)
    assert (exported.format, tool in exported.whole_for) == (thin, True)
    terms = [Term("a", dense(base, ["unet/conv_in.weight", "unet/conv_in.bias"]))]

    def wide() -> Exported:
        return export(base, terms, tmp_path / "full.safetensors", None, ABOUT, for_=tool)

    if full:
        assert wide().format == full
        return
    with pytest.raises(NotExportable):
        wide()


def test_without_a_tool_the_format_is_kohya_and_an_unknown_tool_is_named(base: Base, tmp_path: Path) -> None:
    (text_map,) = text_maps(base)
    assert export(base, [Term("a", text_map)], tmp_path / "x.safetensors", None, ABOUT).format == "kohya"
    with pytest.raises(OverpaintError, match="unknown tool 'invoke'; an export can be for a1111"):
        export(base, [Term("a", text_map)], tmp_path / "y.safetensors", None, ABOUT, for_="invoke")
    with pytest.raises(
        NotExportable, match="ComfyUI and Forge cannot load a diffusers file of stable-diffusion; export as kohya"
    ):
        export(base, [Term("a", text_map)], tmp_path / "y.safetensors", "diffusers", ABOUT, for_="comfyui")


def test_every_format_of_a_tool_is_one_that_is_written() -> None:
    from overpaint.patches.formats.exporting import FORMATS

    assert {format for each in READERS.values() for format in (*each.formats, *each.skips)} <= set(FORMATS)


def applied_by_a1111(keys: set[str], encoder: str, number: int) -> bool:
    """Whether A1111 adds anything to an attention that OpenCLIP built: it asks for a layer for each of its four matrices."""
    prefix = "lora_te2" if encoder == "text_encoder_2" else "lora_te"
    parts = ("q", "k", "v", "out")
    return all(
        any(key.startswith(f"{prefix}_text_model_encoder_layers_{number}_self_attn_{part}_proj.") for key in keys)
        for part in parts
    )


@pytest.mark.parametrize(("architecture", "encoder"), [("2.x", "text_encoder"), ("XL", "text_encoder_2")])
@pytest.mark.parametrize("format", ["kohya", "comfy-diff"])
@pytest.mark.parametrize("part", ["q_proj", "v_proj", "out_proj"])
def test_a1111_gets_all_four_matrices_of_an_attention_that_openclip_built(
    model: Models, tmp_path: Path, architecture: str, encoder: str, format: str, part: str
) -> None:
    base = model(architecture, torch.float32)
    name = layer(encoder, 1, f"self_attn.{part}.weight")
    delta = low_rank(base, [name]) if format == "kohya" else dense(base, [name])
    exported = export(base, [Term("a", delta)], tmp_path / "x.safetensors", format, ABOUT)
    tensors = load_file(exported.path)
    assert applied_by_a1111(set(tensors), encoder, 1)
    assert exported.of == base.tensor(name).numel()
    # What was added does nothing, here as elsewhere.
    imported = import_weights(base, exported.path)
    assert imported.changed == (name,)
    composed, again = (compose(base, [Term("a", each)])[name] for each in (delta, imported.delta))
    assert torch.equal(composed, again)


def test_an_encoder_that_is_no_openclip_gets_no_more_than_it_needs(base: Base, tmp_path: Path) -> None:
    name = layer("text_encoder", 1, "self_attn.out_proj.weight")
    exported = export(base, [Term("a", low_rank(base, [name]))], tmp_path / "x.safetensors", "kohya", ABOUT)
    assert len(load_file(exported.path)) == 3


def test_a_bias_of_openclips_attention_is_passed_over_by_a1111(xl: Base, tmp_path: Path) -> None:
    names = [layer(encoder, 0, "self_attn.k_proj.bias") for encoder in ("text_encoder", "text_encoder_2")]
    terms = [Term("a", dense(xl, names))]
    exported = export(xl, terms, tmp_path / "x.safetensors", "comfy-diff", ABOUT)
    assert exported.skipped == {"a1111": names[1:], "comfyui": []}
    with pytest.raises(NotExportable, match=f"A1111 would pass over 1 of 2 .*{names[1]}"):
        export(xl, terms, tmp_path / "y.safetensors", "comfy-diff", ABOUT, for_="a1111")


def test_the_command_line_says_for_whom_a_file_is(tmp_path: Path) -> None:
    from click.testing import CliRunner

    import overpaint
    from overpaint.cli import main
    from overpaint.testing import tiny_pipeline

    tiny_pipeline().save_pretrained(tmp_path / "base")
    workspace = overpaint.open(tmp_path / "registry")
    workspace.add_base("b", tmp_path / "base")
    workspace.solve("cat", base="b")
    words = ["--registry", str(tmp_path / "registry"), "patch", "export", "cat", "--json", "-o"]
    run = CliRunner().invoke(main, [*words, str(tmp_path / "x.safetensors"), "--for", "diffusers"])
    found = json.loads(run.stdout)
    assert (found["format"], found["whole_for"], found["passed_over"]) == ("diffusers", ["diffusers"], {})
    exported = workspace.export_patches(["cat"], tmp_path / "y.safetensors", for_="a1111")
    assert (exported.format, exported.whole_for) == ("kohya", ["a1111", "kohya", "comfyui", "diffusers"])
