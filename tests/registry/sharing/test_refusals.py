"""A place that is not there, that refuses, or that was half written: one clear sentence for each."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.registry.files import Unreachable
from overpaint.registry.sharing.documents import BadLayout
from overpaint.registry.sharing.ingest import PullRequest, import_file, pull
from overpaint.registry.sharing.sending import export, push
from overpaint.registry.sharing.signing import load_keyring

from .conftest import is_empty

ALL = PullRequest()


@pytest.fixture
def place(ours: Registry, tmp_path: Path) -> Path:
    push(ours, tmp_path / "shared")
    return tmp_path / "shared"


class Server(ThreadingHTTPServer):
    """A web server for the files of a folder, which can do worse."""

    folder = Path()
    behaviour: int | str = "serve"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        behaviour, file = self.server.behaviour, self.server.folder / self.path.lstrip("/")
        if isinstance(behaviour, int):
            self.send_error(behaviour)
            return
        if behaviour == "hang up":
            self.connection.close()
            return
        if behaviour != "login page" and not file.is_file():
            self.send_error(404)
            return
        data = b"<html>Log in</html>" if behaviour == "login page" else file.read_bytes()
        self.send_response(302 if behaviour == "in circles" else 200)
        self.send_header("Location", self.path)
        if behaviour != "no length":
            self.send_header("Content-Length", str(len(data) + 100 * (behaviour == "cut short")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(place: Path) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.folder = place
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("behaviour", ["serve", "no length"])
def test_what_a_web_server_has_can_be_pulled(theirs: Registry, server: Server, behaviour: str) -> None:
    server.behaviour = behaviour
    assert len(pull(theirs, server.url, ALL).new) == 3


@pytest.mark.parametrize(
    ("behaviour", "kind", "message"),
    [
        (401, Unreachable, "401"),
        (403, Unreachable, "Forbidden"),
        (404, NotFound, "nothing was ever pushed"),
        (500, Unreachable, "500"),
        (503, Unreachable, "503"),
        ("hang up", Unreachable, "disconnected"),
        ("cut short", Unreachable, "not completed"),
        ("in circles", Unreachable, "cannot be used"),
        ("login page", BadLayout, "something else answers at this address"),
    ],
)
def test_a_server_that_refuses_is_not_an_empty_place(
    theirs: Registry, server: Server, behaviour: int | str, kind: type[OverpaintError], message: str
) -> None:
    server.behaviour = behaviour
    with pytest.raises(kind, match=message):
        pull(theirs, server.url, ALL)
    assert is_empty(theirs)


def test_a_place_that_can_only_be_read_takes_no_push(ours: Registry, server: Server) -> None:
    with pytest.raises(Unreachable, match="only be read"):
        push(ours, server.url)


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "simplecache::http"])
def test_a_port_where_nobody_listens_is_not_an_empty_place(theirs: Registry, scheme: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"{scheme}://127.0.0.1:{taken.getsockname()[1]}/x"
        for use in (lambda: pull(theirs, url, ALL), lambda: push(theirs, url)):
            with pytest.raises(Unreachable, match=r"refused|Connect call failed"):
                use()


@pytest.mark.parametrize(
    "url", ["http://", "http://127.0.0.1:99999/x", "http://127.0.0.1:abc/x", "http://[::1", "zip://x"]
)
def test_an_address_that_cannot_be_is_not_an_empty_place(theirs: Registry, url: str) -> None:
    with pytest.raises(OverpaintError, match=r"cannot be (used|reached)"):
        pull(theirs, url, ALL)


@pytest.mark.parametrize("place", ["", " ", "file://", None, 7])
def test_what_names_no_place_is_refused(
    ours: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.listdir(tmp_path)
    for use in (lambda: push(ours, place), lambda: pull(ours, place, ALL)):
        with pytest.raises(OverpaintError, match="a folder or a URL is needed"):
            use()
    assert os.listdir(tmp_path) == before


def test_a_file_in_place_of_a_folder_and_the_reverse(ours: Registry, place: Path, tmp_path: Path) -> None:
    export(ours, tmp_path / "file")
    for use in (lambda: push(ours, tmp_path / "file"), lambda: pull(ours, tmp_path / "file", ALL)):
        with pytest.raises(OverpaintError, match=r"is a file.*overpaint import"):
            use()
    with pytest.raises(NotFound, match="is a folder; `overpaint pull`"):
        import_file(ours, place, ALL)


def rewrite(place: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (place / name).write_bytes(change((place / name).read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place: (place / "index.json").unlink(), "a push to it was never finished"),
        (lambda place: rewrite(place, "index.json", lambda data: data[:50]), "is not JSON"),
        (lambda place: rewrite(place, "index.json", lambda data: b""), "is not JSON"),
        (lambda place: (place / "oci-layout").unlink(), "lacks the file oci-layout"),
        (lambda place: rewrite(place, "oci-layout", lambda data: b""), "does not say what it should"),
        (lambda place: (place / "blobs").rename(place / "elsewhere"), "lacks the blob"),
    ],
)
def test_a_layout_that_was_half_written_is_called_so(
    theirs: Registry, place: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(place)
    with pytest.raises(BadLayout, match=message):
        pull(theirs, place, ALL)
    assert is_empty(theirs)


@pytest.mark.parametrize("name", ["oci-layout", "index.json"])
def test_a_file_that_may_not_be_read_is_called_so(
    theirs: Registry, place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    really_open = os.open

    def refusing(path: str | Path, *rest: int, **named: int) -> int:
        if str(path) == str(place / name):
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(OverpaintError, match=f"cannot read .*{name}: this user may not"):
        pull(theirs, place, ALL)


@pytest.mark.parametrize("key", ["x" * 3000, "a\0b", "~nobody-of-that-name/me.pub", "missing.pub"])
def test_keys_that_cannot_be_read_are_one_sentence(key: str) -> None:
    with pytest.raises(OverpaintError, match=r"cannot be used as a path|home folder|missing\.pub"):
        load_keyring([key])
