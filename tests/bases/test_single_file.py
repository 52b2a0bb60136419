"""A base in one file: other names, other shapes, the same weights, and so the same fingerprint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import single_file_keys, single_file_shape, stable_diffusion_shapes
from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.layout import Layout, Template, UnknownLayout, layouts
from overpaint.core.errors import NotFound
from tests.checkpoints import extras, rename_weights, shard, single_file


@pytest.fixture
def layout() -> Layout:
    return next(known for known in layouts() if known.name == "stable-diffusion")


def canonical(layout: Layout, keys: list[str]) -> dict[str, str]:
    """What the layout makes of a file's keys."""
    return {
        key: f"{component}/{layout.components[component].canonical(name)}"
        for component, spelling in layout.single_files[0].mappings.items()
        for key, (name,) in spelling.names(keys).items()
    }


def unet_of(levels: int, layers: int, attended: set[int]) -> Any:
    """A U-Net without storage: so many levels, so many layers in each, cross-attention in some."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(8,) * levels,
            layers_per_block=layers,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=8,
            down_block_types=tuple("CrossAttnDownBlock2D" if i in attended else "DownBlock2D" for i in range(levels)),
            up_block_types=tuple(
                "CrossAttnUpBlock2D" if levels - 1 - i in attended else "UpBlock2D" for i in range(levels)
            ),
        )


def test_a_single_file_has_the_fingerprint_of_the_folder(base: Base, tmp_path: Path) -> None:
    one = single_file(base, tmp_path / "one.safetensors")
    assert one.names == base.names
    assert one.fingerprint == base.fingerprint
    for name in base.names:
        assert torch.equal(one.tensor(name), base.tensor(name))
    assert sorted(key for keys in one.unnamed.values() for key in keys) == sorted(extras(base))


def test_a_convolution_is_read_as_the_matrix_it_is(base: Base, tmp_path: Path) -> None:
    one = single_file(base, tmp_path / "one.safetensors")
    name = "vae/encoder.mid_block.attentions.0.to_q.weight"
    stored = load_file(one.path)["first_stage_model.encoder.mid.attn_1.q.weight"]
    assert stored.shape == (*base.tensor(name).shape, 1, 1)
    assert one.tensor(name).shape == base.tensor(name).shape
    assert one.digests([name]) == base.digests([name])


@pytest.mark.parametrize(
    ("levels", "layers", "attended"),
    [(1, 1, {0}), (1, 2, set()), (2, 1, {0}), (2, 3, {1}), (3, 2, {1, 2}), (4, 2, {0, 1, 2}), (5, 1, {0, 4})],
)
def test_unets_of_any_depth_keep_their_names(layout: Layout, levels: int, layers: int, attended: set[int]) -> None:
    model = unet_of(levels, layers, attended)
    names = [f"unet/{name}" for name in model.state_dict()]
    keys = single_file_keys([*names, "vae/decoder.up_blocks.0.x"])
    wanted = {keys[name]: name for name in names}
    assert len(wanted) == len(names)
    assert canonical(layout, list(wanted)) == wanted
    # diffusers' own reading of such a file, a third opinion
    checkpoint = dict.fromkeys(wanted, torch.empty(0))
    theirs = convert_ldm_unet_checkpoint({key: key for key in checkpoint}, dict(model.config))
    assert {f"unet/{name}": key for name, key in theirs.items()} == {name: key for key, name in wanted.items()}


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_decoders_of_any_depth_keep_their_names(layout: Layout, levels: int) -> None:
    with torch.device("meta"):
        model: Any = AutoencoderKL(
            block_out_channels=tuple(4 * (1 + level % 2) for level in range(levels)),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=2,
        )
    shapes = {f"vae/{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    keys = single_file_keys(shapes)
    assert canonical(layout, list(keys.values())) == {key: name for name, key in keys.items()}
    stored = {key: torch.empty(single_file_shape(key, shapes[name]), device="meta") for name, key in keys.items()}
    theirs = convert_ldm_vae_checkpoint(dict(stored), dict(model.config))
    assert {f"vae/{name}": tuple(tensor.shape) for name, tensor in theirs.items()} == shapes


def test_the_true_names_of_stable_diffusion_1_5(layout: Layout) -> None:
    shapes = dict(stable_diffusion_shapes())
    keys = single_file_keys(shapes)
    assert canonical(layout, list(keys.values())) == {key: name for name, key in keys.items()}
    assert sum(key.startswith("model.diffusion_model.") for key in keys.values()) == 686
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_066_235_307
    for key, name in {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": "unet/down_blocks.0.attentions.0."
        "transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": "unet/up_blocks.3.resnets.2.conv_shortcut.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight": "unet/up_blocks.0.upsamplers.0.conv.weight",
        "model.diffusion_model.output_blocks.8.2.conv.bias": "unet/up_blocks.2.upsamplers.0.conv.bias",
        "model.diffusion_model.input_blocks.9.0.op.weight": "unet/down_blocks.2.downsamplers.0.conv.weight",
        "model.diffusion_model.middle_block.2.emb_layers.1.bias": "unet/mid_block.resnets.1.time_emb_proj.bias",
        "first_stage_model.decoder.up.3.block.0.norm1.weight": "vae/decoder.up_blocks.0.resnets.0.norm1.weight",
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": "vae/encoder.down_blocks.1.resnets.0."
        "conv_shortcut.weight",
        "first_stage_model.decoder.mid.attn_1.proj_out.bias": "vae/decoder.mid_block.attentions.0.to_out.0.bias",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": "text_encoder/text_model.encoder."
        "layers.0.mlp.fc1.weight",
    }.items():
        assert keys[name] == key


def test_older_key_names_have_the_fingerprint_of_todays(base: Base, base_folder: Path, tmp_path: Path) -> None:
    """The first published folders call the decoder's attention query, key, value, and store position ids."""
    shutil.copytree(base_folder, tmp_path / "old")
    file = tmp_path / "old/vae/diffusion_pytorch_model.safetensors"
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, tensor in load_file(file).items():
        for new, old in words.items():
            key = key.replace(f".{new}.", f".{old}.")
        tensors[key] = tensor
    save_file(tensors, file)
    text = tmp_path / "old/text_encoder/model.safetensors"
    save_file({**load_file(text), "text_model.embeddings.position_ids": torch.arange(16)[None]}, text)
    assert Base.open(tmp_path / "old").fingerprint == base.fingerprint


def test_shards_and_variants_have_the_fingerprint_of_one_file(base: Base, base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "shards")
    shard(tmp_path / "shards", "unet", 3)
    assert Base.open(tmp_path / "shards").fingerprint == base.fingerprint
    shutil.copytree(base_folder, tmp_path / "fp16")
    rename_weights(tmp_path / "fp16", "fp16")
    half = Base.open(tmp_path / "fp16")
    assert (half.fingerprint, half.variant) == (base.fingerprint, "fp16")
    shard(tmp_path / "fp16", "unet", 2, ".fp16")
    both = Base.open(tmp_path / "fp16")
    assert (both.fingerprint, both.variant) == (base.fingerprint, "fp16")
    assert both.pipeline().unet.dtype == torch.float32


def test_a_single_file_becomes_a_pipeline_with_a_configuration_beside_it(
    base: Base, base_folder: Path, tmp_path: Path
) -> None:
    one = single_file(base, tmp_path / "one.safetensors")
    shutil.copytree(base_folder, tmp_path / "one", ignore=shutil.ignore_patterns("*.safetensors"))
    theirs, ours = one.pipeline(), base.pipeline()
    for part in ("unet", "vae", "text_encoder"):
        wanted = getattr(ours, part).state_dict()
        found = getattr(theirs, part).state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_single_file_without_configuration_is_refused_with_what_it_needs(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overpaint.bases.base.cached", lambda repository: None)
    with pytest.raises(NotFound, match="holds weights alone"):
        single_file(base, tmp_path / "one.safetensors").pipeline()


def test_a_weight_that_is_there_twice_is_refused(base: Base, tmp_path: Path) -> None:
    """One of the two would keep the unpatched value, whichever is patched."""
    weight = "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight"
    twice = {"cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight": base.tensor(weight)}
    with pytest.raises(BrokenBase, match=r"layers\.0\.mlp\.fc1\.weight twice"):
        single_file(base, tmp_path / "one.safetensors", twice)


@pytest.mark.parametrize("name", ["model.bin", "model.onnx", "model"])
def test_a_file_of_another_kind_is_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UnknownLayout, match="is not a checkpoint known here"):
        Base.open(tmp_path / name)


def test_another_architecture_is_named_by_what_it_lacks(tmp_path: Path) -> None:
    """The keys of Stable Diffusion 3, whose text encoders lie elsewhere."""
    keys = ("model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias", "text_encoders.clip_l.x")
    save_file({key: torch.zeros(4) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(UnknownLayout, match=r"known are: .*Stable Diffusion 1\.x .*2\.x ") as caught:
        Base.open(tmp_path / "other.safetensors")
    assert "begin with cond_stage_model.transformer." in str(caught.value)
    assert "docs/adding-a-layout.md" in str(caught.value)


@pytest.mark.parametrize("weight_map", [{}, [], {"a": "../../unet.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}])
def test_an_index_of_shards_that_points_elsewhere_is_refused(
    base_folder: Path, tmp_path: Path, weight_map: Any
) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    (tmp_path / "base/unet/diffusion_pytorch_model.safetensors").unlink()
    index = tmp_path / "base/unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BrokenBase, match="not an index of shards"):
        Base.open(tmp_path / "base")


@pytest.mark.parametrize(
    ("template", "key", "found"),
    [
        ("a.{1+at}.{rest}", "a.3.x.y", {"at": 2, "rest": "x.y"}),
        ("a.{1+at}.{rest}", "a.0.x", None),
        ("a.{i}.b.{j}.{rest}", "a.1.b.2.w", {"i": 1, "j": 2, "rest": "w"}),
        ("a.{i}.{rest}", f"a.{'9' * 5000}.w", None),
        ("a.{i}.{rest}", "a.².w", None),
        ("{side}.x.{rest}", "en.coder.x.w", None),
    ],
)
def test_templates_match_whole_keys_and_count_from_zero(template: str, key: str, found: object) -> None:
    assert Template(template).match(key) == found
