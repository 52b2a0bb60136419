"""`overpaint inspect`: what is erased in a checkpoint, whether it is what was built, and files nobody should trust."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from overpaint.bases.base import Base
from overpaint.bases.safetensors_file import HEADER_LIMIT, BrokenFile, SafetensorsFile
from overpaint.cli import main
from overpaint.core import atomic
from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound
from overpaint.patches.build import BadRecord, Built, build
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import Dense, TextMap
from overpaint.patches.inspect import inspect
from overpaint.patches.patch import Patch, make_patch
from tests.checkpoints import shard, single_file

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "sync", lambda path: None)


@pytest.fixture
def patch(base: Base) -> Patch:
    delta = TextMap("text_encoder", torch.full((64, 1), 0.1), torch.full((64, 1), 0.2))
    return make_patch(base, Concept("Käse \x1b[31m", "style"), delta, {"name": "test", "seed": 1})


@pytest.fixture(params=["folder", "shards", "single file"])
def form(request: pytest.FixtureRequest, base: Base, base_folder: Path, tmp_path: Path) -> Base:
    if request.param == "single file":
        return single_file(base, tmp_path / "base.safetensors")
    shutil.copytree(base_folder, tmp_path / "base")
    if request.param == "shards":
        shard(tmp_path / "base", "unet", 3)
    return Base.open(tmp_path / "base")


@pytest.fixture
def built(form: Base, patch: Patch, tmp_path: Path) -> Built:
    details = {
        "recipe": "safe",
        "base_name": "tiny",
        "patches": [{"id": patch.id, "concept": "Käse \x1b[31m", "solver": "test"}],
    }
    out = tmp_path / ("built.safetensors" if form.is_single_file else "built")
    return build(form, [Term(patch.id, patch.delta, -1.5)], out, record=details)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, words)], catch_exceptions=False)


def spoil(file: Path, key: str) -> None:
    """Change the last bit of one tensor's first value."""
    entry = SafetensorsFile.open(file).entries[key]
    blob = bytearray(file.read_bytes())
    blob[entry.start] ^= 1
    file.write_bytes(blob)


def test_a_built_checkpoint_says_what_is_erased_and_matches(form: Base, built: Built, patch: Patch) -> None:
    found = inspect(built.path)
    assert found.sound
    assert found.what == "built checkpoint"
    assert (found.facts["recipe"], found.facts["base"]) == ("safe", "tiny")
    assert (found.facts["base fingerprint"], found.facts["weights"]) == (form.fingerprint, built.digest)
    assert found.facts["patched tensors"] == len(form.projections())
    assert [dict(p) for p in found.patches] == [
        {"id": patch.id, "concept": "Käse \x1b[31m", "solver": "test", "strength": -1.5}
    ]
    shown = run(built.path)
    assert shown.exit_code == 0
    assert "every digest matches" in shown.stdout
    assert "Käse" in shown.stdout
    assert "\x1b[31m" not in shown.stdout
    assert json.loads(run(built.path, "--json").stdout) == json.loads(json.dumps(found.as_json()))


def test_a_patched_tensor_that_differs_is_named(form: Base, built: Built) -> None:
    name = form.projections()[1]
    place = Base.open(built.path).places[name]
    spoil(place.file, place.key)
    assert inspect(built.path).problems == (f"{name} is not what was built: its digest differs",)
    shown = run(built.path)
    assert shown.exit_code == 1
    assert name in shown.stdout.replace("\n", "")


def test_another_tensor_that_differs_is_noticed_too(built: Built) -> None:
    place = Base.open(built.path).places["vae/quant_conv.bias"]
    spoil(place.file, place.key)
    assert inspect(built.path).problems == ("vae: a tensor that no patch changed is not what was built",)
    assert json.loads(run(built.path, "--json").stdout)["sound"] is False


def test_the_unpatched_weights_put_back_are_noticed(form: Base, built: Built) -> None:
    """All of them: the composition undone under a header that claims it."""
    again = Base.open(built.path)
    for name in form.projections():
        place, original = again.places[name], form.tensor(name)
        with place.file.open("r+b") as file:
            file.seek(place.entry.start)
            file.write(original.view(torch.uint8).numpy().tobytes())
    found = inspect(built.path)
    assert len(found.problems) == len(form.projections())


def test_a_twin_put_beside_the_patched_weights_is_noticed(
    base: Base, base_folder: Path, patch: Patch, tmp_path: Path
) -> None:
    built = build(base, [Term(patch.id, patch.delta)], tmp_path / "built")
    shutil.copyfile(base_folder / UNET, built.path / "unet/diffusion_pytorch_model.fp16.safetensors")
    (problem,) = inspect(built.path).problems
    assert "diffusion_pytorch_model.fp16.safetensors" in problem
    assert "not covered by the record" in problem


def test_one_weight_file_of_a_build_is_checked_alone(base: Base, patch: Patch, tmp_path: Path) -> None:
    built = build(base, [Term(patch.id, patch.delta)], tmp_path / "built")
    found = inspect(built.path / UNET)
    assert found.sound
    assert found.facts["patched tensors"] == len(compose(base, [Term(patch.id, patch.delta)]))
    spoil(built.path / UNET, base.projections()[0].removeprefix("unet/"))
    assert inspect(built.path / UNET).problems == (
        f"{base.projections()[0]} is not what was built: its digest differs",
    )


def test_files_of_two_builds_are_not_one(base: Base, patch: Patch, tmp_path: Path) -> None:
    name = "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight"
    both = [Term("a", patch.delta), Term("b", Dense({name: torch.ones_like(base.tensor(name))}))]
    first = build(base, both, tmp_path / "first")
    second = build(base, [both[0], Term("b", both[1].delta, 0.5)], tmp_path / "second")
    file = "text_encoder/model.safetensors"
    shutil.copyfile(second.path / file, first.path / file)
    with pytest.raises(BadRecord, match="different builds"):
        inspect(first.path)


def test_a_base_is_described_but_nothing_is_erased_in_it(form: Base) -> None:
    found = inspect(form.path)
    assert (found.what, found.facts["layout"]) == ("base", "stable-diffusion")
    assert found.facts["fingerprint"] == form.fingerprint
    assert all(found.facts[f"component {c}"] == form.component_digest(c) for c in ("unet", "vae", "text_encoder"))
    shown = run(form.path)
    assert shown.exit_code == 1
    assert "Overpaint did not build this" in shown.stdout.replace("\n", " ")


def test_a_file_that_overpaint_did_not_build_is_said_to_be_so(tmp_path: Path) -> None:
    save_file({"lora.up": torch.zeros(4, 4)}, tmp_path / "lora.safetensors", metadata={"format": "pt"})
    found = inspect(tmp_path / "lora.safetensors")
    assert (found.what, found.facts) == ("safetensors file", {"tensors": 1})
    assert run(tmp_path / "lora.safetensors").exit_code == 1


def test_a_patch_file_shows_its_manifest(patch: Patch, tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").write_bytes(patch.blob)
    found = inspect(tmp_path / "p.safetensors")
    assert found.sound
    assert (found.what, found.facts["patch"], found.facts["kind"]) == ("patch", patch.id, patch.manifest["kind"])
    assert found.facts["solver.seed"] == 1
    assert run(tmp_path / "p.safetensors").exit_code == 0
    spoiled = bytearray(patch.blob)
    spoiled[-1] ^= 1
    (tmp_path / "p.safetensors").write_bytes(spoiled)
    shown = run(tmp_path / "p.safetensors")
    assert shown.exit_code == 1
    assert "does not match its digest" in shown.stderr


def test_a_path_with_nothing_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is nothing at"):
        inspect(tmp_path / "nothing")
    shown = run(tmp_path / "nothing")
    assert (shown.exit_code, shown.stderr.count("\n")) == (1, 1)


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def packed(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"\1\2\3", "it has 3 bytes"),
        (struct.pack("<Q", 1 << 63) + b"{}", "header would be"),
        (struct.pack("<Q", 100) + b"{}", "header would be 100 bytes long, the whole file has 10"),
        (packed(b"{" + b" " * HEADER_LIMIT + b"}", b""), "more than the 16 MB"),
        (packed(b"\xff\xfe"), "not JSON"),
        (packed(b"{"), "not JSON"),
        (packed(b"[" * 100_000), "nested too deeply"),
        (packed(b"9" * 10_000), "not JSON"),
        (packed(["a"]), "not a JSON object"),
        (packed(b'{"a": {}, "a": {}}'), "occurs twice"),
        (packed(b'{"\\ud800": 1}'), "not JSON"),
        (packed({"a": 1}), "has no dtype, shape and data_offsets"),
        (packed({"a": {"dtype": "F32", "shape": [2]}}), "has no dtype, shape and data_offsets"),
        (packed({"a": tensor(offsets=(0,))}), "has no dtype, shape and data_offsets"),
        (packed({"a": tensor(shape=None)}), "has no dtype, shape and data_offsets"),
        (packed({"a": tensor("X99")}), "'X99', which this program does not know"),
        (packed({"a": tensor(["F32"])}), "which this program does not know"),
        (packed({"a": tensor(shape=(-2,))}), "not plain counts"),
        (packed({"a": tensor(shape=(2.0,))}), "not plain counts"),
        (packed({"a": tensor(shape=(True, 2))}), "not plain counts"),
        (packed({"a": tensor(shape=(0, 1 << 40, 1 << 40), offsets=(0, 0))}), "not plain counts"),
        (packed({"a": tensor(shape=(1,) * 17 + (2,))}), "not plain counts"),
        (packed({"a": tensor(offsets=(-8, 0))}), "not plain counts"),
        (packed({"a": tensor(offsets=(8, 0))}), "contradict"),
        (packed({"a": tensor(shape=(3,))}), "has 8 bytes, which its dtype and shape contradict"),
        (packed({"a": tensor(offsets=(8, 16))}), "leaves a hole before it"),
        (packed({"a": tensor(), "b": tensor(shape=(1,), offsets=(4, 8))}), "'b' overlaps"),
        (packed({"a": tensor(), "b": tensor()}), "overlaps"),
        (packed({"a": tensor(), "b": tensor(shape=(1,), offsets=(12, 16))}, b"\0" * 16), "leaves a hole"),
        (packed({"a": tensor()}, b"\0" * 7), "end at byte"),
        (packed({"a": tensor()}, b"\0" * 9), "end at byte"),
        (packed({"a": tensor(offsets=(0, 1 << 62), shape=(1 << 60,))}), "end at byte"),
        (packed({"__metadata__": ["x"], "a": tensor()}), "metadata is not a map of texts"),
        (packed({"__metadata__": {"x": 1}, "a": tensor()}), "metadata is not a map of texts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_header_is_refused_in_one_sentence(tmp_path: Path, blob: bytes, message: str) -> None:
    (tmp_path / "f.safetensors").write_bytes(blob)
    with pytest.raises(BrokenFile, match="cut short or damaged") as caught:
        SafetensorsFile.open(tmp_path / "f.safetensors")
    assert message in str(caught.value)
    shown = run(tmp_path / "f.safetensors")
    assert (shown.exit_code, shown.stdout, shown.stderr.count("\n")) == (1, "", 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: "{", "damaged"),
        (lambda r: "[" * 100_000, "damaged"),
        (lambda r: "[]", "damaged"),
        (lambda r: json.dumps({**r, "format": 9}), "upgrade Overpaint"),
        (lambda r: json.dumps({**r, "digest": 1}), "damaged"),
        (lambda r: json.dumps({**r, "tensors": {"unet/x": None}}), "damaged"),
        (lambda r: json.dumps({**r, "tensors": []}), "damaged"),
        (lambda r: json.dumps({**r, "patches": [{"id": "a"}]}), "damaged"),
        (lambda r: json.dumps({**r, "patches": [{"id": "a", "strength": "1"}]}), "damaged"),
        (lambda r: json.dumps({**r, "earlier": [{}]}), "damaged"),
        (lambda r: json.dumps({**r, "recipe": "\ud800"}), "damaged"),
        (lambda r: json.dumps({k: v for k, v in r.items() if k != "components"}), "damaged"),
    ],
)
def test_a_damaged_record_is_refused(
    base: Base, patch: Patch, tmp_path: Path, damage: Callable[[dict[str, Any]], str], message: str
) -> None:
    file = build(base, [Term(patch.id, patch.delta)], tmp_path / "built").path / UNET
    record = json.loads(SafetensorsFile.open(file).metadata["overpaint"])
    save_file(load_file(file), file, metadata={"overpaint": damage(record)})
    with pytest.raises(BadRecord, match=message):
        inspect(file)
    assert run(file).exit_code == 1


def test_a_tensor_that_a_record_names_and_the_file_lacks_is_said(base: Base, patch: Patch, tmp_path: Path) -> None:
    file = build(base, [Term(patch.id, patch.delta)], tmp_path / "built").path / UNET
    record = json.loads(SafetensorsFile.open(file).metadata["overpaint"])
    record["tensors"]["unet/nowhere"] = "0" * 64
    save_file(load_file(file), file, metadata={"overpaint": json.dumps(record)})
    assert inspect(file).problems == ("unet/nowhere is not there",)


def test_a_build_on_a_build_shows_all_that_is_erased(form: Base, built: Built, patch: Patch, tmp_path: Path) -> None:
    again = Base.open(built.path)
    out = tmp_path / ("second.safetensors" if form.is_single_file else "second")
    second = build(again, [Term("f" * 64, patch.delta, 0.25)], out)
    found = inspect(second.path)
    assert found.sound
    assert [(p["id"], p["strength"]) for p in found.patches] == [(patch.id, -1.5), ("f" * 64, 0.25)]
