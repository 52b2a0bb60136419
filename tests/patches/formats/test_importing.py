"""A round trip for every dialect: what a tool wrote, imported and composed, is what that tool's file says, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import Dense, LowRank
from overpaint.patches.formats.dialects import ForeignFile
from overpaint.patches.formats.importing import Imported, Options, import_weights
from tests.checkpoints import single_file
from tests.patches.formats import writers
from tests.patches.formats.models import layers, noise

ATTENTION = (".attn2.to_k.weight", ".attn2.to_v.weight")


def attention(base: Base) -> list[str]:
    return [name for name in base.names if name.endswith(ATTENTION)]


def factors(base: Base, names: list[str], rank: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """up and down, the latter with a kernel's dimensions."""
    found = {}
    for number, name in enumerate(names):
        out, *rest = base.places[name].shape
        found[name] = noise((out, rank), number).to(dtype), noise((rank, *rest), 1000 + number).to(dtype)
    return found


def with_product(base: Base, found: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> dict[str, Tensor]:
    """What the factors make of the base, in float64 and rounded once."""
    wanted = {}
    for name, (up, down) in found.items():
        change = scale * (up.double() @ down.double().reshape(len(down), -1))
        original = base.tensor(name)
        wanted[name] = (original.double() + change.reshape(original.shape)).to(original.dtype)
    return wanted


def edited(base: Base, names: list[str], rank: int = 2, seed: int = 7) -> dict[str, Tensor]:
    """Edited weights: the base's and something of low rank, rounded to the base's dtype."""
    found = {}
    for number, name in enumerate(names):
        weight = base.tensor(name)
        matrix = weight.double().reshape(weight.shape[0], -1)
        change = (
            noise((matrix.shape[0], rank), seed + number).double() @ noise((rank, matrix.shape[1]), number).double()
        )
        found[name] = (matrix + change).reshape(weight.shape).to(weight.dtype)
    return found


def is_composed(base: Base, found: Imported, wanted: Mapping[str, Tensor]) -> bool:
    """Whether the delta gives exactly these weights, and touches no other."""
    composed = compose(base, [Term("p", found.delta)])
    return composed.keys() == wanted.keys() and all(torch.equal(composed[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (2.0, 1.0), (1.0, 0.5), (0.3, 0.15)])
def test_kohya_lora(base: Base, tmp_path: Path, alpha: float | None, scale: float) -> None:
    found = factors(base, layers(base))
    imported = import_weights(base, writers.kohya(tmp_path / "x.safetensors", found, alpha))
    stored = float(torch.tensor(alpha)) / 2 if alpha else scale
    assert (imported.edits.dialect, imported.edits.meaning) == ("kohya LoRA", "change")
    assert imported.proof.differing == 0
    assert is_composed(base, imported, with_product(base, found, stored))


def test_kohya_lora_in_half_precision_on_a_half_precision_base(half: Base, tmp_path: Path) -> None:
    found = factors(half, layers(half), dtype=torch.float16)
    imported = import_weights(half, writers.kohya(tmp_path / "x.safetensors", found, 1.0))
    assert is_composed(half, imported, with_product(half, found, 0.5))
    assert isinstance(imported.delta, LowRank)
    assert all(side.dtype != torch.float64 for pair in imported.delta.factors.values() for side in pair)


def test_kohya_lora_of_xl_with_old_names_and_two_text_encoders(
    model: Callable[[str, torch.dtype], Base], tmp_path: Path
) -> None:
    xl = model("XL", torch.float32)
    found = factors(xl, layers(xl))
    imported = import_weights(xl, writers.kohya_xl(tmp_path / "x.safetensors", found, xl.names))
    assert is_composed(xl, imported, with_product(xl, found))
    assert any(name.startswith("text_encoder_2/") for name in imported.changed)


def test_locon_kernels_that_are_split_in_three(base: Base, tmp_path: Path) -> None:
    name = "unet/down_blocks.0.resnets.0.conv1.weight"
    out, inner, height, width = base.places[name].shape
    up, core, down = noise((out, 2, 1, 1), 1), noise((2, 3, height, width), 2), noise((3, inner, 1, 1), 3)
    key = writers.underscored(name)
    parts = {"lora_up.weight": up, "lora_mid.weight": core, "lora_down.weight": down, "alpha": torch.tensor(1.5)}
    save_file({f"{key}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "x.safetensors")
    wanted = torch.einsum("oa,abhw,bi->oihw", up[..., 0, 0].double(), core.double(), down[..., 0, 0].double()) * 0.5
    imported = import_weights(base, tmp_path / "x.safetensors")
    original = base.tensor(name)
    # float64 sums in another order.
    assert (compose(base, [Term("p", imported.delta)])[name] - (original + wanted)).abs().max() < 1e-7


def test_spm_and_sliders_are_lora_of_rank_one_with_prompts(base: Base, tmp_path: Path) -> None:
    names = [n for n in layers(base) if n.startswith("unet/") and "attentions" in n]
    found = factors(base, names, 1)
    file = writers.kohya(tmp_path / "cat_last.safetensors", found, 1.0, prompts='[{"target": "cat"}]', rank="1")
    imported = import_weights(base, file)
    assert is_composed(base, imported, with_product(base, found))
    assert imported.edits.metadata["prompts"] == '[{"target": "cat"}]'


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_attention_processors_of_older_diffusers(base: Base, tmp_path: Path, prefix: str) -> None:
    names = [n for n in layers(base) if ".attn1." in n or ".attn2." in n]
    found = factors(base, names)
    imported = import_weights(base, writers.attention_processors(tmp_path / "x.safetensors", found, prefix))
    assert is_composed(base, imported, with_product(base, found))


def test_linear_layers_of_diffusers_in_between(base: Base, tmp_path: Path) -> None:
    found = factors(base, [n for n in layers(base) if "attn" in n])
    imported = import_weights(base, writers.linear_layers(tmp_path / "x.safetensors", found))
    assert imported.edits.dialect == "diffusers LoRA"
    assert is_composed(base, imported, with_product(base, found))


def trained_adapter(base: Base, **settings: Any) -> tuple[Any, Any]:
    """A pipeline whose U-Net has a PEFT adapter with random factors, and its configuration."""
    from peft import LoraConfig

    pipe = base.pipeline()
    config = LoraConfig(target_modules=["to_k", "to_v", "conv1"], **settings)
    pipe.unet.add_adapter(config)
    for number, (name, parameter) in enumerate(pipe.unet.named_parameters()):
        if ".lora_" in name:
            parameter.data = noise(parameter.shape, number)
    return pipe, config


def merged(pipe: Any) -> dict[str, Tensor]:
    """The U-Net's weights with its adapter, as PEFT adds them up in float64."""
    found = {}
    for path, module in pipe.unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            change = module.double().get_delta_weight("default")
            weight = module.get_base_layer().weight.double()
            found[f"unet/{path}.weight"] = (weight + change).detach().float()
    return found


def test_what_diffusers_saves_today_with_its_alphas(base: Base, tmp_path: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    pipe, config = trained_adapter(base, r=2, lora_alpha=3, alpha_pattern={"to_v": 5})
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=json.loads(json.dumps(config.to_dict(), default=sorted)),
    )
    imported = import_weights(base, tmp_path)
    assert imported.proof.differing == 0
    wanted, composed = merged(pipe), compose(base, [Term("p", imported.delta)])
    assert composed.keys() == wanted.keys()
    # PEFT's own order of float64 operations.
    assert all((composed[name] - wanted[name]).abs().max() < 1e-7 for name in wanted)


@pytest.mark.parametrize("by_root", [False, True])
def test_a_peft_folder(base: Base, tmp_path: Path, by_root: bool) -> None:
    from peft import LoraConfig, get_peft_model

    pipe = base.pipeline()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_k", "to_v"], use_rslora=by_root)
    model: Any = get_peft_model(pipe.unet, config)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if ".lora_" in name:
            parameter.data = noise(parameter.shape, number)
    model.save_pretrained(tmp_path)
    imported = import_weights(base, tmp_path)
    assert imported.edits.dialect == "PEFT adapter"
    wanted, composed = merged(pipe), compose(base, [Term("p", imported.delta)])
    assert composed.keys() == wanted.keys()
    assert all((composed[name] - wanted[name]).abs().max() < 1e-7 for name in wanted)


def test_lycoris_differences_of_weights_biases_and_norms(base: Base, tmp_path: Path) -> None:
    block = "unet/down_blocks.0.resnets.0."
    names = [f"{block}{part}.{kind}" for part in ("conv1", "norm1", "time_emb_proj") for kind in ("weight", "bias")]
    changes = {name: noise(base.places[name].shape, i, 0.01) for i, name in enumerate(names)}
    imported = import_weights(base, writers.lycoris_full(tmp_path / "x.safetensors", changes))
    wanted = {name: (base.tensor(name).double() + changes[name].double()).float() for name in names}
    assert imported.edits.meaning == "change"
    assert imported.delta == Dense(changes)
    assert is_composed(base, imported, wanted)


def test_a_difference_stays_as_it_was_given_also_where_it_is_thin(base: Base, tmp_path: Path) -> None:
    """Bits that belong to one result would be wrong at another strength."""
    name = attention(base)[0]
    changes = {name: torch.outer(noise((8,), 1), noise((64,), 2))}
    file = writers.lycoris_full(tmp_path / "x.safetensors", changes)
    assert import_weights(base, file).delta == Dense(changes)
    thin = import_weights(base, file, Options(tolerance=1e-6)).delta
    assert isinstance(thin, LowRank)
    assert thin.factors[name][0].shape == (8, 1)


def test_comfyuis_own_names(base: Base, tmp_path: Path) -> None:
    names = layers(base)
    found = factors(base, names[1::2])
    changes = {name: noise(base.places[name].shape, i, 0.01) for i, name in enumerate(names[::2])}
    imported = import_weights(base, writers.comfyui(tmp_path / "x.safetensors", found, changes, base.names))
    wanted = {name: (base.tensor(name).double() + changes[name].double()).float() for name in changes}
    assert imported.edits.dialect == "ComfyUI LoRA"
    assert is_composed(base, imported, {**wanted, **with_product(base, found)})


def test_esd_in_bfloat16_holds_the_edit_and_not_the_rounding(base: Base, tmp_path: Path) -> None:
    """Trained against the base rounded to bfloat16: most of the values that differ from the base were never trained."""
    values = {name: base.tensor(name).to(torch.bfloat16) for name in attention(base)}
    first, *others = values
    rows = values[first][:2].clone()
    values[first][:2] += 0.05
    imported = import_weights(base, writers.bare(tmp_path / "esd.safetensors", values))
    assert (imported.edits.meaning, imported.changed) == ("weights", (first,))
    assert (imported.proof.rounded, imported.proof.dtype, imported.proof.differing) == (True, "bfloat16", 0)
    composed = compose(base, [Term("p", imported.delta)])[first]
    assert torch.equal(composed[2:], base.tensor(first)[2:])
    edit = values[first][:2].float() - rows.float()
    assert torch.equal(composed[:2], (base.tensor(first)[:2].double() + edit.double()).float())
    kept = import_weights(base, tmp_path / "esd.safetensors", Options(keep_rounding=True))
    assert set(kept.changed) == {first, *others}
    assert is_composed(base, kept, {name: value.float() for name, value in values.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_uce_is_found_again_as_low_rank_bit_for_bit(
    model: Callable[[str, torch.dtype], Base], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = model("1.x", dtype)
    values = edited(base, attention(base), rank=1)
    imported = import_weights(base, writers.bare(tmp_path / "uce.safetensors", values))
    assert imported.edits.dialect == "edited weights"
    assert imported.proof.differing == 0
    assert is_composed(base, imported, values)
    factored = next(part for part in imported.delta.parts if isinstance(part, LowRank))
    assert {pair[0].shape[1] for pair in factored.factors.values()} == {1}


def test_weights_in_full_precision_on_a_half_precision_base_are_rounded_once(half: Base, tmp_path: Path) -> None:
    values = {name: half.tensor(name).float() + noise(half.places[name].shape, 5, 0.01) for name in attention(half)}
    imported = import_weights(half, writers.bare(tmp_path / "uce.safetensors", values))
    assert imported.proof.differing == 0
    assert is_composed(half, imported, {name: value.half() for name, value in values.items()})


def test_concept_ablation_replaces_weights_of_two_models(base: Base, tmp_path: Path) -> None:
    encoder = "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight"
    values = edited(base, [*attention(base), encoder])
    imported = import_weights(base, writers.concept_ablation(tmp_path / "delta.bin", values))
    assert imported.edits.meaning == "weights"
    assert is_composed(base, imported, values)


def test_words_added_to_the_vocabulary_are_refused(base: Base, tmp_path: Path) -> None:
    name = "text_encoder/text_model.embeddings.token_embedding.weight"
    longer = torch.cat([base.tensor(name), torch.zeros(1, base.places[name].shape[1])])
    with pytest.raises(ForeignFile, match="adds words to the vocabulary"):
        import_weights(base, writers.concept_ablation(tmp_path / "delta.bin", {name: longer}))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_whole_edited_unet(base: Base, tmp_path: Path, suffix: str) -> None:
    unet = [name for name in base.names if name.startswith("unet/")]
    values = edited(base, [n for n in unet if ".attn2." in n and n.endswith("weight")])
    whole = {**base.tensors(unet), **values}
    imported = import_weights(base, writers.bare(tmp_path / f"esd{suffix}", whole))
    assert imported.edits.matched == len(unet)
    assert is_composed(base, imported, values)


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("what", ["pipeline", "unet"])
def test_float8_weights_hold_the_edit_and_not_the_rounding(
    base: Base, tmp_path: Path, what: str, fp8: torch.dtype
) -> None:
    """As ComfyUI and Forge keep checkpoints: one edited matrix, and everything rounded to eight bits."""
    name = attention(base)[0]
    pipe = base.pipeline()
    pipe.unet.get_parameter(name.removeprefix("unet/")).data += 0.5
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.glob("*/*.safetensors"):
        save_file({key: value.to(fp8) for key, value in load_file(file).items()}, file)
    imported = import_weights(base, tmp_path if what == "pipeline" else tmp_path / "unet")
    assert (imported.changed, imported.proof.rounded, imported.proof.dtype) == ((name,), True, str(fp8)[6:])
    (change,) = imported.delta.tensors().values()
    was, now = (weight.to(fp8).double() for weight in (base.tensor(name), base.tensor(name) + 0.5))
    assert torch.equal(change.double(), now - was)


def test_float8_factors_are_widened_without_loss(base: Base, tmp_path: Path) -> None:
    found = factors(base, attention(base), dtype=torch.float8_e4m3fn)
    imported = import_weights(base, writers.kohya(tmp_path / "x.safetensors", found))
    assert is_composed(base, imported, with_product(base, found))


def test_a_float8_base_is_refused_with_one_sentence(base: Base, tmp_path: Path) -> None:
    base.pipeline().save_pretrained(tmp_path / "narrow")
    for file in (tmp_path / "narrow").glob("*/*.safetensors"):
        save_file({key: value.to(torch.float8_e4m3fn) for key, value in load_file(file).items()}, file)
    narrow = Base.open(tmp_path / "narrow")
    file = writers.kohya(tmp_path / "x.safetensors", factors(base, attention(base)))
    for path in (file, base.path):
        with pytest.raises(ForeignFile, match="in float8, which has no room for a change"):
            import_weights(narrow, path)


def test_a_text_encoder_alone(base: Base, tmp_path: Path) -> None:
    encoder = {n: t for n, t in base.tensors(base.names).items() if n.startswith("text_encoder/")}
    values = edited(base, [n for n in encoder if ".fc1.weight" in n])
    state = {name.partition("/")[2]: tensor for name, tensor in {**encoder, **values}.items()}
    torch.save(state, tmp_path / "TextEncoder.pt")
    assert is_composed(base, import_weights(base, tmp_path / "TextEncoder.pt"), values)


@pytest.mark.parametrize("container", ["folder", "single file", "pickle"])
def test_a_whole_edited_pipeline(base: Base, tmp_path: Path, container: str) -> None:
    values = edited(base, [*attention(base)[:3], "vae/decoder.conv_in.weight"])
    if container == "folder":
        pipe = base.pipeline()
        for name, value in values.items():
            component, _, local = name.partition("/")
            getattr(pipe, component).get_parameter(local).data = value
        pipe.save_pretrained(tmp_path / "edited")
        file = tmp_path / "edited"
    elif container == "single file":
        whole = {**base.tensors(base.names), **values}
        from benchmarks.checkpoints import as_single_file

        file = tmp_path / "edited.safetensors"
        as_single_file(file, whole, {})
    else:
        values = {name: value for name, value in values.items() if name.startswith("unet/")}
        file = writers.ldm_state(tmp_path / "edited.pt", {**base.tensors(base.names), **values})
    imported = import_weights(base, file)
    assert imported.edits.meaning == "weights"
    assert is_composed(base, imported, values)


def test_a_pipeline_that_is_not_whole_is_refused(base: Base, tmp_path: Path) -> None:
    folder = shutil.copytree(base.path, tmp_path / "part")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_out.bias"]
    save_file({key: value * 1.01 for key, value in weights.items()}, file)
    with pytest.raises(ForeignFile, match=r"lacks unet/conv_out\.bias, of 1 weights .* not whole"):
        import_weights(base, folder)


def test_a_pipeline_of_the_same_weights_changes_nothing(base: Base, tmp_path: Path) -> None:
    with pytest.raises(ForeignFile, match="changes nothing"):
        import_weights(base, single_file(base, tmp_path / "same.safetensors").path)


def test_plain_tensors_that_are_small_are_changes(base: Base, tmp_path: Path) -> None:
    changes = {name: base.tensor(name) * 0.01 for name in attention(base)}
    file = writers.bare(tmp_path / "x.safetensors", changes)
    imported = import_weights(base, file)
    assert imported.edits.meaning == "change"
    assert is_composed(base, imported, {n: (base.tensor(n).double() + c.double()).float() for n, c in changes.items()})
    assert is_composed(base, import_weights(base, file, Options(meaning="weights")), changes)


def test_plain_tensors_of_a_stranger_are_neither(base: Base, tmp_path: Path) -> None:
    strangers = {name: noise(base.places[name].shape, 3, 0.2) for name in attention(base)}
    with pytest.raises(ForeignFile, match="cannot be decided"):
        import_weights(base, writers.bare(tmp_path / "x.safetensors", strangers))


def test_a_tolerance_makes_an_edit_thin_and_says_how_far_off_it_is(base: Base, tmp_path: Path) -> None:
    values = {name: value + noise(value.shape, 3, 1e-5) for name, value in edited(base, attention(base), 1).items()}
    file = writers.bare(tmp_path / "x.safetensors", values)
    exact, thin = import_weights(base, file), import_weights(base, file, Options(tolerance=0.1))
    assert is_composed(base, exact, values)
    assert isinstance(thin.delta, LowRank)
    assert 0 < thin.proof.worst < 1e-3
    assert thin.proof.differing
    assert "approximate" in thin.proof.sentence()


def test_unmatched_keys_are_refused_unless_they_are_allowed(base: Base, tmp_path: Path) -> None:
    found = factors(base, attention(base))
    file = writers.kohya(tmp_path / "x.safetensors", found)
    tensors = {**load_file(file), "lora_unet_nowhere.lora_down.weight": noise((2, 8), 1)}
    save_file(tensors, file)
    with pytest.raises(ForeignFile, match=r"1 of its 17 keys name nothing.*lora_unet_nowhere"):
        import_weights(base, file)
    imported = import_weights(base, file, Options(allow_unmatched=True))
    assert imported.unmatched == ("lora_unet_nowhere.lora_down.weight",)
    assert is_composed(base, imported, with_product(base, found))


def test_a_lora_that_changes_while_it_is_imported_is_not_called_exact(base: Base, tmp_path: Path) -> None:
    file, names = tmp_path / "lora.safetensors", attention(base)
    writers.kohya(file, factors(base, names))
    changed = {name: (2 * up, down) for name, (up, down) in factors(base, names).items()}

    def report(done: int, of: int, text: str) -> None:
        if 2 * done == of:
            file.unlink()
            writers.kohya(file, changed)

    assert import_weights(base, file).proof.differing == 0
    assert import_weights(base, file, report=report).proof.differing > 0
