"""Adapters that are no LoRA are refused by their names, with what to do instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from overpaint.bases.base import Base
from overpaint.patches.formats.dialects import UNREAD, ForeignFile
from overpaint.patches.formats.importing import Options, import_weights

KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
PEFT = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"

FILES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "LyCORIS LoHa": ("LoHa", KOHYA, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")),
    "LyCORIS LoHa of a convolution": ("LoHa", KOHYA, ("hada_t1", "hada_t2", "alpha")),
    "PEFT LoHa": ("LoHa", PEFT, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    "LyCORIS LoKr": ("LoKr", KOHYA, ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")),
    "LyCORIS LoKr, both factored": ("LoKr", KOHYA, ("lokr_w1_a", "lokr_w1_b", "lokr_t2", "alpha")),
    "PEFT LoKr": ("LoKr", PEFT, ("lokr_w1", "lokr_w2")),
    "kohya DoRA": ("DoRA", KOHYA, ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")),
    "PEFT DoRA": ("DoRA", PEFT, ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")),
    "diffusers DoRA": ("DoRA", PEFT, ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight")),
    "LyCORIS OFT": ("OFT or BOFT", KOHYA, ("oft_blocks", "rescale", "alpha")),
    "kohya OFT": ("OFT or BOFT", KOHYA, ("oft_blocks", "alpha")),
    "LyCORIS OFT, older": ("OFT or BOFT", KOHYA, ("oft_diag", "alpha")),
    "PEFT OFT": ("OFT", PEFT, ("oft_R.weight",)),
    "PEFT OFT, older": ("OFT", PEFT, ("oft_r", "oft_s")),
    "PEFT BOFT": ("BOFT", PEFT, ("boft_R", "boft_s")),
    "LyCORIS GLoRA": ("GLoRA", KOHYA, ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha")),
    "LyCORIS IA3": ("IA3", KOHYA, ("weight", "on_input")),
    "PEFT IA3": ("IA3", PEFT, ("ia3_l",)),
    "PEFT VeRA": ("VeRA", PEFT, ("vera_lambda_b", "vera_lambda_d")),
    "PEFT AdaLoRA": ("AdaLoRA", PEFT, ("lora_A", "lora_B", "lora_E")),
    "PEFT FourierFT": ("FourierFT", PEFT, ("fourierft_spectrum",)),
    "PEFT HRA": ("HRA", PEFT, ("hra_u",)),
    "ComfyUI, a whole parameter": ("ComfyUI's set_weight", KOHYA, ("set_weight",)),
    "ComfyUI, a parameter grown": ("ComfyUI's reshape_weight", KOHYA, ("reshape_weight", "lora_up.weight")),
}


@pytest.mark.parametrize("what", FILES)
def test_an_adapter_that_is_not_read_is_refused_by_its_name(base: Base, tmp_path: Path, what: str) -> None:
    algorithm, layer, endings = FILES[what]
    file = tmp_path / "x.safetensors"
    save_file({f"{layer}.{ending}": torch.ones(2, 2) for ending in endings}, file)
    # Allowing keys to be left out must not turn half an adapter into a patch.
    for options in (Options(), Options(allow_unmatched=True)):
        with pytest.raises(ForeignFile, match=re.escape(f"and {algorithm} is not read; merge the file")) as caught:
            import_weights(base, file, options)
        assert layer in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("algorithm", UNREAD)
def test_any_one_of_an_algorithms_tensors_gives_it_away(base: Base, tmp_path: Path, algorithm: str) -> None:
    for number, ending in enumerate(UNREAD[algorithm]):
        file = tmp_path / f"{number}.safetensors"
        save_file({f"{KOHYA}.{ending}": torch.ones(2, 2)}, file)
        with pytest.raises(ForeignFile, match=re.escape(f"and {algorithm} is not read")):
            import_weights(base, file)


def test_the_page_names_every_algorithm_that_is_not_read() -> None:
    page = (Path(__file__).parents[3] / "docs" / "using-with.md").read_text("utf-8")
    named = {word for algorithm in UNREAD for word in algorithm.removeprefix("ComfyUI's ").split(" or ")}
    assert [word for word in sorted(named) if word not in page] == []


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("string_to_param.*", "a textual inversion"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "of FLUX"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "of Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "of a diffusion transformer"),
        ("first_stage_model.decoder.up.0.block.0.conv1.weight", "a VAE"),
        ("lora_unet_down_blocks_9_attentions_0_proj_in.lora_down.weight", r"as known tools write them \(lora_unet_\)"),
        ("some.thing", "no tool that is known here names tensors as 'some.thing'"),
    ],
)
def test_what_is_not_understood_is_described_by_what_it_is(base: Base, tmp_path: Path, key: str, what: str) -> None:
    save_file({key: torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(ForeignFile, match=what) as refusal:
        import_weights(base, tmp_path / "x.safetensors")
    assert key in str(refusal.value)


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
OLD = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
ENCODER = "encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (f"lycoris_{LAYER.replace('.', '_')}", f"unet/{LAYER}"),
        (f"module.unet.{LAYER}", f"unet/{LAYER}"),
        (f"unet.base_model.model.{LAYER}", f"unet/{LAYER}"),
        (f"unet._orig_mod.{LAYER}", f"unet/{LAYER}"),
        (f"model.diffusion_model.{OLD}", f"unet/{LAYER}"),
        (f"clip_l.transformer.text_model.{ENCODER}", f"text_encoder/text_model.{ENCODER}"),
        (f"text_encoder.module.text_model.{ENCODER}", f"text_encoder/text_model.{ENCODER}"),
    ],
)
@pytest.mark.parametrize("adapter", ["", ".default", ".mine"])
def test_what_tools_wrap_around_names_is_taken_off(
    base: Base, tmp_path: Path, module: str, name: str, adapter: str
) -> None:
    is_kohya = module.startswith("lycoris")
    down, up = ("lora_down", "lora_up") if is_kohya else (f"lora_A{adapter}", f"lora_B{adapter}")
    out, width = base.places[f"{name}.weight"].shape[:2]
    tensors = {f"{module}.{down}.weight": torch.ones(2, width), f"{module}.{up}.weight": torch.ones(out, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert import_weights(base, tmp_path / "x.safetensors").changed == (f"{name}.weight",)


def test_two_adapters_in_one_file_are_refused(base: Base, tmp_path: Path) -> None:
    out, width = base.places[f"unet/{LAYER}.weight"].shape
    sides = {"A": torch.ones(2, width), "B": torch.ones(out, 2)}
    tensors = {
        f"unet.{LAYER}.lora_{side}.{name}.weight": sides[side].clone() for side in "AB" for name in ("one", "two")
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ForeignFile, match="are about the same layer"):
        import_weights(base, tmp_path / "x.safetensors")
