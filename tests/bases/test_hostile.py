"""Files made to harm, offered as bases: refused in one sentence, without running anything and without a trace."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.hostile import archive, built_again, saved, with_pickle
from overpaint.bases.base import Base, BrokenBase, Unchangeable
from overpaint.bases.safetensors_file import (
    BUILT_LIMIT,
    PICKLE_LIMIT,
    STEP_LIMIT,
    BrokenFile,
    PickledCheckpoint,
    SafetensorsFile,
)
from overpaint.core.errors import OverpaintError
from overpaint.patches.build import build
from overpaint.patches.compose import Term
from overpaint.patches.delta import BadDelta, Dense, TextMap
from overpaint.registry.registry import Registry
from overpaint.workspace.workspace import Workspace
from tests.bases.containers import single_file_tensors

ran: list[str] = []


class Runs:
    """What it does when unpickled is noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return note, ("!",)


def note(text: str) -> None:
    ran.append(text)


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def described(dtype: str = "F16", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def keys(count: int) -> bytes:
    one = b'"model.diffusion_model.%07d":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(one % number for number in range(count)) + b"}"


BIG = torch.zeros(1000)
PICKLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "runs a program": (lambda: with_pickle(pickle.dumps({"state_dict": Runs()}, protocol=2)), "would run a program"),
    "runs a program deep inside": (
        lambda: saved({"state_dict": {"a": torch.zeros(2), "b": [{"c": Runs()}]}}),
        "would run a program",
    ),
    "a bare pickle": (lambda: pickle.dumps(Runs()), "not a zip archive"),
    "a whole module": (lambda: saved(torch.nn.Linear(2, 2)), "would run a program"),
    "the format before 2020": (
        lambda: saved({"a": torch.zeros(2)}, _use_new_zipfile_serialization=False),
        "not a zip archive",
    ),
    "nothing": (lambda: b"", "not a zip archive"),
    "another archive": (lambda: archive({"readme.txt": b"hello"}), "reading its tensors fails"),
    "cut short": (lambda: saved({"a": torch.zeros(1000)})[:-100], "not a zip archive"),
    "a cut tensor": (lambda: saved({"a": torch.zeros(1000)}).replace(b"\0" * 3000, b"\0" * 30, 1), "not a zip archive"),
    "compressed": (lambda: with_pickle(pickle.dumps({}), zipfile.ZIP_DEFLATED), "is compressed"),
    "many names": (lambda: with_pickle(bytes(PICKLE_LIMIT + 1)), "names of its tensors take more than 3 MB"),
    "many parts": (lambda: archive({f"{i:065000}": b"" for i in range(70)}), "list of parts is more than 1 MB"),
    "one number expanded": (lambda: saved({"a": torch.zeros(1).expand(1 << 38)}), "fewer bytes than its shape"),
    "many views of one tensor": (lambda: saved({f"k{i}": BIG.view(-1) for i in range(9)}), "more bytes than it has"),
    "more views than any base has": (lambda: saved({i: BIG.view(-1) for i in range(6000)}), "more steps than"),
    "a tensor built again and again": (lambda: built_again(BUILT_LIMIT), "more steps than"),
    "many steps": (lambda: with_pickle(b"\x80\x02](" + b"N" * STEP_LIMIT + b"e."), "more steps than"),
    "steps without an end": (lambda: with_pickle(b"\x80\x02](" + b"N" * 9), "is cut short or damaged"),
    "no steps": (lambda: with_pickle(b"\xff" * 9), "is cut short or damaged"),
    "a tensor built ten times": (lambda: built_again(10), "no map of tensors"),
    "a sparse tensor": (lambda: saved({"a": torch.eye(3).to_sparse()}), "not a plain tensor"),
    "an unknown dtype": (lambda: saved({"a": torch.zeros(3, dtype=torch.complex128)}), "not a plain tensor"),
    "a list": (lambda: saved([torch.zeros(2)]), "no map of tensors"),
    "a lone tensor": (lambda: saved(torch.zeros(2)), "no map of tensors"),
    "a number for a key": (lambda: saved({7: torch.zeros(2)}), "'7' is no name"),
    "a key that climbs": (lambda: saved({"unet/../../x": torch.zeros(2)}), "is no name of a tensor"),
    "a key that draws": (lambda: saved({"unet\x1b[2J": torch.zeros(2)}), "is no name of a tensor"),
}
SAFETENSORS: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "it has 0 bytes"),
    "a header of 2^60 bytes": (lambda: struct.pack("<Q", 1 << 60) + b"{}", "the whole file has 10"),
    "a million keys": (lambda: packed(keys(1_000_000)), "more than the 16 MB"),
    "many keys": (lambda: packed(keys(60_000)), "lists more than 30000 things"),
    "a long key": (lambda: packed({"k" * 501: described()}, b"\0" * 4), "is no name of a tensor"),
    "nested lists": (lambda: packed(b"[" * 1_000_000), "nested too deeply"),
    "overlapping tensors": (
        lambda: packed({"a": described(), "b": described(offsets=(2, 6))}, b"\0" * 6),
        "overlaps the tensor before it",
    ),
    "bytes that no tensor names": (lambda: packed({"a": described()}, b"\0" * 5), "end at byte"),
    "a tensor past the end": (lambda: packed({"a": described()}, b"\0" * 3), "end at byte"),
    "an unknown dtype": (lambda: packed({"a": described("F4")}, b"\0" * 4), "does not know"),
    "a dtype that contradicts": (lambda: packed({"a": described("F32")}, b"\0" * 4), "contradict"),
    "a key that climbs": (lambda: packed({"unet/../../x": described()}, b"\0" * 4), "is no name of a tensor"),
    "a key that draws": (lambda: packed({"unet\x1b[2J": described()}, b"\0" * 4), "is no name of a tensor"),
    "keys of nothing known": (lambda: packed({"layer.weight": described()}, b"\0" * 4), "without a layout"),
}
HOSTILE = [
    (f"x{suffix}", *case)
    for suffix, table in ((".ckpt", PICKLES), (".safetensors", SAFETENSORS))
    for case in table.items()
]


@pytest.mark.parametrize(("name", "what", "case"), HOSTILE, ids=[f"{name}: {what}" for name, what, _ in HOSTILE])
def test_a_hostile_file_is_refused_in_one_sentence_and_leaves_no_trace(
    tmp_path: Path, name: str, what: str, case: tuple[Callable[[], bytes], str]
) -> None:
    make, message = case
    (tmp_path / name).write_bytes(make())
    workspace = Workspace(Registry.open(tmp_path / "registry"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OverpaintError) as caught:
        workspace.add_base("bad", tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert ran == []
    assert workspace.bases() == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pickle_that_is_refused_would_have_run() -> None:
    """Otherwise the table above proves nothing."""
    pickle.loads(pickle.dumps(Runs()))
    assert ran == ["!"]
    ran.clear()


def test_a_pickle_gives_its_tensors_as_they_are(tmp_path: Path) -> None:
    """Views, other strides, single numbers, nothing at all, ties; what is no tensor is left out."""
    whole = torch.randn(6, 4)
    tensors = {
        "view": whole[2:4],
        "turned": whole.T,
        "number": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "half": whole.half(),
        "parameter": torch.nn.Parameter(whole.clone()),
        "counts": torch.arange(5),
        "tied": whole,
    }
    torch.save({"state_dict": {**tensors, "epoch": 3}, "optimizer": {"lr": 0.1}}, tmp_path / "x.ckpt")
    found = PickledCheckpoint.open(tmp_path / "x.ckpt")
    assert list(found.entries) == list(tensors)
    for key, tensor in found.tensors(tensors):
        assert torch.equal(tensor, tensors[key].detach())
        assert tensor.dtype == tensors[key].dtype
        assert torch.equal(found.beginning(found.entries[key], 3), tensors[key].detach().reshape(-1)[:3])
        passed = b"".join(bytes(piece) for _, piece in found.passing({key: found.entries[key]}))
        assert passed == tensors[key].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert found == PickledCheckpoint.open(tmp_path / "x.ckpt")


def test_a_pickle_that_changes_during_a_build_is_noticed(base: Base, tmp_path: Path) -> None:
    tensors = single_file_tensors(base)
    torch.save(tensors, tmp_path / "x.ckpt")
    opened = Base.open(tmp_path / "x.ckpt")
    (tmp_path / "x.ckpt").unlink()
    torch.save({**tensors, "more": torch.zeros(3)}, tmp_path / "x.ckpt")
    with pytest.raises(BrokenBase, match="changed since the base was opened"):
        build(opened, [], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def spoiled(base: Base, file: Path, name: str, change: Callable[[Tensor], Tensor]) -> Base:
    """The base as a single file with one tensor changed."""
    tensors = single_file_tensors(base)
    key = {
        "unet": "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "text": "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    }[name]
    save_file({**tensors, key: change(tensors[key])}, file)
    return Base.open(file)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), BrokenBase, "not finite"),
        (lambda t: t.index_fill(0, torch.tensor([1]), float("-inf")), BrokenBase, "not finite"),
        (lambda t: t.to(torch.int8), Unchangeable, "is int8, whose steps are too coarse"),
        (lambda t: t.to(torch.float8_e4m3fn), Unchangeable, "is float8_e4m3fn, whose steps"),
        (lambda t: t[:, :5].contiguous(), BadDelta, "text width 64"),
        (lambda t: t[None].contiguous(), BadDelta, "text width 64"),
    ],
    ids=["nan", "infinite", "int8", "float8", "narrow", "another rank"],
)
def test_a_weight_that_no_patch_can_lie_on_is_refused_before_anything_is_written(
    base: Base, tmp_path: Path, change: Callable[[Tensor], Tensor], error: type[OverpaintError], message: str
) -> None:
    bad = spoiled(base, tmp_path / "bad.safetensors", "unet", change)
    before = sorted(tmp_path.iterdir())
    terms = [Term("a", TextMap("text_encoder", torch.full((64, 1), 0.1), torch.full((64, 1), 0.2)))]
    with pytest.raises(error, match=message):
        build(bad, terms, tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == before


def test_a_weight_whose_name_is_a_path_is_refused(base: Base, tmp_path: Path) -> None:
    tensors = {**single_file_tensors(base), "cond_stage_model.transformer.text_model./etc/passwd": torch.zeros(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(BrokenBase, match=r"'cond_stage_model.transformer.text_model\./etc/passwd', which is no name"):
        Base.open(tmp_path / "x.safetensors")


def test_a_file_that_is_cut_while_it_is_read_is_noticed(base: Base, tmp_path: Path) -> None:
    """Also while its bytes pass by to be hashed: a mapping beyond the end would kill the program."""
    save_file({"large": torch.zeros(1 << 20), "small": torch.zeros(8)}, tmp_path / "x.safetensors")
    found = SafetensorsFile.open(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(found.data_start + 16)
    for key in ("large", "small"):
        with pytest.raises(BrokenFile, match="it ends early"):
            list(found.passing({key: found.entries[key]}))
        with pytest.raises(BrokenFile, match="it ends early"):
            found.tensor(key)


def test_a_change_for_a_stacked_weight_of_another_shape_is_refused(base: Base, tmp_path: Path) -> None:
    bad = spoiled(base, tmp_path / "bad.safetensors", "text", lambda t: t[:3].contiguous())
    name = "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight"
    with pytest.raises(BadDelta, match=r"fc1\.weight"):
        build(bad, [Term("a", Dense({name: torch.ones(base.places[name].shape)}))], tmp_path / "out.safetensors")
