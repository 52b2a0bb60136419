"""A file that is something else than its name says is called what it is, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from overpaint.bases.safetensors_file import BrokenFile, PickledCheckpoint, SafetensorsFile

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 3438167534\n"


@pytest.mark.parametrize("open", [SafetensorsFile.open, PickledCheckpoint.open])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "git lfs pull"),
        (b"<!doctype html><html>log in</html>", "a web page"),
        (b"Entry not found", "a text that begins 'Entry not found'"),
        (b'{"error":"Repository not found"}', "a text that begins"),
        (b"GGUF\3\0\0\0" + bytes(56), "a GGUF file"),
    ],
)
def test_a_pointer_or_a_page_is_no_damaged_file(
    tmp_path: Path, open: Callable[[Path], object], content: bytes, said: str
) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(BrokenFile, match=said):
        open(tmp_path / "x")


@pytest.mark.parametrize("zip", [True, False])
def test_a_pickle_named_safetensors_is_called_a_pickle(tmp_path: Path, zip: bool) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.safetensors", _use_new_zipfile_serialization=zip)
    with pytest.raises(BrokenFile, match="a PyTorch pickle"):
        SafetensorsFile.open(tmp_path / "x.safetensors")


def test_a_safetensors_file_named_ckpt_is_called_so(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "x.ckpt")
    with pytest.raises(BrokenFile, match=r"let its name end in \.safetensors"):
        PickledCheckpoint.open(tmp_path / "x.ckpt")
