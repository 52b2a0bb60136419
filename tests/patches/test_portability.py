"""Building and reading need no call that only some systems have."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.core import atomic
from overpaint.patches.build import build
from overpaint.patches.compose import Term
from overpaint.patches.delta import TextMap
from overpaint.patches.inspect import inspect

UNIX_ONLY = ("pread", "pwrite", "copy_file_range", "sched_getaffinity", "mkfifo", "fork", "getuid")


@pytest.mark.parametrize("form", ["diffusers", "single-file"])
def test_a_build_needs_nothing_that_windows_lacks(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError("there is no such library")

    for name in UNIX_ONLY:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(atomic, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    base = Base.open(base_folder)
    term = Term("a" * 64, TextMap("text_encoder", torch.full((64, 1), 0.1), torch.full((64, 1), 0.2)))
    out = tmp_path / ("one.safetensors" if form == "single-file" else "one")
    built = build(base, [term], out, form=form)
    found = inspect(built.path)
    assert found.sound
    assert found.facts["patched tensors"] == len(base.projections())
    base.save_digests(tmp_path / "cache/digests.json")
    again = Base.open(base_folder)
    again.load_digests(tmp_path / "cache/digests.json")
    assert again.fingerprint == base.fingerprint
