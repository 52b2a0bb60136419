"""The header of a safetensors file is the same whoever writes it, and reads back as what it was written from."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load, save

from overpaint.bases.safetensors_file import DTYPES, SafetensorsFile
from overpaint.core.encoding import BYTES, BadHeader, header_bytes, header_length, read_header

TENSORS = [("b.weight", "F16", (2, 3)), ("a", "F32", ()), ("ö", "U8", (0, 4))]


@pytest.mark.parametrize(("multiple", "rest", "sort"), [(8, 0, True), (4096, 100, False), (16, 8, True)])
def test_what_is_written_is_read(multiple: int, rest: int, sort: bool) -> None:
    head = header_bytes({"x": "y"}, TENSORS, multiple=multiple, rest=rest, sort=sort)
    assert header_length(head) == len(head) - 8
    assert (len(head) - 8) % multiple == rest
    metadata, entries = read_header(head[8:], len(head) + 16)
    assert metadata == {"x": "y"}
    assert {(name, e.dtype, e.shape) for name, e in entries.items()} == set(TENSORS)
    assert load(head + bytes(16))["b.weight"].shape == (2, 3)


def test_the_library_s_own_header_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(save({"w": torch.ones(3), "v": torch.zeros(2, 2)}, {"format": "pt"}))
    found = SafetensorsFile.open(file)
    with safetensors.safe_open(file, "pt") as theirs:
        assert set(theirs.keys()) == set(found.entries)
        assert theirs.metadata() == found.metadata


def test_every_dtype_has_the_size_that_pytorch_gives_it() -> None:
    assert {code: dtype.itemsize for code, dtype in DTYPES.items()} == BYTES


@pytest.mark.parametrize("size", [-1, 1])
def test_a_file_of_another_length_is_refused(size: int) -> None:
    head = header_bytes({}, TENSORS)
    with pytest.raises(BadHeader, match="its tensors end at byte"):
        read_header(head[8:], len(head) + 16 + size)
