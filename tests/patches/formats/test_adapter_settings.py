"""What an adapter's configuration means is read with its weights, or the adapter is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from overpaint.bases.base import Base
from overpaint.patches.compose import Term, plan
from overpaint.patches.formats.dialects import INITIALISATIONS, LORA_SETTINGS, AdapterConfig, ForeignFile
from overpaint.patches.formats.importing import Options, import_weights

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
NAME = f"unet/{LAYER}.weight"


def adapter(base: Base, folder: Path, weights: str = "adapter_model.safetensors", **settings: Any) -> Path:
    """A PEFT adapter of rank 2 for one layer; with `settings` None no configuration is written."""
    folder.mkdir()
    out, width = base.tensor(NAME).shape
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{LAYER}.lora_A.weight": torch.randn(2, width, generator=random),
        f"base_model.model.{LAYER}.lora_B.weight": torch.randn(out, 2, generator=random),
    }
    if weights.endswith(".bin"):
        torch.save(tensors, folder / weights)
    else:
        save_file(tensors, folder / weights)
    if settings:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **settings}))
    return folder


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_file_of_an_adapter_imports_as_its_folder_does(base: Base, tmp_path: Path, weights: str) -> None:
    folder = adapter(base, tmp_path / "a", weights, lora_alpha=16)
    by_folder, by_file = (import_weights(base, path).delta for path in (folder, folder / weights))
    assert by_folder == by_file
    tensors = _loaded(folder / weights)
    up, down = (tensors[f"base_model.model.{LAYER}.lora_{each}.weight"] for each in "BA")
    wanted = base.tensor(NAME) + 8 * (up.double() @ down.double()).to(torch.float32)
    assert torch.allclose(plan(base, [Term("", by_file)]).tensor(NAME), wanted, atol=1e-5)


def _loaded(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".bin":
        tensors: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
        return tensors
    return load_file(file)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", "renamed.safetensors"])
def test_an_adapter_without_its_configuration_is_refused(base: Base, tmp_path: Path, weights: str) -> None:
    folder = adapter(base, tmp_path / "a", weights)
    with pytest.raises(ForeignFile, match=r"adapter_config\.json"):
        import_weights(base, folder / weights)


@pytest.mark.parametrize("alpha", [torch.tensor(4), torch.tensor(4, dtype=torch.uint8), torch.tensor([4.0])])
def test_any_real_number_is_an_alpha(base: Base, tmp_path: Path, alpha: torch.Tensor) -> None:
    out, width = base.tensor(NAME).shape
    layer = f"lora_unet_{LAYER.replace('.', '_')}"
    up, down = torch.ones(out, 2), torch.ones(2, width)
    save_file(
        {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down, f"{layer}.alpha": alpha},
        tmp_path / "x.safetensors",
    )
    composed = plan(base, [Term("", import_weights(base, tmp_path / "x.safetensors").delta)]).tensor(NAME)
    assert torch.allclose(composed, base.tensor(NAME) + 4 / 2 * (up @ down))


@pytest.mark.parametrize(
    "name", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga", "loftq", "a_later_one"]
)
def test_an_adapter_that_starts_from_changed_weights_is_refused_by_name(base: Base, tmp_path: Path, name: str) -> None:
    folder = adapter(base, tmp_path / "a", lora_alpha=2, init_lora_weights=name)
    with pytest.raises(ForeignFile, match=f"init_lora_weights='{name}'"):
        import_weights(base, folder, Options(allow_unmatched=True))


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva"])
def test_an_adapter_that_starts_from_the_base_is_read(base: Base, tmp_path: Path, value: object) -> None:
    folder = adapter(base, tmp_path / "a", lora_alpha=2, init_lora_weights=value)
    assert import_weights(base, folder).proof.differing == 0


def test_every_setting_of_the_installed_peft_is_read_harmless_or_refused_when_it_is_on() -> None:
    """A new field of LoraConfig is refused until somebody has thought about it."""
    for setting in dataclasses.fields(LoraConfig):
        if setting.name in LORA_SETTINGS:
            continue
        with pytest.raises(ForeignFile, match=f"asks for {setting.name}"):
            AdapterConfig.from_json({"lora_alpha": 1, setting.name: True})


def test_what_peft_writes_by_default_is_read() -> None:
    written = json.loads(json.dumps(dataclasses.asdict(LoraConfig(lora_alpha=4)), default=list))
    assert AdapterConfig.from_json(written).scale("x", 2) == 2


def test_initialisations_are_compared_without_case() -> None:
    assert all(name == name.lower() for name in INITIALISATIONS)


@pytest.mark.parametrize(
    "ending",
    ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.mine.weight", "dora_scale.weight"],
)
def test_dora_is_refused_by_whatever_name_its_magnitudes_have(base: Base, tmp_path: Path, ending: str) -> None:
    out, width = base.tensor(NAME).shape
    tensors = {"lora_A.weight": torch.ones(2, width), "lora_B.weight": torch.ones(out, 2), ending: torch.ones(out)}
    save_file({f"unet.{LAYER}.{end}": value for end, value in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ForeignFile, match="DoRA is not read"):
        import_weights(base, tmp_path / "x.safetensors", Options(allow_unmatched=True))


def test_a_key_of_a_layer_that_is_read_cannot_be_left_out(base: Base, tmp_path: Path) -> None:
    out, width = base.tensor(NAME).shape
    tensors = {"lora_A.weight": torch.ones(2, width), "lora_B.weight": torch.ones(out, 2), "gate": torch.ones(out)}
    save_file({f"unet.{LAYER}.{end}": value for end, value in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ForeignFile, match="would mean something else"):
        import_weights(base, tmp_path / "x.safetensors", Options(allow_unmatched=True))


def test_an_import_that_leaves_keys_out_speaks_of_those_it_read(base: Base, tmp_path: Path) -> None:
    out, width = base.tensor(NAME).shape
    tensors = {"lora_A.weight": torch.ones(2, width), "lora_B.weight": torch.ones(out, 2)}
    keys = {f"unet.{LAYER}.{end}": value for end, value in tensors.items()}
    save_file({**keys, "other.lora_A.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    *_, last = import_weights(base, tmp_path / "x.safetensors", Options(allow_unmatched=True)).sentences()
    assert last.startswith("of the keys that were read")


def change_of(base: Base, path: Path, name: str = NAME) -> torch.Tensor:
    """What an import adds to a weight of the base."""
    composed = plan(base, [Term("", import_weights(base, path).delta)]).tensor(name)
    return composed.double() - base.tensor(name).double()


def pair(base: Base, name: str = NAME) -> tuple[torch.Tensor, torch.Tensor]:
    out, width = base.tensor(name).shape
    random = torch.Generator().manual_seed(0)
    return torch.randn(out, 2, generator=random), torch.randn(2, width, generator=random)


@pytest.mark.parametrize("setting", [{"lora_alpha": 16}, {"config": {"lora_alpha": 16}}, {"text": {"scale": 0.5}}])
def test_a_pickle_with_settings_beside_its_factors_is_refused(
    base: Base, tmp_path: Path, setting: dict[str, object]
) -> None:
    up, down = pair(base)
    torch.save({f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up, **setting}, tmp_path / "x.pt")
    with pytest.raises(ForeignFile, match="more than tensors in it"):
        import_weights(base, tmp_path / "x.pt")


def test_an_alpha_in_a_pickle_counts_whether_or_not_it_is_a_tensor(base: Base, tmp_path: Path) -> None:
    up, down = pair(base)
    layer = f"lora_unet_{LAYER.replace('.', '_')}"
    lora = {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down, f"{layer}.alpha": 16}
    torch.save({"state_dict": lora, "epoch": 3, "optimizer": {"lr": 1.0}, "ema": None}, tmp_path / "x.pt")
    assert torch.allclose(change_of(base, tmp_path / "x.pt"), 8 * (up.double() @ down.double()), atol=1e-5)


def test_what_stands_beside_flat_tensors_of_a_pickle_is_read_too(base: Base, tmp_path: Path) -> None:
    up, down = pair(base)
    lora = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    torch.save({**lora, "other": {"x.lora_A.weight": down}}, tmp_path / "x.pt")
    with pytest.raises(ForeignFile, match=r"name nothing in the base .*'other\.x\.lora_A\.weight'"):
        import_weights(base, tmp_path / "x.pt")


def test_the_header_of_one_models_adapter_is_read(base: Base, tmp_path: Path) -> None:
    """As `save_lora_adapter` of a model writes it: no component stands before the settings."""
    up, down = pair(base)
    header = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 16, "alpha_pattern": {}, "use_rslora": False})
    save_file(
        {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up},
        tmp_path / "pytorch_lora_weights.safetensors",
        {"lora_adapter_metadata": header},
    )
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        assert torch.allclose(change_of(base, path), 8 * (up.double() @ down.double()), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": float("nan")},
        {"lora_alpha": True},
        {"alpha_pattern": {"to_k": float("inf")}},
        {"use_rslora": "no"},
    ],
)
def test_a_setting_that_is_no_number_or_switch_is_refused(base: Base, tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ForeignFile, match=r"lora_alpha|alpha_pattern|use_rslora"):
        import_weights(base, adapter(base, tmp_path / "a", **{"lora_alpha": 2, **settings}))


@pytest.mark.parametrize("start", ["text_model.", ""])
@pytest.mark.parametrize("pattern", ["^text_model.encoder.layers.0.mlp.fc1", "^encoder.layers.0.mlp.fc1", "mlp.fc1"])
def test_a_pattern_is_held_against_the_name_in_the_file(base: Base, tmp_path: Path, start: str, pattern: str) -> None:
    """Newer libraries name a text encoder's modules without the `text_model.` of older ones."""
    name = "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight"
    up, down = pair(base, name)
    module = f"{start}encoder.layers.0.mlp.fc1"
    save_file(
        {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {pattern: 16}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scale = 8 if pattern in (f"^{module}", "mlp.fc1") else 1
    assert torch.allclose(change_of(base, tmp_path, name), scale * (up.double() @ down.double()), atol=1e-5)


def test_a_weight_that_is_changed_in_two_ways_is_refused(base: Base, tmp_path: Path) -> None:
    up, down = pair(base)
    layer = f"lora_unet_{LAYER.replace('.', '_')}"
    both = {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down, f"{layer}.diff": up @ down}
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(ForeignFile, match="are about the same layer"):
        import_weights(base, tmp_path / "x.safetensors")


def test_an_alpha_that_contradicts_the_configuration_is_refused(base: Base, tmp_path: Path) -> None:
    up, down = pair(base)
    lora = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 16, "unet.r": 2})}
    save_file({**lora, f"unet.{LAYER}.alpha": torch.tensor(16.0)}, tmp_path / "x.safetensors", header)
    assert torch.allclose(change_of(base, tmp_path / "x.safetensors"), 8 * (up.double() @ down.double()), atol=1e-5)
    save_file({**lora, f"unet.{LAYER}.alpha": torch.tensor(4.0)}, tmp_path / "y.safetensors", header)
    with pytest.raises(ForeignFile, match="count 2 times, and by its configuration 8 times"):
        import_weights(base, tmp_path / "y.safetensors")


def test_a_header_that_says_how_much_factors_count_in_other_words_is_refused(base: Base, tmp_path: Path) -> None:
    up, down = pair(base)
    lora = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    save_file(lora, tmp_path / "x.safetensors", {"lora_alpha": "16", "r": "2"})
    with pytest.raises(ForeignFile, match=r"'lora_alpha'.* may say by how much"):
        import_weights(base, tmp_path / "x.safetensors")
    alpha = {f"unet.{LAYER}.alpha": torch.tensor(16.0)}
    save_file({**lora, **alpha}, tmp_path / "y.safetensors", {"lora_alpha": "16", "r": "2"})
    assert import_weights(base, tmp_path / "y.safetensors").proof.differing == 0


def test_a_tensor_that_is_off_by_signs_of_zero_alone_is_named(base: Base, tmp_path: Path) -> None:
    edited = base.tensor(NAME) + 0.01 * torch.randn(base.tensor(NAME).shape, generator=torch.Generator().manual_seed(0))
    save_file({f"{LAYER}.weight": edited.to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    proof = import_weights(base, tmp_path / "x.safetensors").proof
    assert proof.differing > 0
    assert proof.where == NAME
