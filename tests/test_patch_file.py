"""The patch file: same patch, same bytes; whatever is not whole is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from overpaint.bases.base import Base
from overpaint.concepts import Concept
from overpaint.patches.delta import Dense, LowRank, TextMap
from overpaint.patches.patch import BadPatch, Patch, WrongBase, make_patch, read_patch
from tests.conftest import tiny_pipeline


@pytest.fixture
def patch(base: Base) -> Patch:
    delta = TextMap("text_encoder", torch.randn(64, 2), torch.randn(64, 2))
    return make_patch(base, Concept("Ein Käse, 'quoted'", "style", ("fromage",)), delta, {"name": "test", "seed": 1})


def test_a_patch_reads_back_with_the_same_id_and_bytes(patch: Patch) -> None:
    back = read_patch(patch.blob)
    assert back.id == patch.id
    assert back.blob == patch.blob
    assert back.concept == patch.concept


def test_a_patch_is_a_safetensors_file(patch: Patch, tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").write_bytes(patch.blob)
    with safe_open(tmp_path / "p.safetensors", framework="pt") as reader:
        assert sorted(reader.keys()) == ["text_encoder/down", "text_encoder/up"]
        assert json.loads(reader.metadata()["overpaint"])["concept"]["name"].startswith("Ein Käse")


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_every_kind_reads_back(base: Base, kind: str) -> None:
    name = base.readers()[0]
    out, width = base.tensor(name).shape
    delta = (
        LowRank({name: (torch.randn(out, 3), torch.randn(3, width))})
        if kind == "low-rank"
        else Dense({name: torch.randn(out, width)})
    )
    patch = make_patch(base, Concept("cat"), delta, {"name": "test"})
    back = read_patch(patch.blob)
    weight = base.tensor(name).double()
    assert torch.equal(back.delta.change(name, weight), delta.change(name, weight))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:4], "no patch file"),
        (lambda b: b[:-3], "damaged"),
        (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "does not match its digest"),
        (lambda b: struct.pack("<Q", 1 << 60) + b[8:], "no patch file"),
        (lambda b: struct.pack("<Q", 2) + b"{}", "no Overpaint manifest"),
        (lambda b: b.replace(b'\\"format\\":1', b'\\"format\\":9'), "upgrade Overpaint"),
        (lambda b: b"", "no patch file"),
    ],
)
def test_a_damaged_patch_is_refused(patch: Patch, damage: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(BadPatch, match=message):
        read_patch(damage(patch.blob))


def test_a_patch_is_refused_on_another_base(patch: Patch, base: Base, tmp_path: Path) -> None:
    tiny_pipeline(seed=1).to(dtype=torch.float16).save_pretrained(tmp_path / "other")
    other = Base.open(tmp_path / "other")
    patch.check(base)
    with pytest.raises(WrongBase) as caught:
        patch.check(other)
    assert base.fingerprint[:12] in str(caught.value)
    assert other.fingerprint[:12] in str(caught.value)


def test_the_order_of_a_manifest_does_not_change_the_id(patch: Patch) -> None:
    turned = Patch(dict(reversed(patch.manifest.items())), patch.delta)
    assert turned.id == patch.id
    assert turned.blob == patch.blob
