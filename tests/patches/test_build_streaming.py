"""Bytes copied between files, by the kernel or by hand, and headers that fit over them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from overpaint.bases.checkpoint import TensorLocation
from overpaint.bases.safetensors_file import BrokenFile, SafetensorsFile
from overpaint.patches import build
from overpaint.patches.build import BLOCK, Rewrite, copy_file, copy_range, write_all

RECORD = {"tensors": {}, "digest": "0" * 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("streaming") / "source"
    file.write_bytes(os.urandom(5 * BLOCK + 17))
    return file


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_range_is_copied_to_any_place(source: Path, data: st.DataObject) -> None:
    size = source.stat().st_size
    start = data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size - start))
    at = data.draw(st.one_of(st.integers(0, 2 * BLOCK), st.just(start)))
    target = source.with_name("target")
    with source.open("rb", buffering=0) as reader, target.open("w+b", buffering=0) as writer:
        copy_range(reader, writer, start, at, length)
    assert target.read_bytes()[at:] == source.read_bytes()[start : start + length]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("after", [0, 2])
def test_where_the_kernel_cannot_copy_it_is_done_by_hand(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int
) -> None:
    """At once, or in the middle of a range."""
    real, calls = os.copy_file_range, []

    def refusing(*given: int) -> int:
        calls.append(given)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return real(given[0], given[1], min(given[2], 100), *given[3:])

    monkeypatch.setattr(os, "copy_file_range", refusing)
    monkeypatch.setattr(build, "CHUNK", 1000)
    copy_file(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert len(calls) == after + 1


def test_a_system_without_the_call_copies_by_hand(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    copy_file(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_other_mistakes_of_the_system_are_not_hidden(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: int) -> int:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "copy_file_range", broken)
    with pytest.raises(OSError, match="broken disk"):
        copy_file(source, tmp_path / "target")


def test_a_source_that_ends_early_is_noticed(source: Path, tmp_path: Path) -> None:
    with (
        source.open("rb") as reader,
        (tmp_path / "target").open("xb") as writer,
        pytest.raises(BrokenFile, match="early"),
    ):
        copy_range(reader, writer, 0, 0, source.stat().st_size + 1)


def test_a_write_that_stops_half_way_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda to, data, at: real(to, data[:7], at))
    with (tmp_path / "target").open("xb") as writer:
        write_all(writer, bytes(range(100)), 3)
    assert (tmp_path / "target").read_bytes() == b"\0\0\0" + bytes(range(100))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_choice_of_tensors_is_replaced_and_left_out(source: Path, data: st.DataObject) -> None:
    """Also none, all, neighbours, empty tensors and single numbers; what is left keeps its order and its bytes."""
    folder = source.parent
    shapes = data.draw(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=8))
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.int64])
    tensors = {f"t{i}": torch.randn(shape).to(data.draw(dtypes)) for i, shape in enumerate(shapes)}
    fates = {key: data.draw(st.sampled_from(["kept", "replaced", "dropped"])) for key in tensors}
    save_file(tensors, folder / "old.safetensors", metadata={"about": "this"})
    values = {key: torch.ones_like(tensor) for key, tensor in tensors.items()}
    old = SafetensorsFile.open(folder / "old.safetensors")
    rewrite = Rewrite(
        old,
        {
            f"unet/{key}": TensorLocation(old.path, key, old.entries[key], old.entries[key].shape)
            for key, fate in fates.items()
            if fate == "replaced"
        },
        frozenset(key for key, fate in fates.items() if fate == "dropped"),
    )
    target = folder / "new.safetensors"
    target.unlink(missing_ok=True)
    digests = rewrite.write(target, RECORD, lambda name: values[name.removeprefix("unet/")])
    rewrite.write_record(target, {**RECORD, "digest": "1" * 64})
    assert set(digests) == set(rewrite.replaced)
    new = SafetensorsFile.open(target)
    assert list(new.entries) == [key for key in old.entries if fates[key] != "dropped"]
    assert new.metadata == {"about": "this", "overpaint": '{"digest":"' + "1" * 64 + '","tensors":{}}'}
    for key, tensor in load_file(target).items():
        assert torch.equal(tensor, values[key] if fates[key] == "replaced" else tensors[key])
        assert torch.equal(new.tensor(key), tensor)


def test_a_file_is_never_written_over(source: Path) -> None:
    with pytest.raises(FileExistsError):
        copy_file(source, source)
