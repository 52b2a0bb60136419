"""Files that mean harm, or that somebody broke: refused with one sentence, and nothing is run or laid out for them."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from overpaint.bases.base import Base
from overpaint.core.errors import OverpaintError
from overpaint.patches.formats.dialects import ForeignFile
from overpaint.patches.formats.importing import Options, import_weights

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
BARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
MEMORY = 64 << 20
"""Bytes that a refusal may take: four times the longest header that is read."""


class Trap:
    """A pickle that would make a file when it is loaded as pickles usually are."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def lora(file: Path, **changes: torch.Tensor | None) -> Path:
    """A LoRA of one layer of the tiny base, with parts replaced or left out."""
    parts: dict[str, torch.Tensor | None] = {"lora_down.weight": torch.ones(2, 64), "lora_up.weight": torch.ones(8, 2)}
    parts.update({key.replace("__", "."): tensor for key, tensor in changes.items()})
    save_file({f"{LAYER}.{part}": tensor for part, tensor in parts.items() if tensor is not None}, file)
    return file


def raw(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def pickled_trap(file: Path) -> Path:
    torch.save({"state_dict": {BARE: torch.ones(8, 64)}, "trap": Trap(file.parent / "sprung")}, file)
    return file


def compressed(file: Path) -> Path:
    torch.save({BARE: torch.zeros(1 << 20)}, file.with_suffix(".plain"))
    with zipfile.ZipFile(file.with_suffix(".plain")) as plain, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in plain.infolist():
            bomb.writestr(part.filename, plain.read(part))
    return file


def many_keys(file: Path) -> Path:
    """A million keys; written by hand, since no writer gets there in a test's time."""
    one = ",".join(f'"{LAYER}_{i:07d}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1000))
    return raw(file, b"{" + b",".join([one.encode()] * 1000) + b"}")


def nested_view(file: Path) -> Path:
    torch.save({"unet": {BARE: torch.zeros(1).expand(1 << 20, 1 << 20)}}, file)
    return file


def adapter(folder: Path, config: str) -> Path:
    folder.mkdir()
    key = f"base_model.model.{BARE.removesuffix('.weight')}"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 64), f"{key}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config)
    return folder


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pickle that runs a program": (lambda f: pickled_trap(f / "x.pt"), "cannot be read as a checkpoint"),
    "a bare pickle": (lambda f: _text(f / "x.bin", b"\x80\x04\x95."), "not a zip archive"),
    "a zip bomb": (lambda f: compressed(f / "x.ckpt"), "is compressed"),
    "a view of one byte": (lambda f: nested_view(f / "x.pt"), "not a plain tensor|more bytes|fewer bytes"),
    "a header of terabytes": (lambda f: raw(f / "x.safetensors", {}, length=1 << 40), "header would be"),
    "a header of 64 MB": (lambda f: raw(f / "x.safetensors", b" " * (64 << 20)), "MB long"),
    "a million keys": (lambda f: many_keys(f / "x.safetensors"), "MB long"),
    "a header nested deeply": (lambda f: raw(f / "x.safetensors", b"[" * 200_000), "cannot be read as safetensors"),
    "overlapping tensors": (
        lambda f: raw(f / "x.safetensors", {BARE: entry(0, 2048, [8, 64]), "b.weight": entry(4, 8, [1])}, bytes(2048)),
        "overlaps",
    ),
    "a shape of exabytes": (
        lambda f: raw(f / "x.safetensors", {BARE: entry(0, 8, [1 << 31, 1 << 31])}, bytes(8)),
        "cannot be read as safetensors",
    ),
    "a path for a key": (
        lambda f: raw(f / "x.safetensors", {"../../etc/passwd.weight": entry(0, 4, [1])}, bytes(4)),
        "no name of a tensor|names a layer",
    ),
    "whole numbers for weights": (
        lambda f: lora(f / "x.safetensors", lora_down__weight=torch.ones(2, 64, dtype=torch.int32)),
        "is int32; what changes a weight",
    ),
    "a boolean for weights": (
        lambda f: lora(f / "x.safetensors", lora_up__weight=torch.ones(8, 2, dtype=torch.bool)),
        "is bool; what changes a weight",
    ),
    "not a number": (lambda f: lora(f / "x.safetensors", lora_up__weight=torch.full((8, 2), torch.nan)), "not finite"),
    "infinity": (lambda f: lora(f / "x.safetensors", lora_down__weight=torch.full((2, 64), torch.inf)), "not finite"),
    "an alpha that is infinite": (lambda f: lora(f / "x.safetensors", alpha=torch.tensor(torch.inf)), "not finite"),
    "an alpha of many values": (lambda f: lora(f / "x.safetensors", alpha=torch.ones(3)), "instead of one"),
    "half a layer": (lambda f: lora(f / "x.safetensors", lora_up__weight=None), "without the factor 'up'"),
    "no directions": (
        lambda f: lora(f / "x.safetensors", lora_up__weight=torch.ones(8, 0), lora_down__weight=torch.ones(0, 64)),
        "made for another base",
    ),
    "factors of another base": (
        lambda f: lora(f / "x.safetensors", lora_down__weight=torch.ones(2, 768)),
        r"factors \[8, 2\] and \[2, 768\] for unet/down_blocks.0",
    ),
    "factors that do nothing": (
        lambda f: lora(f / "x.safetensors", lora_up__weight=torch.zeros(8, 2)),
        "changes nothing",
    ),
    "an empty file": (lambda f: raw(f / "x.safetensors", {}), "none of its 0 keys"),
    "text": (lambda f: _text(f / "x.safetensors", b"hello"), "is no safetensors file: it is a text"),
    "an unknown kind of file": (lambda f: _text(f / "x.gguf", b"GGUF"), "none of the files known here"),
    "nothing": (lambda f: f / "nothing.safetensors", "no file or folder at"),
    "a strange folder": (lambda f: f, "no folder of a pipeline"),
    "an adapter of another kind": (lambda f: adapter(f / "a", '{"peft_type": "LOHA"}'), "LOHA adapter; only LORA"),
    "an adapter that asks for more": (
        lambda f: adapter(f / "a", '{"r": 2, "lora_alpha": 2, "use_dora": true}'),
        "asks for use_dora",
    ),
    "an adapter without a configuration": (lambda f: adapter(f / "a", "{"), "cannot be read"),
    "an adapter with patterns that are programs": (
        lambda f: adapter(f / "a", '{"r": 2, "lora_alpha": 2, "alpha_pattern": {"(a+)+$": 1}}'),
        "more than a module's name",
    ),
}


def _text(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_or_broken_file_is_refused_with_one_sentence(base: Base, tmp_path: Path, what: str) -> None:
    make, message = HOSTILE[what]
    file = make(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(OverpaintError, match=message) as caught:
            import_weights(base, file)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 700
    assert not (tmp_path / "sprung").exists()


def test_keys_that_look_like_paths_are_never_more_than_names(base: Base, tmp_path: Path) -> None:
    file = lora(tmp_path / "x.safetensors")
    save_file({**load_file(file), "lora_unet_nowhere./etc/passwd": torch.ones(1)}, file)
    with pytest.raises(ForeignFile, match=r"1 of its 3 keys name nothing"):
        import_weights(base, file)
    assert import_weights(base, file, Options(allow_unmatched=True)).changed == (f"unet/{BARE}",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]
