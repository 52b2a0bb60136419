"""What the blob store promises."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint.errors import OverpaintError
from overpaint.registry.store import BlobCorrupt, BlobMissing, BlobStore


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def path_of(store: BlobStore, digest: str) -> Path:
    return store.folder / "blobs" / "sha256" / digest[:2] / digest


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def damage(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


@given(st.binary(max_size=300))
@settings(max_examples=15, deadline=None)
def test_any_bytes_come_back_under_their_digest(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        digest = BlobStore(Path(folder)).put(data)
        assert digest == hashlib.sha256(data).hexdigest()
        assert BlobStore(Path(folder)).get(digest) == data


def test_storing_twice_keeps_one_object(store: BlobStore) -> None:
    assert store.put(b"paint") == store.put(b"paint")
    assert len(files_in(store.folder)) == 1


def test_a_blob_is_read_only_and_listed(store: BlobStore) -> None:
    digests = sorted(store.put(data) for data in (b"a", b"b", b"c"))
    path_of(store, digests[0]).with_name(".tmp-left-by-a-killed-process").write_bytes(b"half")
    assert list(store.digests()) == digests
    assert path_of(store, digests[0]).stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("bytes_now", [b"pain", b"paint!", b"Paint", b""], ids=["short", "long", "flipped", "empty"])
def test_a_corrupt_blob_is_quarantined_and_reported_not_deleted(store: BlobStore, bytes_now: bytes) -> None:
    digest = store.put(b"paint")
    damage(path_of(store, digest), bytes_now)
    with pytest.raises(BlobCorrupt, match=digest):
        store.get(digest)
    assert not store.exists(digest)
    assert [path.read_bytes() for path in files_in(store.folder / "quarantine")] == [bytes_now]
    with pytest.raises(BlobMissing, match="quarantine"):
        store.get(digest)


def test_two_corruptions_of_one_blob_are_both_kept(store: BlobStore) -> None:
    for bytes_now in (b"first", b"second"):
        digest = store.put(b"paint")
        damage(path_of(store, digest), bytes_now)
        with pytest.raises(BlobCorrupt):
            store.get(digest)
    assert {path.read_bytes() for path in files_in(store.folder / "quarantine")} == {b"first", b"second"}


def test_storing_over_a_corrupt_blob_heals_it(store: BlobStore) -> None:
    digest = store.put(b"paint")
    damage(path_of(store, digest), b"pain")
    store.put(b"paint")
    assert store.get(digest) == b"paint"
    assert [path.read_bytes() for path in files_in(store.folder / "quarantine")] == [b"pain"]


def test_a_missing_blob_is_named(store: BlobStore) -> None:
    assert not store.exists("0" * 64)
    with pytest.raises(BlobMissing, match="0" * 64):
        store.get("0" * 64)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "0" * 63, "A" * 64, "0" * 64 + "\n"])
def test_what_is_not_a_digest_never_becomes_a_path(store: BlobStore, digest: str) -> None:
    with pytest.raises(OverpaintError, match="not a blob's digest"):
        store.get(digest)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store.put(b"something before, so that the folders are there")
    digest = hashlib.sha256(b"paint").hexdigest()
    path_of(store, digest).parent.mkdir(exist_ok=True)
    before = files_in(store.folder)
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(OverpaintError, match="is full; free some space"):
        store.put(b"paint")
    monkeypatch.undo()
    assert files_in(store.folder) == before
    assert store.get(store.put(b"paint")) == b"paint"


def test_a_read_only_folder_is_one_sentence(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", failing(errno.EROFS))
    with pytest.raises(OverpaintError, match="read-only"):
        store.put(b"paint")


def test_a_write_that_loses_bytes_is_noticed(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data))
    with pytest.raises(OverpaintError, match="0 bytes arrived"):
        store.put(b"paint")
    assert files_in(store.folder) == []


def test_the_file_is_durable_before_its_name_and_the_name_before_the_return(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor: int) -> None:
        calls.append("sync " + ("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"))
        fsync(descriptor)

    def watch_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    store.put(b"paint")
    assert calls[-3:] == ["sync file", "rename", "sync folder"]
