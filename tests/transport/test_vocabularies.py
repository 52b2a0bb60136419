"""Kept vocabularies travel with everything, and whatever is wrong with one costs time and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from overpaint.solvers.vocabulary_file import Heard, keep, place, read
from overpaint.transport.signing import new_key
from overpaint.transport.vocabularies import kept
from overpaint.workshop import Workshop

IDENTITY = {"encoder": "e" * 64, "doors": {"text_encoder": "last"}, "sentences": ["{}"]}
MOMENT = torch.tensor([[[2.0, 0.5], [0.5, 3.0]]], dtype=torch.float64)


def cache_of(shop: Workshop) -> Path:
    return shop.registry.folder / "cache" / "vocabulary"


@pytest.fixture
def sender(tmp_path: Path) -> Workshop:
    """A registry that kept one whole vocabulary and part of another."""
    shop = Workshop.open(tmp_path / "sender")
    keep(Heard(IDENTITY, 3, {"text_encoder": MOMENT}), cache_of(shop), complete=True)
    keep(Heard({**IDENTITY, "encoder": "f" * 64}, 1, {"text_encoder": MOMENT}), cache_of(shop), complete=False)
    return shop


def moved(sender: Workshop, receiver: Workshop, way: str, tmp_path: Path, **asked: Any) -> None:
    if way == "folder":
        sender.push(tmp_path / "shared")
        receiver.pull(tmp_path / "shared", **asked)
    else:
        sender.export(tmp_path / "all.tar")
        receiver.import_file(tmp_path / "all.tar", **asked)


@pytest.mark.parametrize("way", ["folder", "file"])
def test_whole_vocabularies_come_with_everything(sender: Workshop, tmp_path: Path, way: str) -> None:
    receiver = Workshop.open(tmp_path / "receiver")
    moved(sender, receiver, way, tmp_path)
    assert [file.name for file in cache_of(receiver).iterdir()] == [place(IDENTITY, Path()).name]
    assert torch.equal(read(kept(cache_of(receiver))[0]).moments["text_encoder"], MOMENT)


def test_what_is_here_already_is_neither_sent_nor_taken_again(sender: Workshop, tmp_path: Path) -> None:
    receiver = Workshop.open(tmp_path / "receiver")
    moved(sender, receiver, "folder", tmp_path)
    file = kept(cache_of(receiver))[0]
    before = file.stat().st_mtime_ns
    again = sender.push(tmp_path / "shared")
    assert again.nbytes == 0
    assert receiver.pull(tmp_path / "shared").nbytes == 0
    assert file.stat().st_mtime_ns == before


def test_a_vocabulary_that_is_not_what_it_says_is_left_out_with_notice(sender: Workshop, tmp_path: Path) -> None:
    file = kept(cache_of(sender))[0]
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    receiver, notices = Workshop.open(tmp_path / "receiver"), list[str]()
    moved(sender, receiver, "folder", tmp_path, notice=notices.append)
    assert list(cache_of(receiver).iterdir()) == []
    assert "was left out, and is heard when it is needed" in notices[0]


def test_only_a_signed_one_is_taken_where_that_is_asked(sender: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    new_key(tmp_path / "me")
    secret, public = tmp_path / "me", tmp_path / "me.pub"
    receiver, notices = Workshop.open(tmp_path / "receiver"), list[str]()
    sender.push(tmp_path / "shared")
    receiver.pull(tmp_path / "shared", trust=[public], notice=notices.append)
    assert "is not signed" in notices[0]
    assert kept(cache_of(receiver)) == []
    sender.push(tmp_path / "signed", sign=secret)
    receiver.pull(tmp_path / "signed", trust=[public])
    assert len(kept(cache_of(receiver))) == 1


def test_a_blob_that_is_too_large_is_not_read(
    sender: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overpaint.transport.vocabularies.LIMIT", 10)
    receiver, notices = Workshop.open(tmp_path / "receiver"), list[str]()
    moved(sender, receiver, "folder", tmp_path, notice=notices.append)
    assert "at most 10" in notices[0]
    assert kept(cache_of(receiver)) == []
