"""A file of another program with a recipe baked in: what changes in it, what stays, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.safetensors_file import BrokenFile, SafetensorsFile
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.patches.build import build, read_record
from overpaint.patches.compose import Term, compose, composition_digest
from overpaint.patches.delta import BadDelta, Dense
from overpaint.patches.model_file import OtherModel, build_file
from tests.bases.tiny_transformers import tiny_transformer

SEQUENCE, POOLED = "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"


def as_published(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tiny FLUX.1's tensors as its own code names, fuses and turns them."""

    def fused(into: str, *parts: str) -> dict[str, Tensor]:
        return {
            f"{into}.{kind}": torch.cat([values[f"{part}.{kind}"] for part in parts]) for kind in ("weight", "bias")
        }

    double, single = "transformer_blocks.0.", "single_transformer_blocks.0."
    published = {
        **fused("txt_in", "context_embedder"),
        **fused("img_in", "x_embedder"),
        **fused("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        **fused("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        **fused("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        **fused("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        **fused("double_blocks.0.img_attn.qkv", *(f"{double}attn.to_{each}" for each in "qkv")),
        **fused("double_blocks.0.txt_attn.qkv", *(f"{double}attn.add_{each}_proj" for each in "qkv")),
        **fused("double_blocks.0.img_attn.proj", f"{double}attn.to_out.0"),
        **fused("double_blocks.0.txt_attn.proj", f"{double}attn.to_add_out"),
        **fused("double_blocks.0.img_mlp.0", f"{double}ff.net.0.proj"),
        **fused("double_blocks.0.img_mlp.2", f"{double}ff.net.2"),
        **fused("double_blocks.0.txt_mlp.0", f"{double}ff_context.net.0.proj"),
        **fused("double_blocks.0.txt_mlp.2", f"{double}ff_context.net.2"),
        **fused("double_blocks.0.img_mod.lin", f"{double}norm1.linear"),
        **fused("double_blocks.0.txt_mod.lin", f"{double}norm1_context.linear"),
        **fused("single_blocks.0.linear1", *(f"{single}attn.to_{each}" for each in "qkv"), f"{single}proj_mlp"),
        **fused("single_blocks.0.linear2", f"{single}proj_out"),
        **fused("single_blocks.0.modulation.lin", f"{single}norm.linear"),
        **fused("final_layer.linear", "proj_out"),
    }
    for into, part in (("img_attn", "attn.norm_"), ("txt_attn", "attn.norm_added_")):
        for each, kind in (("query", "q"), ("key", "k")):
            published[f"double_blocks.0.{into}.norm.{each}_norm.scale"] = values[f"{double}{part}{kind}.weight"]
    for each, kind in (("query", "q"), ("key", "k")):
        published[f"single_blocks.0.norm.{each}_norm.scale"] = values[f"{single}attn.norm_{kind}.weight"]
    for kind in ("weight", "bias"):
        scale, shift = values[f"norm_out.linear.{kind}"].chunk(2)
        published[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    return published


@pytest.fixture(scope="module")
def transformer(flux: Base) -> dict[str, Tensor]:
    [file] = (flux.path / "transformer").glob("*.safetensors")
    return load_file(file)


def expected(flux: Base, term: Term) -> dict[str, Tensor]:
    return {name.removeprefix("transformer/"): value for name, value in compose(flux, [term]).items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_in_the_models_own_names_holds_the_composed_weights(
    flux: Base, term: Term, transformer: dict[str, Tensor], tmp_path: Path, prefix: str
) -> None:
    published = {f"{prefix}{key}": value.contiguous() for key, value in as_published(transformer).items()}
    save_file({**published, "vae.decoder.bias": torch.ones(3)}, tmp_path / "flux.safetensors", {"format": "pt"})
    built = build_file(flux, [term], tmp_path / "flux.safetensors", tmp_path / "safe.safetensors")
    assert built.digest == composition_digest(flux, compose(flux, [term]))
    there = load_file(built.path)
    changed = {key for key in there if not torch.equal(there[key], load_file(tmp_path / "flux.safetensors")[key])}
    assert changed == {f"{prefix}txt_in.weight", f"{prefix}vector_in.in_layer.weight"}
    # diffusers' own converter knows only FLUX.1's true width, so the published form of the composed weights is made here.
    wanted = as_published({**transformer, **expected(flux, term)})
    assert all(torch.equal(there[f"{prefix}{key}"], value) for key, value in wanted.items())


def test_the_names_of_diffusers_are_found_too_and_the_header_says_what_was_done(
    flux: Base, term: Term, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(transformer, tmp_path / "one.safetensors", {"format": "pt", "title": "mine"})
    built = build_file(
        flux, [term], tmp_path / "one.safetensors", tmp_path / "two.safetensors", record={"recipe": "safe"}
    )
    assert torch.equal(load_file(built.path)[SEQUENCE], expected(flux, term)[SEQUENCE])
    with safe_open(built.path, "pt") as file:
        metadata = file.metadata()
    assert metadata["title"] == "mine"
    assert '"recipe":"safe"' in metadata["overpaint"].replace(" ", "")


def test_a_narrower_file_of_the_same_model_gets_the_composition_rounded_to_it(
    flux: Base, term: Term, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file({key: value.bfloat16() for key, value in transformer.items()}, tmp_path / "one.safetensors")
    notices: list[str] = []
    built = build_file(flux, [term], tmp_path / "one.safetensors", tmp_path / "two.safetensors", notice=notices.append)
    assert torch.equal(load_file(built.path)[POOLED], expected(flux, term)[POOLED].bfloat16())
    assert notices == ["one.safetensors is in BF16: what was composed on the base is rounded to that"]


def test_nothing_applied_is_the_file_byte_for_byte(flux: Base, transformer: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(transformer, tmp_path / "one.safetensors")
    built = build_file(flux, [], tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert built.path.read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert built.digest == flux.fingerprint


def gguf_file(path: Path, values: dict[str, Tensor], quantised: frozenset[str] = frozenset()) -> Path:
    """The published form as GGUF: what reads the prompt whole, as converters leave it, the rest in eight bits where it may."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "flux")
    for key, value in as_published(values).items():
        array = value.float().numpy()
        if key in quantised or (key.endswith("qkv.weight") and array.shape[-1] % 32 == 0):
            kind = gguf.GGMLQuantizationType.Q8_0
            array = np.pad(array, ((0, 0), (0, -array.shape[-1] % 32)))
            writer.add_tensor(key, gguf.quants.quantize(array, kind), raw_dtype=kind)
        elif key == "txt_in.weight":
            raw = value.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(key, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_of_a_gguf_file_only_what_reads_the_prompt_is_written_anew(
    flux: Base, term: Term, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    original = gguf_file(tmp_path / "flux.gguf", transformer)
    built = build_file(flux, [term], original, tmp_path / "safe.gguf")
    before, after = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (original, built.path))
    assert len(before) > 20
    assert {k for k in after if bytes(before[k].data) != bytes(after[k].data)} == {
        "txt_in.weight",
        "vector_in.in_layer.weight",
    }
    wanted = expected(flux, term)
    assert np.array_equal(after["vector_in.in_layer.weight"].data, wanted[POOLED].float().numpy())
    sequence = torch.from_numpy(np.array(after["txt_in.weight"].data)).view(torch.bfloat16)
    assert torch.equal(sequence.reshape(wanted[SEQUENCE].shape), wanted[SEQUENCE].bfloat16())


def test_what_cannot_be_exact_is_refused_and_nothing_is_written(
    flux: Base, term: Term, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    original = tmp_path / "one.safetensors"
    save_file(as_published(transformer), original)
    other = tmp_path / "other.safetensors"
    save_file({**as_published(transformer), "txt_in.weight": transformer[SEQUENCE] + 1}, other)
    narrow = tmp_path / "narrow.safetensors"
    save_file({**as_published(transformer), "txt_in.weight": transformer[SEQUENCE].to(torch.float8_e4m3fn)}, narrow)
    wide = tmp_path / "wide.safetensors"
    save_file({**as_published(transformer), "txt_in.weight": transformer[SEQUENCE][:, :8].contiguous()}, wide)
    quantised = gguf_file(tmp_path / "quantised.gguf", transformer, frozenset({"txt_in.weight"}))
    (tmp_path / "broken.gguf").write_bytes(quantised.read_bytes()[:100])
    header = bytearray(gguf_file(tmp_path / "overlapping.gguf", transformer).read_bytes())
    at = header.index(b"img_in.weight") + len(b"img_in.weight") + 4 + 2 * 8 + 4
    header[at : at + 8] = bytes(8)  # it begins where the first tensor does
    (tmp_path / "overlapping.gguf").write_bytes(header)
    fused = Term("b", Dense({"transformer/transformer_blocks.0.attn.to_q.weight": torch.ones(16, 16)}))
    encoder = next(name for name in flux.names if name.startswith("text_encoder/") and name.endswith("q_proj.weight"))
    encoders = Term("c", Dense({encoder: torch.ones(flux.places[encoder].shape)}))
    huge = Term("d", Dense({f"transformer/{SEQUENCE}": torch.full(transformer[SEQUENCE].shape, 1e5)}))
    shard = tmp_path / "model-00001-of-00002.safetensors"
    save_file(as_published(transformer), shard)
    halves = tmp_path / "halves.safetensors"
    save_file({key: value.half() for key, value in transformer.items()}, halves)
    cases: list[tuple[Path, Term, type[Exception], str]] = [
        (shard, term, OtherModel, "is one shard of several, a part of the model"),
        (tmp_path / "nowhere.safetensors", term, NotFound, "there is no file .*nowhere"),
        (
            other,
            term,
            OtherModel,
            r"txt_in.weight of other.safetensors is not transformer/context_embedder.weight of the base",
        ),
        (narrow, term, OtherModel, "has txt_in.weight as F8_E4M3, which has no room for a change"),
        (wide, term, OtherModel, "txt_in.weight of wide.safetensors is not"),
        (quantised, term, OtherModel, "has txt_in.weight as Q8_0, which has no room for a change"),
        (tmp_path / "broken.gguf", term, OverpaintError, "broken.gguf is no whole GGUF file"),
        (tmp_path / "overlapping.gguf", term, OverpaintError, "overlaps the tensor before it"),
        (original, fused, OtherModel, "has no tensor of its own for transformer/transformer_blocks.0.attn.to_q.weight"),
        (original, encoders, OtherModel, "the patches change text_encoder, and only a denoiser"),
        (halves, huge, BadDelta, "overflows F16, in which halves.safetensors has it"),
    ]
    for file, some, error, message in cases:
        out = tmp_path / f"out{file.suffix}"
        with pytest.raises(error, match=message):
            build_file(flux, [some], file, out)
        assert not out.exists()
    with pytest.raises(OverpaintError, match=r"let its name end in \.safetensors, too"):
        build_file(flux, [term], original, tmp_path / "out.gguf")
    with pytest.raises(AlreadyExists):
        build_file(flux, [term], original, other)


def test_a_base_with_two_denoisers_is_built_file_by_file(tmp_path: Path) -> None:
    tiny_transformer("wan").save_pretrained(tmp_path / "wan")
    wan = Base.open(tmp_path / "wan")
    names = {name.partition("/")[0] for text_input in wan.text_inputs for name in wan.projections(text_input)}
    if len(names) < 2:
        pytest.skip("the tiny Wan has one transformer")
    delta = Dense(
        {name: torch.full(wan.places[name].shape, 0.5) for t in wan.text_inputs for name in wan.projections(t)}
    )
    for component in sorted(names):
        [file] = (wan.path / component).glob("*.safetensors")
        notices: list[str] = []
        built = build_file(wan, [Term("a", delta)], file, tmp_path / f"{component}.safetensors", notice=notices.append)
        there, before = load_file(built.path), load_file(file)
        changed = {f"{component}/{key}" for key in there if not torch.equal(there[key], before[key])}
        assert changed == {name for name in delta.changes if name.startswith(f"{component}/")}
        [other] = names - {component}
        assert notices == [f"{file.name} is the base's {component}; build its {other} from a file of its own as well"]


def test_a_file_that_would_still_hold_the_unpatched_weights_is_refused(
    flux: Base, term: Term, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    published = as_published(transformer)
    copies = {
        "prefixed": {f"model.diffusion_model.{key}": value.clone() for key, value in published.items()},
        "named": {key: value.clone() for key, value in transformer.items()},
        "averaged": {f"model_ema.{key.replace('.', '')}": value * 1.01 for key, value in published.items()},
    }
    for name, more in copies.items():
        save_file({**published, **more}, tmp_path / f"{name}.safetensors")
        with pytest.raises(OtherModel, match=f"of {name}.safetensors is a second copy of transformer/.* without it"):
            build_file(flux, [term], tmp_path / f"{name}.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_that_was_built_already_is_refused_since_its_patches_would_not_be_in_the_record(
    flux: Base, term: Term, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(transformer, tmp_path / "one.safetensors")
    once = build_file(flux, [term], tmp_path / "one.safetensors", tmp_path / "once.safetensors").path
    other = Term("b", Dense({"transformer/proj_out.weight": torch.ones(transformer["proj_out.weight"].shape)}))
    with pytest.raises(OtherModel, match=r"once.safetensors was built with patches that the base .* does not have"):
        build_file(flux, [other], once, tmp_path / "twice.safetensors")


def test_no_copy_becomes_a_part_of_the_base_or_of_a_file_that_changes(
    flux: Base, term: Term, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    original = tmp_path / "one.safetensors"
    save_file(transformer, original)
    with pytest.raises(OverpaintError, match="is inside the base itself"):
        build_file(flux, [term], original, flux.path / "transformer" / "out.safetensors")

    def touch(done: int, total: int, what: str) -> None:
        original.write_bytes(original.read_bytes())

    with pytest.raises(OverpaintError, match=r"one.safetensors changed while it was read"):
        build_file(flux, [term], original, tmp_path / "out.safetensors", progress=touch)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["safe.ckpt", "safe.gguf", "safe.SAFETENSORS"])
def test_no_folder_is_built_by_the_name_of_a_file(flux: Base, term: Term, tmp_path: Path, name: str) -> None:
    with pytest.raises(
        OverpaintError, match=r"the build is to be a folder: choose a name that does not end in \.\w+, not safe"
    ):
        build(flux, [term], tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["model.ckpt", "model"])
def test_a_file_of_neither_kind_is_refused_by_its_name(flux: Base, term: Term, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\3\4 and more")
    with pytest.raises(OverpaintError, match=r"ends in none of .safetensors, .sft, .gguf"):
        build_file(flux, [term], tmp_path / name, tmp_path / f"out-{name}")
    with pytest.raises(OverpaintError, match=r"a path is a text or a pathlib.Path; got 5"):
        build_file(flux, [term], 5, tmp_path / "out")  # type: ignore[arg-type]


def test_nothing_is_built_from_a_file_that_is_not_the_bases_also_where_nothing_changes(
    flux: Base, term: Term, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    save_file(transformer, tmp_path / "one.safetensors")
    build_file(flux, [term], tmp_path / "one.safetensors", tmp_path / "built.safetensors")
    for name in ("x", "built"):
        for terms in ([], [Term("a", term.delta, 0.0)]):
            with pytest.raises(OtherModel):
                build_file(flux, terms, tmp_path / f"{name}.safetensors", tmp_path / "out.safetensors")


def test_the_record_is_of_the_composition_and_a_wider_file_rounds_nothing(
    flux: Base, term: Term, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    notices: list[str] = []
    steps: list[tuple[int, int]] = []
    for name, dtype in (("narrow", torch.float16), ("wide", torch.float64)):
        save_file({key: value.to(dtype) for key, value in transformer.items()}, tmp_path / f"{name}.safetensors")
        built = build_file(
            flux,
            [term],
            tmp_path / f"{name}.safetensors",
            tmp_path / f"{name}-built.safetensors",
            notice=notices.append,
            progress=lambda done, of, text: steps.append((done, of)),
        )
        record = read_record(SafetensorsFile.open(built.path))
        assert record is not None
        assert record["digest"] == built.digest == composition_digest(flux, compose(flux, [term]))
    assert [notice.split(":")[0] for notice in notices] == ["narrow.safetensors is in F16"]
    assert steps[-1] == (2, 2)


def test_a_file_that_is_cut_short_while_it_is_compared_is_one_sentence(
    flux: Base, term: Term, transformer: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "one.safetensors"
    save_file(transformer, file)
    opened = SafetensorsFile.open(file)
    monkeypatch.setattr(SafetensorsFile, "open", lambda path: opened)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BrokenFile, match="ends early"):
        build_file(flux, [term], file, tmp_path / "two.safetensors")
