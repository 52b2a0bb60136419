"""Exports say how exact they are, and that is measured; what has no place in a format is refused and leaves nothing."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from overpaint.bases.base import Base
from overpaint.commands.patches import DTYPES, MEANINGS
from overpaint.commands.patches import FORMATS as OFFERED
from overpaint.commands.patches import READERS as TOOLS
from overpaint.core.errors import AlreadyExists
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import LowRank, Sum, TextMap, Xor
from overpaint.patches.formats.dialects import READERS
from overpaint.patches.formats.exporting import FORMATS, ROUNDING, STORED, About, Exported, NotExportable, export
from overpaint.patches.formats.importing import Meaning, import_weights
from tests.patches.formats.models import dense, layers, low_rank, noise, some_terms, text_maps

ABOUT = About("safe", [("aa", "cat", 1.0), ("bb", "dog", 0.5)], "2026-01-31")


def written(base: Base, terms: list[Term], file: Path, format: str = "kohya", **how: object) -> Exported:
    return export(base, terms, file, format, ABOUT, **how)  # type: ignore[arg-type]


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_the_command_line_offers_what_there_is() -> None:
    assert set(OFFERED) == set(FORMATS)
    assert set(TOOLS) == set(READERS)
    assert set(DTYPES) == set(STORED)
    assert set(MEANINGS) == set(Meaning.__args__)  # type: ignore[attr-defined]


def test_a_text_map_becomes_lora_by_its_own_factors(base: Base, tmp_path: Path) -> None:
    (text_map,) = text_maps(base)
    exported = written(base, [Term("aa", text_map)], tmp_path / "x.safetensors")
    tensors = load_file(exported.path)
    name = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    assert torch.equal(tensors[f"{key}.lora_down.weight"], text_map.down.T)
    assert torch.equal(tensors[f"{key}.lora_up.weight"], (base.tensor(name).double() @ text_map.up.double()).float())
    assert tensors[f"{key}.alpha"].shape == ()
    assert float(tensors[f"{key}.alpha"]) == text_map.up.shape[1]
    assert exported.is_exact
    assert 0 < max(exported.errors.values()) <= ROUNDING
    assert exported.sentence().startswith("exact but for the rounding of float32 (max relative error")


def test_an_imported_lora_is_exported_as_it_came(base: Base, tmp_path: Path) -> None:
    delta = low_rank(base, layers(base))
    exported = written(base, [Term("aa", delta)], tmp_path / "x.safetensors")
    assert set(exported.errors.values()) == {0.0}
    assert exported.sentence().startswith("exact: what is stored is the patches' own; 0 of ")
    assert import_weights(base, exported.path).delta == delta


@given(
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 4),
    count=st.integers(1, 5),
    format=st.sampled_from(["kohya", "diffusers"]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_factors_survive_every_round_trip(
    base: Base, tmp_path_factory: pytest.TempPathFactory, seed: int, rank: int, count: int, format: str
) -> None:
    every = layers(base)
    names = [every[(seed + 7 * i) % len(every)] for i in range(count)]
    delta = low_rank(base, sorted(set(names)), rank, seed)
    file = tmp_path_factory.mktemp("trip") / "x.safetensors"
    assert import_weights(base, written(base, [Term("p", delta)], file, format).path).delta == delta


def test_more_directions_than_a_layer_has_are_reduced_without_loss(base: Base, tmp_path: Path) -> None:
    """Twelve patches of three directions on layers of eight rows."""
    terms = [Term(f"{i:02}", text_maps(base, 3, seed=10 * i)[0]) for i in range(12)]
    exported = written(base, terms, tmp_path / "x.safetensors")
    composed = compose(base, terms)
    ranks = {len(tensor) for key, tensor in load_file(exported.path).items() if "lora_down" in key}
    assert ranks == {max(base.places[name].shape[0] for name in composed)}
    assert exported.is_exact


def test_factors_that_nearly_cancel_are_still_exact(base: Base, tmp_path: Path) -> None:
    """Two large patches whose sum is small: stored side by side, rounding would be larger than the rest."""
    (one,) = text_maps(base, 2)
    other = TextMap("text_encoder", -one.up + noise(one.up.shape, 5, 1e-4), one.down)
    exported = written(base, [Term("a", one, 300.0), Term("b", other, 300.0)], tmp_path / "x.safetensors")
    assert exported.is_exact, exported.sentence()


@pytest.mark.parametrize(("dtype", "least"), [("float16", 2**-14), ("bfloat16", 2**-11)])
def test_half_precision_is_approximate_and_says_by_how_much(
    base: Base, tmp_path: Path, dtype: str, least: float
) -> None:
    terms = some_terms(base)
    exported = written(base, terms, tmp_path / "x.safetensors", dtype=dtype)
    composed, tensors = compose(base, terms), load_file(exported.path)
    assert not exported.is_exact
    name = max(exported.errors, key=lambda each: exported.errors[each])
    assert least / 8 < exported.errors[name] < least * 8
    assert f"max relative error {exported.errors[name]:.1e} in {name}" in exported.sentence()
    assert {tensor.dtype for key, tensor in tensors.items() if "lora" in key} >= {STORED[dtype]}
    assert exported.of == sum(tensor.numel() for tensor in composed.values())


def test_the_error_that_is_said_is_the_one_that_readers_get(base: Base, tmp_path: Path) -> None:
    terms = [Term("a", dense(base, layers(base)[:4]))]
    exported = written(base, terms, tmp_path / "x.safetensors", truncate=2)
    composed = compose(base, terms)
    again = compose(base, [Term("b", import_weights(base, exported.path).delta)])
    for name, error in exported.errors.items():
        change = composed[name].double() - base.tensor(name).double()
        apart = float((again[name].double() - composed[name].double()).norm() / change.norm())
        # Both were rounded to the base's float32.
        assert math.isclose(apart, error, rel_tol=1e-3)
        values = torch.linalg.svdvals(terms[0].delta.tensors()[name].double().reshape(len(change), -1))
        best = float(values[2:].norm() / values.norm())
        # Noise, whose directions are nearly equal, is the hardest to cut as well as can be.
        assert best * (1 - 1e-6) < error < best * 1.001


def test_dense_changes_have_no_place_in_a_lora_unless_they_may_be_cut(base: Base, tmp_path: Path) -> None:
    terms = [Term("a", dense(base, layers(base)[:2]))]
    with pytest.raises(NotExportable, match=r"2 of 2 changed tensors have no place in a kohya file.*not of low rank"):
        written(base, terms, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    assert written(base, terms, tmp_path / "x.safetensors", "comfy-diff").is_exact


def test_biases_and_norms_have_a_place_among_differences_alone(base: Base, tmp_path: Path) -> None:
    block = "unet/down_blocks.0.resnets.0."
    terms = [Term("a", dense(base, [f"{block}conv1.bias", f"{block}norm1.weight"]))]
    for format in ("kohya", "diffusers"):
        with pytest.raises(NotExportable, match="changes weights of linear layers"):
            written(base, terms, tmp_path / "x.safetensors", format, truncate=4)
    exported = written(base, terms, tmp_path / "x.safetensors", "comfy-diff")
    tensors = load_file(exported.path)
    start = "lora_unet_down_blocks_0_resnets_0_"
    # Readers take a bias beside a weight only, and a norm's two together.
    assert set(tensors) == {
        f"{start}conv1.diff",
        f"{start}conv1.diff_b",
        f"{start}norm1.w_norm",
        f"{start}norm1.b_norm",
    }
    assert not tensors[f"{start}conv1.diff"].any()
    composed = compose(base, terms)
    again = compose(base, [Term("b", import_weights(base, exported.path).delta)])
    assert all(torch.equal(again[name], composed[name]) for name in composed)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfy-diff"])
def test_what_no_reader_knows_is_refused(base: Base, tmp_path: Path, format: str) -> None:
    for name in ("vae/decoder.conv_in.weight", "text_encoder/text_model.embeddings.token_embedding.weight"):
        with pytest.raises(NotExportable, match="no reader of this format has a name for it"):
            written(base, [Term("a", dense(base, [name]))], tmp_path / "x.safetensors", format, truncate=1)
        assert not list(tmp_path.iterdir())


def test_thin_changes_stay_thin_in_a_file_of_differences(base: Base, tmp_path: Path) -> None:
    first, second, *_ = layers(base)
    terms = [Term("a", Sum((low_rank(base, [first]), dense(base, [second]))))]
    keys = set(load_file(written(base, terms, tmp_path / "x.safetensors", "comfy-diff").path))
    assert {key.partition(".")[2] for key in keys} == {"lora_down.weight", "lora_up.weight", "alpha", "diff"}


def test_residual_bits_are_exact_among_differences(half: Base, tmp_path: Path) -> None:
    name = layers(half)[0]
    bits = Xor({name: (torch.tensor([1, 5], dtype=torch.int32), torch.tensor([3, 1], dtype=torch.int16))})
    terms = [Term("a", Sum((low_rank(half, [name]), bits)))]
    exported = written(half, terms, tmp_path / "x.safetensors", "comfy-diff")
    assert exported.differing == 0
    again = compose(half, [Term("b", import_weights(half, exported.path).delta)])
    assert torch.equal(again[name], compose(half, terms)[name])


def test_full_weights_are_the_composition_bit_for_bit(half: Base, tmp_path: Path) -> None:
    terms = [*some_terms(half), Term("dd", dense(half, ["vae/decoder.conv_in.weight"]))]
    exported = written(half, terms, tmp_path / "x.safetensors", "full")
    composed, tensors = compose(half, terms), load_file(exported.path)
    assert (exported.differing, set(exported.errors.values())) == (0, {0.0})
    spelled = {
        name: name.removeprefix("unet/").replace("vae/", "vae.").replace("encoder/", "encoder.") for name in composed
    }
    assert set(tensors) == set(spelled.values())
    assert all(torch.equal(tensors[key], composed[name]) for name, key in spelled.items())


@pytest.mark.parametrize("format", list(FORMATS))
def test_the_same_patches_give_the_same_bytes(base: Base, tmp_path: Path, format: str) -> None:
    terms = some_terms(base)
    one = written(base, terms, tmp_path / "1.safetensors", format).path.read_bytes()
    other = written(base, terms[::-1], tmp_path / "2.safetensors", format).path.read_bytes()
    assert one == other


def test_the_header_has_what_user_interfaces_read(
    base: Base, model: Callable[[str, torch.dtype], Base], tmp_path: Path
) -> None:
    exported = written(base, some_terms(base), tmp_path / "x.safetensors")
    found = metadata(exported.path)
    assert found["ss_network_module"] == "networks.lora"
    assert found["ss_network_dim"] == found["ss_network_alpha"]
    assert found["ss_output_name"] == found["modelspec.title"] == "safe"
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (found["ss_base_model_version"], found["ss_v2"]) == ("sd_v1", "False")
    assert "cat, dog" in found["modelspec.description"]
    assert found["modelspec.date"] == "2026-01-31"
    assert json.loads(found["overpaint.export"])["base"] == base.fingerprint
    blob = exported.path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    digest = hashlib.sha256(blob[8 + length :]).hexdigest()
    assert (found["sshs_model_hash"], found["modelspec.hash_sha256"]) == (digest, f"0x{digest}")
    keys = re.findall(rb'"((?:ss|sshs|modelspec|overpaint)[^"]*)":', blob[8 : 8 + length].split(b"}", 1)[0])
    assert keys == sorted(keys)
    xl = model("XL", torch.float32)
    found = metadata(written(xl, [Term("a", text_maps(xl)[0])], tmp_path / "xl.safetensors").path)
    assert found["ss_base_model_version"].startswith("sdxl_")
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_text_maps_of_xl_reach_their_own_columns_alone(
    model: Callable[[str, torch.dtype], Base], tmp_path: Path
) -> None:
    xl = model("XL", torch.float32)
    second = text_maps(xl)[1]
    tensors = load_file(written(xl, [Term("a", second)], tmp_path / "x.safetensors").path)
    downs = [tensor for key, tensor in tensors.items() if "attn2_to_k.lora_down" in key]
    assert downs
    columns = xl.columns(second.encoder, xl.projections(second.encoder)[0])
    assert all(not down[:, : columns.start].any() and bool(down[:, columns].any()) for down in downs)


def test_mistakes_leave_nothing_behind(base: Base, tmp_path: Path) -> None:
    terms = [Term("a", low_rank(base, layers(base)[:1]))]
    file = tmp_path / "x.safetensors"
    mistakes: list[tuple[Callable[[], object], str]] = [
        (lambda: written(base, terms, file, "gguf"), "unknown format 'gguf'; known are kohya"),
        (lambda: written(base, terms, tmp_path / "x.bin"), "let its name end in .safetensors"),
        (lambda: written(base, terms, file, dtype="float8"), "stored as float32"),
        (lambda: written(base, terms, file, truncate=0), "one direction or more"),
        (lambda: written(base, [], file), "nothing to export"),
        (lambda: written(base, [Term("a", terms[0].delta, 0.0)], file), "nothing to export"),
        (lambda: written(base, [Term("a", LowRank(terms[0].delta.factors), 1e7)], file, dtype="float16"), "too large"),  # type: ignore[attr-defined]
    ]
    for mistake, message in mistakes:
        with pytest.raises(NotExportable, match=message):
            mistake()
    assert not list(tmp_path.iterdir())
    file.write_text("mine")
    with pytest.raises(AlreadyExists):
        written(base, terms, file)
    assert file.read_text() == "mine"


def test_factors_of_a_patch_are_exported_without_reading_the_base(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every layer of Stable Diffusion 1.5, reading and composing took a minute and a half."""
    first = layers(base)[0]
    reads: list[str] = []
    read = Base.tensor

    def counted(self: Base, name: str) -> torch.Tensor:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(Base, "tensor", counted)
    names = [name for name in layers(base) if min(base.places[name].shape[:2]) >= 2]
    exported = written(base, [Term("a", low_rank(base, names))], tmp_path / "x.safetensors")
    assert (exported.differing, set(exported.errors.values()), reads) == (0, {0.0}, [])
    assert exported.of == sum(math.prod(base.places[name].shape) for name in names)
    imported = import_weights(base, exported.path)
    assert (imported.proof.of, imported.proof.differing) == (exported.of, 0)
    # Once, to see that the base has room for what the file adds.
    assert sorted(set(reads)) == sorted(names)
    assert max(reads.count(name) for name in names) == reads.count(first) == 1
