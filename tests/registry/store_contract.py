"""What every place for blobs must do. A test class for one place inherits this and gives it `files`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import pytest

from overpaint.core.errors import OverpaintError
from overpaint.registry.files import BadFile, Files
from overpaint.registry.store import BlobCorrupt, BlobMissing, BlobStore

EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()


def name_of(digest: str) -> str:
    return f"blobs/sha256/{digest[:2]}/{digest}"


def damage(files: Files, digest: str, data: bytes) -> None:
    files.write(name_of(digest), [data])


def contents(files: Files, folder: str) -> list[bytes]:
    return sorted(files.read(info.name) or b"" for info in files.walk(folder))


class StoreContract:
    """Inherited by the tests of every backend."""

    @pytest.fixture
    def files(self) -> Files:
        raise NotImplementedError

    @pytest.fixture
    def store(self, files: Files) -> BlobStore:
        return BlobStore(files)

    # Blobs

    @pytest.mark.parametrize("data", [b"", b"paint", bytes(range(256)) * 999], ids=["empty", "short", "long"])
    def test_bytes_come_back_under_their_digest(self, store: BlobStore, data: bytes) -> None:
        digest = store.put(data)
        assert digest == hashlib.sha256(data).hexdigest()
        assert store.get(digest) == data
        assert store.exists(digest)

    def test_parts_are_stored_as_one(self, store: BlobStore) -> None:
        digest = store.put(b"pa", memoryview(b"_int_")[1:-1], b"")
        assert store.get(digest) == b"paint"

    def test_storing_twice_keeps_one_object(self, store: BlobStore) -> None:
        assert store.put(b"paint") == store.put(b"paint")
        assert len(list(store.files.walk("blobs"))) == 1

    def test_digests_are_sorted_and_blobs_have_sizes_and_times(self, store: BlobStore) -> None:
        started = time.time()
        digests = sorted(store.put(data) for data in (b"a", b"bb", b"ccc"))
        assert list(store.digests()) == digests
        assert sorted(blob.nbytes for blob in store.blobs()) == [1, 2, 3]
        for blob in store.blobs():
            assert abs(blob.modified - started) < 300
            assert store.find(blob.digest) == blob

    def test_what_was_never_put_is_missing_and_named(self, store: BlobStore) -> None:
        assert not store.exists("0" * 64)
        assert store.find("0" * 64) is None
        assert list(store.blobs()) == []
        assert list(store.leftovers()) == []
        with pytest.raises(BlobMissing, match="0" * 64):
            store.get("0" * 64)

    @pytest.mark.parametrize("now", [b"pain", b"paint!", b"Paint", b""], ids=["short", "long", "flipped", "empty"])
    def test_a_damaged_blob_is_quarantined_and_reported_not_deleted(self, store: BlobStore, now: bytes) -> None:
        digest = store.put(b"paint")
        damage(store.files, digest, now)
        with pytest.raises(BlobCorrupt, match=digest):
            store.get(digest)
        assert not store.exists(digest)
        assert contents(store.files, "quarantine") == [now]
        with pytest.raises(BlobMissing, match="quarantine"):
            store.get(digest)

    def test_two_damages_of_one_blob_are_both_preserved(self, store: BlobStore) -> None:
        for now in (b"first", b"second"):
            digest = store.put(b"paint")
            damage(store.files, digest, now)
            with pytest.raises(BlobCorrupt):
                store.get(digest)
        assert contents(store.files, "quarantine") == [b"first", b"second"]

    def test_storing_over_a_damaged_blob_heals_it(self, store: BlobStore) -> None:
        digest = store.put(b"paint")
        damage(store.files, digest, b"pain")
        store.put(b"paint")
        assert store.get(digest) == b"paint"
        assert contents(store.files, "quarantine") == [b"pain"]

    def test_what_is_discarded_is_gone_and_may_come_again(self, store: BlobStore) -> None:
        digest = store.put(b"paint")
        store.discard(digest)
        store.discard(digest)
        assert not store.exists(digest)
        assert store.put(b"paint") == digest
        assert store.get(digest) == b"paint"

    @pytest.mark.parametrize("digest", ["", "../../etc/passwd", "0" * 63, "A" * 64, "0" * 64 + "\n"])
    def test_what_is_not_a_digest_never_becomes_a_name(self, store: BlobStore, digest: str) -> None:
        for attempt in (store.get, store.exists, store.discard):
            with pytest.raises(OverpaintError, match="not a blob's digest"):
                attempt(digest)

    # Files

    def test_a_file_that_fails_half_way_leaves_what_was_there(self, files: Files) -> None:
        def failing() -> Iterator[bytes]:
            yield b"half"
            raise RuntimeError("the source went away")

        files.write("folder/kept", [b"before"], final=False)
        for name in ("folder/kept", "folder/new"):
            with pytest.raises(RuntimeError, match="went away"):
                files.write(name, failing())
        assert files.read("folder/kept") == b"before"
        assert [info.name for info in files.walk("folder")] == ["folder/kept"]

    def test_a_file_may_be_written_again_moved_and_removed(self, files: Files) -> None:
        for data in (b"one", b"two"):
            files.write("folder/a", [data], final=False)
        files.move("folder/a", "other/b")
        assert files.read("folder/a") is None
        assert files.read("other/b") == b"two"
        files.remove("other/b")
        files.remove("other/b")
        assert files.info("other/b") is None

    def test_a_folder_is_not_a_file(self, files: Files) -> None:
        files.write("folder/a", [b"x"])
        assert files.info("folder") is None

    def test_a_file_that_is_longer_than_allowed_is_not_read(self, files: Files) -> None:
        files.write("folder/a", [b"12345"])
        assert files.read("folder/a", limit=5) == b"12345"
        with pytest.raises(BadFile, match="5 bytes, and at most 4"):
            files.read("folder/a", limit=4)

    def test_refreshing_returns_whether_the_file_is_there(self, files: Files) -> None:
        files.write("folder/a", [b"x"])
        assert files.refresh("folder/a")
        assert not files.refresh("folder/b")

    @pytest.mark.parametrize("name", ["../a", "a/../b", "/etc/passwd", "a//b", ".", "", "a\0b", "..\\a"])
    def test_no_name_leads_out_of_the_place(self, files: Files, name: str) -> None:
        with pytest.raises(BadFile, match="not the name of a file"):
            files.read(name)
        with pytest.raises(BadFile, match="not the name of a file"):
            files.write(name, [b"x"])
