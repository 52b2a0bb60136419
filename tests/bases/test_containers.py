"""Whatever container a base comes in, its weights have the same names, the same values and so one fingerprint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.safetensors_file import SafetensorsFile
from overpaint.bases.text_encoder import TextEncoder
from overpaint.patches.build import build
from overpaint.patches.compose import Term, compose, composition_digest
from overpaint.patches.delta import Dense, LowRank, Sum, TextMap
from overpaint.patches.inspect import inspect
from tests.bases.containers import ARCHITECTURES, CONTAINERS, converted, folder_of, single_file_tensors

STACKED = "text_encoder_2/text_model.encoder.layers.1.self_attn.k_proj.weight"
TURNED = "text_encoder_2/text_projection.weight"
FILE_STACKED = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
FILE_TURNED = "conditioner.embedders.1.model.text_projection"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each architecture. Tests do not write into them."""
    root = tmp_path_factory.mktemp("folders")
    return {name: folder_of(name, root / name) for name in ARCHITECTURES}


@pytest.fixture
def xl(folders: dict[str, Path]) -> Base:
    return Base.open(folders["XL"])


@pytest.fixture
def xl_file(folders: dict[str, Path], tmp_path: Path) -> Base:
    return Base.open(converted(folders["XL"], "single file", tmp_path / "xl"))


def a_change(base: Base) -> Term:
    """Something on a stacked matrix, a turned one, and the cross-attention keys and values; always the same."""
    rng = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    delta = Sum(
        (
            Dense({TURNED: values(*base.places[TURNED].shape)}),
            LowRank({STACKED: (values(64, 2), values(2, 64))}),
            TextMap("text_encoder_2", values(64, 1), values(64, 1)),
        )
    )
    return Term("a" * 64, delta)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_model_in_every_container_has_one_fingerprint(
    folders: dict[str, Path], tmp_path: Path, architecture: str, container: str
) -> None:
    base = Base.open(folders[architecture])
    other = Base.open(converted(base.path, container, tmp_path / "other"))
    assert other.layout == base.layout
    assert other.names == base.names
    for name in base.names:
        assert torch.equal(other.tensor(name), base.tensor(name)), name
    assert other.tensors(base.names).keys() == set(base.names)
    assert other.fingerprint == base.fingerprint
    assert other.projections() == base.projections()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_diffusers_reads_the_same_weights_from_a_single_file(
    folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    """Its own rules for such files are a third opinion on ours."""
    base = Base.open(folders[architecture])
    one = Base.open(converted(base.path, "single file", tmp_path / "one"))
    shutil.copytree(base.path, tmp_path / "one", ignore=shutil.ignore_patterns("*.safetensors"))
    theirs, ours = one.pipeline(), base.pipeline()
    for component in base.layout.components:
        wanted, found = getattr(ours, component).state_dict(), getattr(theirs, component).state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), component
    heard = [
        TextEncoder.of(b, text_input=text_input).hidden(["a cat"])
        for b in (one, base)
        for text_input in base.text_inputs
    ]
    assert all(
        torch.equal(a, b) for a, b in zip(heard[: len(base.text_inputs)], heard[len(base.text_inputs) :], strict=True)
    )


def test_what_a_single_file_holds_beyond_the_pipeline_has_no_name(folders: dict[str, Path], tmp_path: Path) -> None:
    one = Base.open(converted(folders["2.x"], "single file", tmp_path / "one"))
    (unnamed,) = one.unnamed.values()
    start = "cond_stage_model.model."
    assert set(unnamed) == {
        "alphas_cumprod",
        f"{start}text_projection",
        f"{start}logit_scale",
        f"{start}transformer.resblocks.23.attn.in_proj_weight",
        f"{start}transformer.resblocks.23.ln_1.weight",
    }


@pytest.mark.parametrize("container", ["single file", "pickle"])
def test_a_build_changes_slices_and_turned_matrices_in_their_places(
    folders: dict[str, Path], tmp_path: Path, container: str
) -> None:
    one = Base.open(converted(folders["XL"], container, tmp_path / "one"))
    built = build(one, [a_change(one)], tmp_path / "safe.safetensors")
    wanted, again = compose(one, [a_change(one)]), Base.open(built.path)
    assert {STACKED, TURNED} < wanted.keys()
    for name in one.names:
        assert torch.equal(again.tensor(name), wanted.get(name, one.tensor(name))), name
    assert again.fingerprint == built.digest == composition_digest(one, wanted)
    assert inspect(built.path).sound
    # In the file's own spelling: only the middle third of the stack differs, and the turned matrix is turned back.
    before, after = single_file_tensors(Base.open(folders["XL"])), load_file(built.path)
    assert before.keys() == after.keys()
    queries, keys, values = after[FILE_STACKED].chunk(3)
    assert torch.equal(queries, before[FILE_STACKED][:64])
    assert torch.equal(keys, wanted[STACKED])
    assert torch.equal(values, before[FILE_STACKED][128:])
    assert torch.equal(after[FILE_TURNED], wanted[TURNED].T)
    changed = {one.places[name].key for name in wanted}
    for key in before.keys() - changed:
        assert torch.equal(before[key], after[key]), key


def test_a_single_file_and_its_folder_build_the_same_weights(xl: Base, xl_file: Base, tmp_path: Path) -> None:
    digests = {
        build(base, [a_change(xl)], tmp_path / name).digest for base, name in ((xl, "f"), (xl_file, "f.safetensors"))
    }
    assert len(digests) == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_choice_of_parts_is_written_and_nothing_beside_them(
    folders: dict[str, Path], tmp_path: Path, data: st.DataObject
) -> None:
    """Queries, keys and values of one stack in any company, weights and biases."""
    file = tmp_path / "xl.safetensors"
    if not file.exists():
        converted(folders["XL"], "single file", tmp_path / "xl")
    base = Base.open(file)
    candidates = [n for n in base.names if n.startswith("text_encoder_2/") and (".layers.1." in n or n == TURNED)]
    chosen = data.draw(st.lists(st.sampled_from(candidates), unique=True, min_size=1))
    out = tmp_path / "out.safetensors"
    out.unlink(missing_ok=True)
    build(base, [Term("a", Dense({name: torch.ones(base.places[name].shape) for name in chosen}))], out)
    again = Base.open(out)
    for name in candidates:
        assert torch.equal(again.tensor(name), base.tensor(name) + (name in chosen)), name
    untouched = set(base.names) - set(chosen)
    assert again.digests(untouched) == base.digests(untouched)


def test_a_build_on_a_pickle_is_a_safetensors_file_also_without_a_change(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    one = Base.open(converted(folders["1.x"], "pickle", tmp_path / "one"))
    built = build(one, [], tmp_path / "safe.safetensors")
    assert built.digest == one.fingerprint == Base.open(built.path).fingerprint
    written, original = load_file(built.path), single_file_tensors(Base.open(folders["1.x"]))
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)


def test_a_pickle_is_described_as_the_base_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    one = Base.open(converted(folders["1.x"], "pickle", tmp_path / "one"))
    found = inspect(one.path)
    assert (found.what, found.facts["form"], found.facts["fingerprint"]) == ("base", "single file", one.fingerprint)


@pytest.mark.parametrize("rows", [191, 2])
def test_a_stack_that_does_not_divide_is_refused(folders: dict[str, Path], tmp_path: Path, rows: int) -> None:
    tensors = single_file_tensors(Base.open(folders["XL"]))
    tensors[FILE_STACKED] = tensors[FILE_STACKED][:rows].contiguous()
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(BrokenBase, match=rf"shape \[{rows}, 64\], which is no stack of 3 tensors"):
        Base.open(tmp_path / "odd.safetensors")


def test_a_copy_of_a_part_of_a_stack_is_left_out(xl_file: Base, tmp_path: Path) -> None:
    """The keys of a stack, kept once more under a name of their own, would still hold what a patch changed."""
    tensors: dict[str, Tensor] = {**load_file(xl_file.path), "teacher.k": xl_file.tensor(STACKED).clone()}
    save_file(tensors, tmp_path / "two.safetensors")
    built = build(Base.open(tmp_path / "two.safetensors"), [a_change(xl_file)], tmp_path / "safe.safetensors")
    assert built.left_out == ("teacher.k",)
    assert "teacher.k" not in SafetensorsFile.open(built.path).entries
