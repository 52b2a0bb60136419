"""Fingerprints: hashed where the tensors lie, in windows and threads, and remembered while the files are the same."""

from __future__ import annotations

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
from overpaint.bases.base import Base
from overpaint.bases.checkpoint import TensorLocation, digests_of
from overpaint.bases.safetensors_file import SafetensorsFile, tensor_digest
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

    def noted(places: Mapping[str, TensorLocation], containers: Mapping[Path, SafetensorsFile]) -> dict[str, str]:
        names.extend(places)
        return digests_of(places, containers)

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
