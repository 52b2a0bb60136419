"""What a store in a local folder promises beyond the contract of every place: modes, durability, a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint.core.errors import OverpaintError
from overpaint.registry.files import BadFile
from overpaint.registry.store import BlobCorrupt, BlobStore, as_digested, open_files


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(open_files(tmp_path))


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def path_of(store: BlobStore, digest: str) -> Path:
    return Path(store.files.where) / "blobs" / "sha256" / digest[:2] / digest


def files_in(store: BlobStore) -> list[Path]:
    return [path for path in Path(store.files.where).rglob("*") if path.is_file()]


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


@given(st.lists(st.binary(max_size=300), max_size=4))
@settings(max_examples=15, deadline=None)
def test_any_parts_come_back_as_one_under_their_digest(parts: list[bytes]) -> None:
    with TemporaryDirectory() as folder:
        digest = BlobStore(open_files(folder)).put(*parts)
        assert digest == hashlib.sha256(b"".join(parts)).hexdigest()
        assert BlobStore(open_files(folder)).get(digest) == b"".join(parts)


@pytest.mark.usefixtures("usual_umask")
def test_a_blob_is_read_only_for_whom_the_umask_lets_in(store: BlobStore) -> None:
    assert path_of(store, store.put(b"a")).stat().st_mode & 0o777 == 0o444
    os.umask(0o077)
    assert path_of(store, store.put(b"b")).stat().st_mode & 0o777 == 0o400


def test_what_a_killed_writer_left_is_no_blob(store: BlobStore) -> None:
    digest = store.put(b"a")
    path_of(store, digest).with_name(".tmp-left-by-a-killed-process").write_bytes(b"half")
    assert list(store.digests()) == [digest]
    assert [info.nbytes for info in store.leftovers()] == [4]


def test_a_blob_that_cannot_be_set_aside_is_still_refused(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = store.put(b"paint")
    path_of(store, digest).chmod(0o644)
    path_of(store, digest).write_bytes(b"pain")
    monkeypatch.setattr(os, "replace", failing(errno.EROFS))
    with pytest.raises(BlobCorrupt, match=f"kept as .*{digest}"):
        store.get(digest)
    assert path_of(store, digest).read_bytes() == b"pain"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store.put(b"something before, so that the folders are there")
    digest = hashlib.sha256(b"paint").hexdigest()
    path_of(store, digest).parent.mkdir(exist_ok=True)
    before = files_in(store)
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(OverpaintError, match="is full; free some space"):
        store.put(b"paint")
    monkeypatch.undo()
    assert files_in(store) == before
    assert store.get(store.put(b"paint")) == b"paint"


def test_a_read_only_folder_is_one_sentence(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", failing(errno.EROFS))
    with pytest.raises(OverpaintError, match="read-only"):
        store.put(b"paint")


def test_a_write_that_loses_bytes_is_noticed(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data))
    with pytest.raises(OverpaintError, match="0 bytes are on the disk"):
        store.put(b"paint")
    assert files_in(store) == []


def test_bytes_that_change_while_they_are_written_get_no_name(store: BlobStore) -> None:
    digest = hashlib.sha256(b"paint").hexdigest()
    with pytest.raises(BlobCorrupt, match="nothing was kept"):
        store.files.write(f"blobs/sha256/{digest[:2]}/{digest}", as_digested([b"pa", b"nt"], digest))
    assert files_in(store) == []


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


def test_putting_again_makes_a_blob_look_new_to_the_collector_of_garbage(store: BlobStore) -> None:
    digest = store.put(b"paint")
    os.utime(path_of(store, digest), (0, 0))
    store.put(b"paint")
    found = store.find(digest)
    assert found is not None
    assert found.modified > 1e9


def test_links_and_pipes_are_not_read(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    files = open_files(folder)
    with pytest.raises(BadFile, match="symbolic link"):
        files.read("link")
    with pytest.raises(BadFile, match="not a plain file"):
        files.read("pipe")
    assert list(files.walk(".hidden")) == []
    assert files.info("link") is None
