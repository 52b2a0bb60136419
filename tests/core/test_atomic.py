"""A file is written whole or not at all, whether its name is new or taken."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import pytest

from overpaint.core.atomic import atomic_output, make_folder, replacing, write_new, write_over
from overpaint.core.errors import AlreadyExists, OverpaintError


def full(*args: Any, **options: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "file"
    write_over(path, b"old")
    with replacing(path) as scratch:
        scratch.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_replacement_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    write_over(path, b"old", durable=True)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        write_over(path, b"new", durable=True)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_the_block_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_over(path, b"old")

    def fail() -> None:
        with replacing(path) as scratch:
            scratch.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_read_only_file_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"two"):
        with replacing(path, durable=True, read_only=True) as scratch:
            scratch.write_bytes(content)
    assert path.read_bytes() == b"two"
    assert not stat.S_IMODE(path.stat().st_mode) & 0o222


def test_a_new_file_never_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_new(path, b"one")
    with pytest.raises(AlreadyExists):
        write_new(path, b"two")

    def race() -> None:
        with atomic_output(tmp_path / "late") as scratch:
            scratch.write_bytes(b"ours")
            (tmp_path / "late").write_bytes(b"theirs")

    with pytest.raises(AlreadyExists):
        race()
    assert path.read_bytes() == b"one"
    assert (tmp_path / "late").read_bytes() == b"theirs"


def test_a_full_disk_leaves_no_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OverpaintError, match="no room"):
        write_new(tmp_path / "inner" / "file", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "a long name"])
def test_a_path_of_which_thousands_of_folders_are_missing_is_one_sentence(tmp_path: Path, name: str) -> None:
    deep = tmp_path.joinpath(*[name] * 2000, "out")
    for write in (atomic_output, replacing):
        with (
            pytest.raises(
                OverpaintError, match=r"^2,000 folders of .* are not there, and at most 100 are made"
            ) as caught,
            write(deep),
        ):
            pass
        assert len(str(caught.value)) < 300
    with pytest.raises(OverpaintError, match="2,000 folders"):
        make_folder(deep.parent)
    assert list(tmp_path.iterdir()) == []
    make_folder(tmp_path.joinpath(*["a"] * 50))
