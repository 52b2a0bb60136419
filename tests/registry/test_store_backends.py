"""Every place for blobs keeps the contract: a folder, memory, and URLs through fsspec, among them a real S3 server."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest

from overpaint.core.errors import OverpaintError
from overpaint.registry import Registry
from overpaint.registry.files import Files, FolderFiles, RemoteFiles, Unreachable
from overpaint.registry.store import BlobStore, open_files, open_store, place_store

from .contents import add_patch
from .store_contract import StoreContract

PREFIXES = (f"contract-{number}" for number in itertools.count())


class TestFolder(StoreContract):
    @pytest.fixture
    def files(self, tmp_path: Path) -> Files:
        return open_files(tmp_path / "store")


class TestFileUrl(StoreContract):
    @pytest.fixture
    def files(self, tmp_path: Path) -> Files:
        return open_files(f"file://{tmp_path}/store")


class TestMemory(StoreContract):
    @pytest.fixture
    def files(self) -> Files:
        return open_files(f"memory://{uuid4()}")


class TestFsspecMemory(StoreContract):
    @pytest.fixture
    def files(self) -> Files:
        return open_files(f"memory://{next(PREFIXES)}/store")


class TestFsspecFile(StoreContract):
    """A place that shows files while they are written, as most that are no object stores do."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> Files:
        return RemoteFiles(f"file://{tmp_path}/store")


class TestS3(StoreContract):
    @pytest.fixture
    def files(self, bucket: str) -> Files:
        return open_files(f"{bucket}/{next(PREFIXES)}/store")

    def test_a_missing_bucket_is_reported_plainly_and_not_made(self, bucket: str) -> None:
        files = open_files("s3://nobody-made-this-bucket/store")
        with pytest.raises(Unreachable, match="check the address"):
            files.write("a", [b"x"])
        assert files.read("a") is None

    def test_a_registry_may_keep_its_blobs_there(self, files: Files, registry: Registry) -> None:
        place_store(registry.folder, files.where)
        again = Registry.open(registry.folder)
        patch = add_patch(again, "one")
        assert again.blob(patch) == b"one"
        assert [blob.digest for blob in BlobStore(files).blobs()] == [patch.blob]
        assert not (registry.folder / "blobs").exists()


def test_a_path_is_a_folder_and_a_url_is_what_it_says(tmp_path: Path) -> None:
    assert isinstance(open_files(tmp_path), FolderFiles)
    assert isinstance(open_files(str(tmp_path)), FolderFiles)
    assert isinstance(open_files(f"file://{tmp_path}"), FolderFiles)
    assert isinstance(open_files("memory://x"), RemoteFiles)


ACTS: dict[str, Callable[[Files], object]] = {
    "reading": lambda files: files.read("index.json"),
    "reading the beginning": lambda files: files.read("index.json", limit=10),
    "asking": lambda files: files.info("index.json"),
    "listing": lambda files: list(files.walk("blobs")),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("scheme", ["http", "ftp", "webhdfs"])
def test_an_unreachable_server_is_not_taken_for_an_empty_one(scheme: str, act: str) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Unreachable, match=rf"{scheme}://127.0.0.1:{port}/x cannot be used .*(refused|connect)"):
        ACTS[act](open_files(f"{scheme}://127.0.0.1:{port}/x"))


@pytest.mark.parametrize(("status", "missing"), [(404, True), (403, False), (500, False)])
def test_only_a_server_that_says_so_lacks_a_file(status: int, missing: bool) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever).start()
        files = open_files(f"http://127.0.0.1:{server.server_port}/x")
        for act in ACTS.values():
            if missing:
                assert not act(files)
            else:
                with pytest.raises(Unreachable, match=str(status)):
                    act(files)
        server.shutdown()


@pytest.mark.parametrize("url", ["nothing://x/y", "wss://x"])
def test_a_url_of_an_unknown_kind_is_refused(url: str) -> None:
    with pytest.raises(OverpaintError, match="cannot be reached"):
        open_files(url)


def test_blobs_are_not_left_behind_when_a_registry_gets_another_place(registry: Registry) -> None:
    patch = add_patch(registry, "one")
    with pytest.raises(OverpaintError, match="has blobs in"):
        place_store(registry.folder, f"memory://{next(PREFIXES)}")
    assert Registry.open(registry.folder).blob(patch) == b"one"


def test_the_place_of_the_blobs_is_remembered(tmp_path: Path) -> None:
    url = f"memory://{next(PREFIXES)}/blobs"
    digest = place_store(tmp_path, url).put(b"paint")
    assert place_store(tmp_path, url).get(digest) == open_store(tmp_path).get(digest) == b"paint"
    assert list(open_store(tmp_path).digests()) == [digest]
