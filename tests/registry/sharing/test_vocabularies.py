"""Kept vocabularies travel with everything, and whatever is wrong with one costs time and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from overpaint.registry.sharing.signing import new_key
from overpaint.registry.store import DIGEST
from overpaint.solvers.vocabulary import Moments, read_vocabulary, vocabulary_file, write_vocabulary
from overpaint.workspace.workspace import Workspace

IDENTITY = {"encoder": "e" * 64, "doors": {"text_encoder": "last"}, "sentences": ["{}"]}
MOMENT = torch.tensor([[2.0, 0.5, 3.0]], dtype=torch.float64)


def kept(folder: Path) -> list[Path]:
    """The whole vocabularies of a folder."""
    return sorted(file for file in folder.glob("*.safetensors") if DIGEST.fullmatch(file.stem))


def cache_of(workspace: Workspace) -> Path:
    return workspace.registry.folder / "cache" / "vocabulary"


@pytest.fixture
def sender(tmp_path: Path) -> Workspace:
    """A registry that kept one whole vocabulary and part of another."""
    workspace = Workspace.open(tmp_path / "sender")
    write_vocabulary(Moments(IDENTITY, 3, {"text_encoder": MOMENT}), cache_of(workspace), complete=True)
    write_vocabulary(
        Moments({**IDENTITY, "encoder": "f" * 64}, 1, {"text_encoder": MOMENT}), cache_of(workspace), complete=False
    )
    return workspace


def moved(sender: Workspace, receiver: Workspace, way: str, tmp_path: Path, **asked: Any) -> None:
    if way == "folder":
        sender.push(tmp_path / "shared")
        receiver.pull(tmp_path / "shared", **asked)
    else:
        sender.export(tmp_path / "all.tar")
        receiver.import_file(tmp_path / "all.tar", **asked)


@pytest.mark.parametrize("way", ["folder", "file"])
def test_whole_vocabularies_come_with_everything(sender: Workspace, tmp_path: Path, way: str) -> None:
    receiver = Workspace.open(tmp_path / "receiver")
    moved(sender, receiver, way, tmp_path)
    assert [file.name for file in cache_of(receiver).iterdir()] == [vocabulary_file(IDENTITY, Path()).name]
    assert torch.equal(read_vocabulary(kept(cache_of(receiver))[0]).moments["text_encoder"], MOMENT)


def test_what_is_here_already_is_neither_sent_nor_taken_again(sender: Workspace, tmp_path: Path) -> None:
    receiver = Workspace.open(tmp_path / "receiver")
    moved(sender, receiver, "folder", tmp_path)
    file = kept(cache_of(receiver))[0]
    before = file.stat().st_mtime_ns
    again = sender.push(tmp_path / "shared")
    assert again.nbytes == 0
    assert receiver.pull(tmp_path / "shared").nbytes == 0
    assert file.stat().st_mtime_ns == before


def test_a_vocabulary_that_is_not_what_it_says_is_left_out_with_notice(sender: Workspace, tmp_path: Path) -> None:
    file = kept(cache_of(sender))[0]
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    receiver, notices = Workspace.open(tmp_path / "receiver"), list[str]()
    moved(sender, receiver, "folder", tmp_path, warn=notices.append)
    assert list(cache_of(receiver).iterdir()) == []
    assert "was left out, and is computed when it is needed" in notices[0]


def test_only_a_signed_one_is_taken_where_that_is_asked(sender: Workspace, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    new_key(tmp_path / "me")
    secret, public = tmp_path / "me", tmp_path / "me.pub"
    receiver, notices = Workspace.open(tmp_path / "receiver"), list[str]()
    sender.push(tmp_path / "shared")
    receiver.pull(tmp_path / "shared", trust=[public], warn=notices.append)
    assert "is not signed" in notices[0]
    assert kept(cache_of(receiver)) == []
    sender.push(tmp_path / "signed", sign=secret)
    receiver.pull(tmp_path / "signed", trust=[public])
    assert len(kept(cache_of(receiver))) == 1


def test_a_blob_that_is_too_large_is_not_read(
    sender: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overpaint.registry.sharing.ingest.VOCABULARY_LIMIT", 10)
    receiver, notices = Workspace.open(tmp_path / "receiver"), list[str]()
    moved(sender, receiver, "folder", tmp_path, warn=notices.append)
    assert "at most 10" in notices[0]
    assert kept(cache_of(receiver)) == []
