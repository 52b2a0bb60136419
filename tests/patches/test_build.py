"""A built checkpoint: what diffusers loads is the composition, in the form of the base, and all else is as it was."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.safetensors_file import SafetensorsFile
from overpaint.core import atomic
from overpaint.core.errors import AlreadyExists, OverpaintError
from overpaint.patches import build as build_module
from overpaint.patches.build import build, read_record
from overpaint.patches.compose import Term, compose, composition_digest
from overpaint.patches.delta import LowRank, TextMap
from tests.checkpoints import extras, rename_weights, shard, single_file


@pytest.fixture
def terms(base: Base) -> list[Term]:
    """A change to the U-Net's cross-attention and one to a matrix of the text encoder, so to two files of a folder."""
    name = "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight"
    out, width = base.tensor(name).shape
    return [
        Term("b", TextMap("text_encoder", torch.full((64, 1), 0.1), torch.full((64, 1), 0.2)), 0.5),
        Term("a", LowRank({name: (torch.ones(out, 1), torch.ones(1, width))}), -2.0),
    ]


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was made durable, in order; nothing waits for the disk, of which no test can pull the plug."""
    done: list[Path] = []
    monkeypatch.setattr(atomic, "sync", done.append)
    return done


@pytest.fixture(params=["folder", "shards", "fp16", "single file"])
def form(request: pytest.FixtureRequest, base: Base, base_folder: Path, tmp_path: Path) -> Base:
    """The tiny base in each form that a base may have."""
    if request.param == "single file":
        return single_file(base, tmp_path / "base.safetensors")
    shutil.copytree(base_folder, tmp_path / "base")
    if request.param == "shards":
        shard(tmp_path / "base", "unet", 3)
        shard(tmp_path / "base", "text_encoder", 2)
    if request.param == "fp16":
        rename_weights(tmp_path / "base", "fp16")
    return Base.open(tmp_path / "base")


def files(path: Path) -> dict[str, bytes]:
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def name_for(base: Base, name: str) -> str:
    return f"{name}.safetensors" if base.is_single_file else name


def test_every_form_of_base_gives_the_composition_in_its_own_form(
    form: Base, terms: list[Term], tmp_path: Path
) -> None:
    built = build(form, terms, tmp_path / "out" / name_for(form, "safe"), card="# card", record={"recipe": "r"})
    again, wanted = Base.open(built.path), compose(form, terms)
    assert (again.is_single_file, again.variant) == (form.is_single_file, form.variant)
    assert again.names == form.names
    for name in form.names:
        assert torch.equal(again.tensor(name), wanted.get(name, form.tensor(name)))
    assert again.fingerprint == built.digest == composition_digest(form, wanted) != form.fingerprint
    assert built.left_out == ()
    before, after = ({k: c.entries for k, c in base.containers.items()} for base in (form, again))
    assert [list(e) for e in before.values()] == [list(e) for e in after.values()]
    assert [[(x.dtype, x.shape) for x in e.values()] for e in before.values()] == [
        [(x.dtype, x.shape) for x in e.values()] for e in after.values()
    ]


def test_the_safetensors_library_reads_what_was_built(form: Base, terms: list[Term], tmp_path: Path) -> None:
    built = build(form, terms, tmp_path / name_for(form, "safe"))
    for file, container in Base.open(built.path).containers.items():
        with safe_open(file, framework="pt") as reader:
            assert set(reader.keys()) == set(container.entries)
            assert reader.metadata()["format"] == "pt"
            for key in container.entries:
                assert torch.equal(reader.get_tensor(key), container.tensor(key))


def test_plain_diffusers_loads_the_composition(base: Base, terms: list[Term], tmp_path: Path) -> None:
    built = build(base, terms, tmp_path / "safe", card="# card")
    wanted = compose(base, terms)
    pipe: Any = StableDiffusionPipeline.from_pretrained(built.folder)
    loaded = dict(pipe.unet.named_parameters())
    for name in base.projections():
        assert torch.equal(loaded[name.removeprefix("unet/")].detach(), wanted[name].float())


def test_plain_diffusers_loads_a_single_file(base: Base, base_folder: Path, terms: list[Term], tmp_path: Path) -> None:
    built = build(single_file(base, tmp_path / "one.safetensors"), terms, tmp_path / "safe.safetensors")
    wanted = compose(base, terms)
    pipe: Any = StableDiffusionPipeline.from_single_file(
        str(built.path), config=str(base_folder), safety_checker=None, local_files_only=True
    )
    loaded = dict(pipe.unet.named_parameters())
    for name in base.projections():
        assert torch.equal(loaded[name.removeprefix("unet/")].detach(), wanted[name].float())


def test_files_and_tensors_that_no_patch_touches_keep_their_bytes(form: Base, tmp_path: Path) -> None:
    change = [Term("a", TextMap("text_encoder", torch.full((64, 1), 0.1), torch.full((64, 1), 0.2)))]
    built = build(form, change, tmp_path / name_for(form, "safe"))
    changed = {form.places[name].file for name in compose(form, change)}
    if not form.is_single_file:
        before, after = files(form.path), files(built.path)
        assert before.keys() == after.keys()
        for name, blob in before.items():
            assert (after[name] == blob) == (form.path / name not in changed), name
    for file in changed:
        twin = built.path if form.is_single_file else built.path / file.relative_to(form.path)
        old, new = SafetensorsFile.open(file), SafetensorsFile.open(twin)
        assert (new.data_start - old.data_start) % 4096 == 0  # so that whole blocks stay whole
        touched = {form.places[name].key for name in compose(form, change)}
        for key in set(old.entries) - touched:
            assert torch.equal(old.tensor(key), new.tensor(key))


def test_two_builds_have_identical_bytes(form: Base, terms: list[Term], tmp_path: Path) -> None:
    one = build(form, terms, tmp_path / "a" / name_for(form, "one"), card="# card", record={"recipe": "r"})
    again = Base.open(form.path)
    two = build(again, reversed(terms), tmp_path / "b" / name_for(form, "two"), card="# card", record={"recipe": "r"})
    assert list(files(one.path).values()) == list(files(two.path).values())


def test_building_nothing_gives_the_base_byte_for_byte(form: Base, tmp_path: Path) -> None:
    built = build(form, [], tmp_path / name_for(form, "same"))
    assert built.digest == form.fingerprint
    assert list(files(built.path).values()) == list(files(form.path).values())


def test_the_header_says_what_is_in_it(form: Base, terms: list[Term], tmp_path: Path) -> None:
    details = {"recipe": "monday", "patches": [{"id": "b", "concept": "cat", "strength": 9.0}, {"id": "z"}]}
    built = build(form, terms, tmp_path / name_for(form, "safe"), record=details)
    again = Base.open(built.path)
    found = [record for c in again.containers.values() if (record := read_record(c)) is not None]
    assert len(found) == len({form.places[name].file for name in compose(form, terms)})
    recorded = {}
    for record in found:
        assert record["recipe"] == "monday"
        assert (record["base"], record["digest"]) == (form.fingerprint, built.digest)
        # What was laid on counts, not what the details say of it.
        assert record["patches"] == [{"id": "a", "strength": -2.0}, {"id": "b", "concept": "cat", "strength": 0.5}]
        assert all(record["components"][c] == again.component_digest(c) for c in ("unet", "vae", "text_encoder"))
        recorded.update(record["tensors"])
    assert recorded == again.digests(compose(form, terms))


def test_a_build_on_a_build_remembers_the_first(form: Base, terms: list[Term], tmp_path: Path) -> None:
    """The first changes the text encoder, the second the U-Net; every file speaks of both."""
    first = build(form, terms[1:], tmp_path / name_for(form, "first"), record={"recipe": "one"})
    second = build(Base.open(first.path), terms[:1], tmp_path / name_for(form, "second"), record={"recipe": "two"})
    found = [r for c in Base.open(second.path).containers.values() if (r := read_record(c)) is not None]
    for record in found:
        assert record["recipe"] == "two"
        assert record["digest"] == second.digest
        assert [earlier["recipe"] for earlier in record["earlier"]] == ["one"]
    assert len({str(r["tensors"]) for r in found}) == len(found)


def test_hashes_of_the_old_bytes_leave_the_header(base: Base, terms: list[Term], tmp_path: Path) -> None:
    file = single_file(base, tmp_path / "base.safetensors").path
    blob = file.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    head = blob[8 : 8 + length].replace(b'"format": "pt"', b'"format": "pt", "sshs_model_hash": "1", "kept": "2"')
    file.write_bytes(struct.pack("<Q", len(head)) + head + blob[8 + length :])
    built = build(Base.open(file), terms, tmp_path / "safe.safetensors")
    assert {"format", "kept", "overpaint"} == set(SafetensorsFile.open(built.path).metadata)


def test_the_card_of_a_single_file_lies_beside_it(base: Base, terms: list[Term], tmp_path: Path) -> None:
    one = single_file(base, tmp_path / "one.safetensors")
    build(one, terms, tmp_path / "with.safetensors", card="# card")
    build(one, terms, tmp_path / "without.safetensors")
    assert (tmp_path / "with.md").read_text() == "# card"
    assert not (tmp_path / "without.md").exists()
    (tmp_path / "mine.md").write_text("precious")
    with pytest.raises(AlreadyExists, match=r"mine\.md"):
        build(one, terms, tmp_path / "mine.safetensors", card="# card")
    assert (tmp_path / "mine.md").read_text() == "precious"
    assert not (tmp_path / "mine.safetensors").exists()


either_form = pytest.mark.parametrize("form", ["folder", "single file"], indirect=True)


@either_form
@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link", "dangling link"])
def test_an_output_that_is_there_is_not_touched(form: Base, terms: list[Term], tmp_path: Path, kind: str) -> None:
    out = tmp_path / name_for(form, "mine")
    occupy(out, kind)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AlreadyExists, match="already there"):
        build(form, terms, out)
    assert sorted(tmp_path.iterdir()) == before
    assert occupied(out, kind)


def occupy(out: Path, kind: str) -> None:
    if kind.endswith("folder"):
        out.mkdir()
        if kind == "folder":
            (out / "file").write_text("precious")
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(out.parent if kind == "link" else "nowhere")


def occupied(out: Path, kind: str) -> bool:
    if kind.endswith("folder"):
        return [p.read_text() for p in out.iterdir()] == ["precious"] * (kind == "folder")
    return out.is_symlink() if kind.endswith("link") else out.read_text() == "precious"


@either_form
@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
@pytest.mark.parametrize("with_the_call", [True, False])
def test_an_output_that_appears_meanwhile_is_not_replaced(
    form: Base, terms: list[Term], tmp_path: Path, kind: str, with_the_call: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on systems whose rename always replaces."""
    out, real = tmp_path / name_for(form, "mine"), build_module._refuse_changed

    def somebody_is_faster(base: Base) -> None:
        real(base)
        occupy(out, kind)

    monkeypatch.setattr(build_module, "_refuse_changed", somebody_is_faster)
    if not with_the_call:
        monkeypatch.setattr(atomic, "_rename_no_replace", lambda source, target: False)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AlreadyExists):
        build(form, terms, out)
    assert occupied(out, kind)
    assert sorted(tmp_path.iterdir()) == sorted([*before, out])


@either_form
def test_a_build_needs_no_modern_rename(
    form: Base, terms: list[Term], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_rename_no_replace", lambda source, target: False)
    out = build(form, terms, tmp_path / "new" / name_for(form, "safe")).path
    assert list((tmp_path / "new").iterdir()) == [out]
    assert Base.open(out).fingerprint == composition_digest(form, compose(form, terms))


@either_form
def test_everything_is_durable_before_it_appears(
    form: Base, terms: list[Term], tmp_path: Path, synced: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = atomic.move_new, []

    def moved(source: Path, target: Path) -> None:
        before.extend(synced)
        real(source, target)

    monkeypatch.setattr(atomic, "move_new", moved)
    built = build(form, terms, tmp_path / name_for(form, "safe"))
    scratch = before[-1]
    assert {p.relative_to(scratch) for p in before} == {
        p.relative_to(built.path) for p in [built.path, *built.path.rglob("*")]
    }
    assert synced[len(before) :] == [tmp_path]


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """Lets this process write files of so many bytes at most; the system refuses the rest as it does on a full disk.

    Only within the block: what the test runner writes elsewhere must not be cut short.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@either_form
@pytest.mark.parametrize("size", [0, 4096, 20_000, 100_000])
def test_no_room_leaves_nothing_behind(form: Base, terms: list[Term], tmp_path: Path, size: int) -> None:
    before = sorted(tmp_path.iterdir())
    with little_room(size), pytest.raises(OverpaintError, match=r"there is no room for .* free some space"):
        build(form, terms, tmp_path / "new/folders" / name_for(form, "safe"))
    assert sorted(tmp_path.iterdir()) == before


@either_form
@pytest.mark.parametrize("where", ["write_all", "copy_range"])
def test_a_full_disk_leaves_nothing_behind(
    form: Base, terms: list[Term], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"overpaint.patches.build.{where}", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OverpaintError, match="No space left"):
        build(form, terms, tmp_path / name_for(form, "safe"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_patch_that_does_not_fit_leaves_nothing_behind(form: Base, tmp_path: Path) -> None:
    """The last tensor of all overflows when most is written already."""
    name = form.projections()[-1]
    out, width = form.tensor(name).shape
    wild = Term("a", LowRank({name: (torch.full((out, 1), 1e30), torch.full((1, width), 1e30))}))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OverpaintError, match="overflows"):
        build(form, [wild], tmp_path / name_for(form, "safe"))
    assert sorted(tmp_path.iterdir()) == before


@either_form
def test_modes_follow_the_umask(form: Base, terms: list[Term], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        built = build(form, terms, tmp_path / name_for(form, "safe"))
    finally:
        os.umask(before)
    for path in [built.path, *built.path.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640)


def test_a_base_that_changes_meanwhile_stops_the_build(form: Base, terms: list[Term], tmp_path: Path) -> None:
    file = form.places[form.projections()[0]].file
    os.utime(file, ns=(1, 1))
    with pytest.raises(BrokenBase, match="changed since the base was opened"):
        build(form, terms, tmp_path / name_for(form, "safe"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OverpaintError, match="cut short"):
        build(form, terms, tmp_path / name_for(form, "safe"))
    assert not (tmp_path / name_for(form, "safe")).exists()


def test_a_place_that_is_no_folder_is_said_plainly(base: Base, terms: list[Term], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OverpaintError, match="choose a folder you may write to"):
        build(base, terms, tmp_path / "file/inner/safe")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("out", "message"),
    [("safe", "let its name end in .safetensors"), ("base.safetensors", "already there")],
)
def test_a_single_file_wants_a_files_name(
    base: Base, terms: list[Term], tmp_path: Path, out: str, message: str
) -> None:
    one = single_file(base, tmp_path / "base.safetensors", extras(base))
    with pytest.raises(OverpaintError, match=message):
        build(one, terms, tmp_path / out)


def test_a_folder_is_not_built_into_its_base_nor_named_like_a_file(
    base: Base, base_folder: Path, terms: list[Term], tmp_path: Path
) -> None:
    with pytest.raises(OverpaintError, match="inside the base itself"):
        build(base, terms, base_folder / "unet/safe")
    with pytest.raises(OverpaintError, match=r"does not end in \.safetensors"):
        build(base, terms, tmp_path / "safe.safetensors")


def test_components_behind_links_are_built_too(base_folder: Path, terms: list[Term], tmp_path: Path) -> None:
    """The Hub's cache is made of links to files; some people link whole components."""
    shutil.copytree(base_folder, tmp_path / "base")
    (tmp_path / "base/unet").rename(tmp_path / "elsewhere")
    (tmp_path / "base/unet").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "base/unet/circle").symlink_to(tmp_path / "base")
    linked = Base.open(tmp_path / "base")
    built = build(linked, terms, tmp_path / "safe")
    assert Base.open(built.path).fingerprint == built.digest
    assert not any(path.is_symlink() for path in built.path.rglob("*"))
