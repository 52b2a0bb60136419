"""A base built in the other container: the same weights in the spelling that other programs read, and back again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from overpaint.bases.base import Base
from overpaint.bases.layout import layouts
from overpaint.cli import main
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.patches.build import NotConvertible, build, converted
from overpaint.patches.compose import Term, compose, composition_digest
from overpaint.patches.delta import Dense, TextMap
from overpaint.patches.inspect import inspect
from tests.bases.containers import ARCHITECTURES, architecture_of, folder_of, single_file_tensors
from tests.bases.containers import converted as written

UNREAD = ("position_ids", "logit_scale", "alphas_cumprod", ".resblocks.23.")
"""What published single files hold though no pipeline reads it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each architecture. Tests do not write into them."""
    root = tmp_path_factory.mktemp("folders")
    return {name: folder_of(name, root / name) for name in ARCHITECTURES}


def without_weights(folder: Path, target: Path) -> None:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))


def a_change(base: Base) -> Term:
    """Cross-attention, and a tensor that OpenCLIP stacks."""
    name = "text_encoder/text_model.encoder.layers.1.self_attn.v_proj.weight"
    text_input = base.text_inputs[0]
    columns = base.columns(text_input, base.projections(text_input)[0])
    width = columns.stop - columns.start
    maps = TextMap(text_input, torch.full((width, 1), 0.1), torch.full((width, 1), 0.2))
    return Term("a" * 64, maps + Dense({name: torch.ones(base.places[name].shape)}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_becomes_the_single_file_that_is_published(
    folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    """Key by key, shape by shape, as the tests write such files on their own."""
    base = Base.open(folders[architecture])
    built = build(base, [], tmp_path / "one.safetensors", form="single-file")
    one, wanted = load_file(built.path), single_file_tensors(base)
    left = {key for key in wanted if any(word in key for word in UNREAD)} | (
        {"cond_stage_model.model.text_projection"} if architecture == "2.x" else set()
    )
    assert one.keys() == wanted.keys() - left
    assert all(torch.equal(one[key], wanted[key]) for key in one)
    again = Base.open(built.path)
    assert again.fingerprint == base.fingerprint == built.digest
    assert again.form is not None
    assert architecture in again.form.about
    assert inspect(built.path).sound


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_and_back_is_the_same_base_and_diffusers_draws_with_it(
    folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    base = Base.open(folders[architecture])
    one = build(base, [], tmp_path / "one.safetensors", form="single-file")
    without_weights(base.path, tmp_path / "one")
    back = build(Base.open(one.path), [], tmp_path / "back", form="diffusers", card="# card")
    again = Base.open(back.path)
    assert again.fingerprint == base.fingerprint == back.digest
    assert (back.path / "README.md").read_text() == "# card"
    kind: Any = getattr(diffusers, base.layout.pipelines[0])
    pipe: Any = kind.from_pretrained(back.path, local_files_only=True)
    wanted: Any = base.pipeline()
    for component in base.layout.components:
        ours, theirs = getattr(wanted, component).state_dict(), getattr(pipe, component).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {p.relative_to(base.path) for p in base.path.rglob("*")} | {Path("README.md")} == {
        p.relative_to(back.path) for p in back.path.rglob("*")
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("container", ["shards", "single file", "pickle"])
def test_a_change_is_baked_in_on_the_way(
    folders: dict[str, Path], tmp_path: Path, architecture: str, container: str
) -> None:
    base = Base.open(written(folders[architecture], container, tmp_path / "base"))
    if base.is_single_file:
        without_weights(folders[architecture], tmp_path / "base")
    out, form = (
        (tmp_path / "out", "diffusers") if base.is_single_file else (tmp_path / "out.safetensors", "single-file")
    )
    built = build(base, [a_change(base)], out, form=form, record={"recipe": "r"})  # type: ignore[arg-type]
    wanted, again = compose(base, [a_change(base)]), Base.open(built.path)
    assert again.is_single_file != base.is_single_file
    assert again.names == base.names
    for name in base.names:
        assert torch.equal(again.tensor(name), wanted.get(name, base.tensor(name))), name
    assert again.fingerprint == built.digest == composition_digest(base, wanted)
    assert architecture_of(again) == architecture
    found = inspect(built.path)
    assert (found.sound, found.facts["recipe"]) == (True, "r")
    two = build(base, [a_change(base)], out.with_name(f"two{out.suffix}"), form=form, record={"recipe": "r"})  # type: ignore[arg-type]
    ours, twins = (sorted(p for p in path.rglob("*") if p.is_file()) or [path] for path in (built.path, two.path))
    assert [a.read_bytes() for a in ours] == [b.read_bytes() for b in twins]


def test_its_own_form_is_an_ordinary_build(base: Base, tmp_path: Path) -> None:
    built = build(base, [], tmp_path / "same", form="diffusers")
    assert (tmp_path / "same/vae/config.json").read_bytes() == (base.path / "vae/config.json").read_bytes()
    assert built.left_out == ()


def test_what_has_no_place_in_the_other_container_is_reported(folders: dict[str, Path], tmp_path: Path) -> None:
    one = Base.open(written(folders["1.x"], "single file", tmp_path / "one"))
    without_weights(folders["1.x"], tmp_path / "one")
    reports: list[str] = []
    built = build(one, [], tmp_path / "folder", form="diffusers", notice=reports.append)
    assert set(built.left_out) == set(one.unnamed[one.path])
    assert [text.startswith("left out 2 tensors") for text in reports] == [True]
    reports.clear()
    assert (
        build(Base.open(built.path), [], tmp_path / "x.safetensors", form="single-file", notice=reports.append).left_out
        == ()
    )
    assert ["configuration" in text for text in reports] == [True]


@pytest.mark.parametrize(
    ("architecture", "missing"), [("2.x", ["resblocks.23", "text_projection", "logit_scale"]), ("XL", ["logit_scale"])]
)
def test_what_published_single_files_hold_besides_is_named(
    folders: dict[str, Path], tmp_path: Path, architecture: str, missing: list[str]
) -> None:
    """Of a folder it cannot be made; ComfyUI warns that it is not there."""
    reports: list[str] = []
    base = Base.open(folders[architecture])
    built = build(base, [], tmp_path / "x.safetensors", form="single-file", notice=reports.append)
    keys = load_file(built.path)
    assert all(word in reports[0] for word in missing)
    assert not any(key.endswith(tuple(missing)) or ".resblocks.23." in key for key in keys)
    reports.clear()
    build(Base.open(built.path), [], tmp_path / "same.safetensors", notice=reports.append)
    assert reports == []


def test_a_safety_checker_that_is_not_there_leaves_the_index(folders: dict[str, Path], tmp_path: Path) -> None:
    one = Base.open(written(folders["1.x"], "single file", tmp_path / "one"))
    without_weights(folders["1.x"], tmp_path / "one")
    index = json.loads((tmp_path / "one/model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    (tmp_path / "one/model_index.json").write_text(json.dumps(index))
    (tmp_path / "one/safety_checker").mkdir()
    (tmp_path / "one/safety_checker/config.json").write_text("{}")
    built = build(one, [], tmp_path / "folder", form="diffusers")
    after = json.loads((built.path / "model_index.json").read_text())
    assert (after["safety_checker"], after["requires_safety_checker"]) == ([None, None], False)
    assert after["unet"] == index["unet"]
    assert not (built.path / "safety_checker").exists()


def test_a_single_file_without_configuration_cannot_become_a_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overpaint.bases.base.cached", lambda repository: None)
    one = Base.open(written(folders["1.x"], "single file", tmp_path / "one"))
    with pytest.raises(NotFound, match="holds weights alone"):
        build(one, [], tmp_path / "folder", form="diffusers")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("name", "form", "error"),
    [("x", "single-file", OverpaintError), ("mine.safetensors", "single-file", AlreadyExists)],
)
def test_a_name_that_does_not_fit_leaves_nothing(
    base: Base, tmp_path: Path, name: str, form: Any, error: type[OverpaintError]
) -> None:
    (tmp_path / "mine.safetensors").write_text("precious")
    with pytest.raises(error, match=r"\.safetensors"):
        build(base, [], tmp_path / name, form=form)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["precious"]


def test_a_tensor_without_a_place_there_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Rather than left out: a checkpoint that lacks a weight draws noise."""
    shutil.copytree(folders["XL"], tmp_path / "odd")
    file = tmp_path / "odd/text_encoder_2/model.safetensors"
    save_file({**load_file(file), "text_model.novelty.weight": torch.zeros(3)}, file)
    base = Base.open(tmp_path / "odd")
    with pytest.raises(
        NotConvertible, match=r"text_encoder_2/text_model\.novelty\.weight .*has no place in a single-file"
    ):
        build(base, [], tmp_path / "x.safetensors", form="single-file")
    assert not (tmp_path / "x.safetensors").exists()


def test_the_way_back_is_that_of_the_layout(folders: dict[str, Path]) -> None:
    """The converted base is read by the layout's own rules, so that a wrong key would show as a missing tensor."""
    for path in folders.values():
        base = Base.open(path)
        view = converted(base, "single-file")
        assert view.layout in layouts()
        assert view.names == base.names
        assert view.fingerprint == base.fingerprint


def test_the_command_converts(base_folder: Path, tmp_path: Path) -> None:
    words = ["--registry", str(tmp_path / "registry")]
    for rest in (
        ["base", "add", "tiny", str(base_folder)],
        ["recipe", "create", "empty", "--base", "tiny"],
        ["build", "empty", str(tmp_path / "one.safetensors"), "--format", "single-file"],
    ):
        ran = CliRunner().invoke(main, [*words, *rest], catch_exceptions=False)
        assert ran.exit_code == 0, ran.output
    assert Base.open(tmp_path / "one.safetensors").fingerprint == Base.open(base_folder).fingerprint
