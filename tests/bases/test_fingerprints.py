"""Fingerprints: hashed where the tensors lie, in windows and threads, and remembered while the files are the same."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from overpaint.bases import checkpoint, safetensors_file
from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.checkpoint import TensorLocation, digests_of
from overpaint.bases.safetensors_file import SafetensorsFile, tensor_digest
from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import Progress
from overpaint.patches.build import build
from overpaint.patches.compose import Term
from overpaint.patches.delta import TextMap
from overpaint.registry.registry import Registry
from overpaint.workspace.workspace import Workspace


@pytest.mark.parametrize("threads", [1, 2, 5, None])
def test_any_number_of_threads_gives_the_digests_of_the_values(base: Base, threads: int | None) -> None:
    found = digests_of(base.places, base.containers, threads)
    assert found == {name: tensor_digest(name, base.tensor(name)) for name in base.names}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 5 * mmap.ALLOCATIONGRANULARITY), min_size=1, max_size=5), data=st.data())
def test_bytes_pass_by_whole_wherever_windows_end(tmp_path: Path, sizes: list[int], data: st.DataObject) -> None:
    pages = data.draw(st.integers(1, 3))
    tensors = {f"t{i}": torch.randint(0, 255, (size,), dtype=torch.uint8) for i, size in enumerate(sizes)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = SafetensorsFile.open(tmp_path / "x.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "WINDOW", pages * mmap.ALLOCATIONGRANULARITY)
        passed = dict.fromkeys(tensors, b"")
        for key, piece in found.passing({key: found.entries[key] for key in data.draw(st.permutations(list(tensors)))}):
            passed[key] += bytes(piece)
    assert passed == {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}


@pytest.mark.parametrize("size", [1, 100, 5000])
def test_batches_of_any_size_give_the_same_digests(base: Base, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    whole = digests_of(base.places, base.containers, 1)
    monkeypatch.setattr(checkpoint, "BATCH", size)
    assert digests_of(base.places, base.containers, 3) == whole


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tensors that were hashed, in order."""
    names: list[str] = []

    def noted(
        places: Mapping[str, TensorLocation], containers: Mapping[Path, SafetensorsFile], *, progress: Progress
    ) -> dict[str, str]:
        names.extend(places)
        return digests_of(places, containers, progress=progress)

    monkeypatch.setattr("overpaint.bases.base.digests_of", noted)
    return names


def test_a_base_is_hashed_once_for_a_registry(base_folder: Path, tmp_path: Path, hashed: list[str]) -> None:
    """Under a second name, and by the next program, nothing is read again."""
    workspace = Workspace(Registry.open(tmp_path / "registry"))
    first = workspace.add_base("one", base_folder)
    assert len(hashed) == len(set(hashed)) == len(workspace.base("one").names)
    hashed.clear()
    assert workspace.add_base("two", base_folder).fingerprint == first.fingerprint
    assert Workspace(Registry.open(tmp_path / "registry")).base("two").fingerprint == first.fingerprint
    assert hashed == []


def _touched(file: Path) -> None:
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def _grown(file: Path) -> None:
    status = file.stat()
    save_file({"conv_in.weight": torch.zeros(1)}, file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [_touched, _grown])
def test_a_file_of_another_time_or_size_is_hashed_again(
    base_folder: Path, tmp_path: Path, hashed: list[str], change: Any
) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    workspace = Workspace(Registry.open(tmp_path / "registry"))
    before = workspace.add_base("one", tmp_path / "base")
    change(tmp_path / "base/unet/diffusion_pytorch_model.safetensors")
    hashed.clear()
    after = workspace.add_base("two", tmp_path / "base")
    assert set(hashed) == set(Base.open(tmp_path / "base").names)
    assert (after.fingerprint == before.fingerprint) == (change is _touched)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"stamp": 1}', "null"])
def test_a_damaged_memory_of_digests_costs_time_alone(
    base_folder: Path, tmp_path: Path, hashed: list[str], text: str
) -> None:
    workspace = Workspace(Registry.open(tmp_path / "registry"))
    first = workspace.add_base("one", base_folder)
    caches: Mapping[Path, bytes] = {p: p.read_bytes() for p in (tmp_path / "registry/cache/digests").iterdir()}
    assert len(caches) == 1
    for file in caches:
        file.write_text(text)
    hashed.clear()
    assert Workspace(Registry.open(tmp_path / "registry")).base("one").fingerprint == first.fingerprint
    assert hashed
    assert {file: file.read_bytes() for file in caches} == caches


def test_a_cache_that_is_wrong_is_not_blamed_on_the_base(base_folder: Path, tmp_path: Path) -> None:
    """One digest of another tensor in its place, as a careless edit or a broken disk leaves it."""
    workspace = Workspace(Registry.open(tmp_path / "registry"))
    first = workspace.add_base("one", base_folder)
    (cache,) = (tmp_path / "registry/cache/digests").iterdir()
    content = json.loads(cache.read_text())
    for digests in (
        {**content["digests"], "unet/conv_in.bias": "0" * 64},
        {"unet/conv_in.bias": 3},
        {"no/such": "0" * 64},
    ):
        cache.write_text(json.dumps({**content, "digests": digests}))
        assert Workspace(Registry.open(tmp_path / "registry")).base("one").fingerprint == first.fingerprint


def _replaced(file: Path) -> None:
    """Other weights of the same size and time, as an image layer or `rsync -t` brings them."""
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-4:] = content[-8:-4]
    file.unlink()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _overwritten(file: Path) -> None:
    """The same, in place."""
    status = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-100, os.SEEK_END)
        opened.write(os.urandom(100))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [_replaced, _overwritten])
def test_other_weights_of_the_same_size_and_time_are_noticed(base_folder: Path, tmp_path: Path, change: Any) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    workspace = Workspace(Registry.open(tmp_path / "registry"))
    before = workspace.add_base("one", tmp_path / "base")
    opened = workspace.base("one")
    file = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    change(file)
    assert Base.open(tmp_path / "base").fingerprint != before.fingerprint
    with pytest.raises(OverpaintError, match="changed since it was added"):
        Workspace(Registry.open(tmp_path / "registry")).base("one")
    with pytest.raises(BrokenBase, match="changed since the base was opened"):
        build(opened, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_digests_of_a_file_that_changed_meanwhile_are_not_remembered(base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    opened = Base.open(tmp_path / "base")
    assert opened.fingerprint
    _overwritten(tmp_path / "base/unet/diffusion_pytorch_model.safetensors")
    opened.save_digests(tmp_path / "cache.json")
    assert not (tmp_path / "cache.json").exists()


def test_a_build_hashes_what_it_changes_anew(base: Base, tmp_path: Path) -> None:
    """Digests that are wrong for whatever reason never stand in a checkpoint."""
    term = Term("a", TextMap("text_encoder", torch.full((64, 1), 0.1), torch.full((64, 1), 0.2)))
    name = term.delta.targets(base)[0]
    base._digests[name] = "0" * 64
    with pytest.raises(BrokenBase, match="changed since the base was fingerprinted"):
        build(base, [term], tmp_path / "out")
    assert not (tmp_path / "out").exists()
