"""Patches and recipes in a registry that people already run: Debian's docker-registry."""

from __future__ import annotations

import hashlib
import itertools
import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.registry.files import Unreachable
from overpaint.registry.sharing import oci_registry
from overpaint.registry.sharing.documents import INDEX, MANIFEST, PATCH, BadLayout, base_document
from overpaint.registry.sharing.ingest import PullRequest, browse, pull
from overpaint.registry.sharing.layout import OciLayout
from overpaint.registry.sharing.oci_registry import RegistryFiles
from overpaint.registry.sharing.sending import push
from overpaint.registry.sharing.signing import Untrusted, load_keyring, load_signer, new_key
from overpaint.registry.upkeep import verify

from .conftest import FINGERPRINT, holdings, is_empty
from .oci_server import log_in, password_auth, serving, token_auth
from .oci_server import oci_registry as running

ALL = PullRequest()
NAMES = (f"team/patches-{number}" for number in itertools.count())


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logins of whoever runs the tests are left out."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture
def place(host: str) -> str:
    return f"oci://{host}/{next(NAMES)}"


def get(place: str, rest: str) -> bytes:
    """What the registry answers, asked without any of our code."""
    host, _, name = place.removeprefix("oci://").partition("/")
    request = urllib.request.Request(f"http://{host}/v2/{name}/{rest}", headers={"Accept": f"{INDEX}, {MANIFEST}"})
    with urllib.request.urlopen(request) as answer:
        return bytes(answer.read())


def put(place: str, rest: str, data: bytes, media_type: str) -> None:
    host, _, name = place.removeprefix("oci://").partition("/")
    url = f"http://{host}/v2/{name}/{rest}"
    request = urllib.request.Request(url, data, {"Content-Type": media_type}, method="PUT")
    urllib.request.urlopen(request).close()


def test_what_is_pushed_can_be_pulled_and_is_pushed_once(ours: Registry, theirs: Registry, place: str) -> None:
    sent = push(ours, place)
    assert (len(sent.patches), sent.recipes, sent.where) == (3, ("safe",), f"{place}:latest")
    done = pull(theirs, place, ALL)
    assert set(done.new) == set(sent.patches)
    assert done.recipes == (("safe", "new"),)
    assert holdings(theirs) == holdings(ours)
    assert verify(theirs).problems == ()
    tag = get(place, "manifests/latest")
    again = push(ours, place)
    assert (again.written, again.nbytes, get(place, "manifests/latest")) == (0, 0, tag)


def test_a_patch_is_an_artifact_that_refers_to_its_base(ours: Registry, place: str) -> None:
    sent = push(ours, place)
    base = base_document(FINGERPRINT).descriptor.digest
    assert (
        json.loads(get(place, f"manifests/sha256:{base}"))["annotations"]["org.overpaint.base.fingerprint"]
        == FINGERPRINT
    )
    # This registry has no referrers API, so the tag of the specification stands in for it.
    listed = json.loads(get(place, f"manifests/sha256-{base}"))
    assert listed["mediaType"] == INDEX
    patches = [each for each in listed["manifests"] if each["artifactType"] == PATCH]
    configs = {json.loads(get(place, f"manifests/{each['digest']}"))["config"]["digest"] for each in patches}
    assert configs == {f"sha256:{id}" for id in sent.patches}
    assert [each.digest for each in RegistryFiles(place).referrers(base)] == [
        each["digest"].removeprefix("sha256:") for each in listed["manifests"]
    ]


def test_tags_of_one_repository_are_places_of_their_own(ours: Registry, theirs: Registry, place: str) -> None:
    first, second, _ = (record.id for record in ours.patches())
    push(ours, f"{place}:one", patches=[first])
    push(ours, f"{place}:two", patches=[second])
    assert pull(theirs, f"{place}:two", ALL).new == (second,)
    with pytest.raises(NotFound, match=r"nothing was ever pushed to .*:three"):
        pull(theirs, f"{place}:three", ALL)
    base = base_document(FINGERPRINT).descriptor.digest
    assert len(RegistryFiles(place).referrers(base)) == 2


def test_a_digest_pins_what_is_pulled(ours: Registry, theirs: Registry, place: str) -> None:
    first, second, _ = (record.id for record in ours.patches())
    push(ours, place, patches=[first])
    pinned = f"{place}@sha256:{hashlib.sha256(get(place, 'manifests/latest')).hexdigest()}"
    push(ours, place, patches=[second])
    assert pull(theirs, pinned, ALL).new == (first,)
    with pytest.raises(OverpaintError, match="only a tag can be pushed to"):
        push(ours, pinned)


def test_one_patch_or_recipe_can_be_pulled_by_its_own_digest(
    ours: Registry, theirs: Registry, place: str, tmp_path: Path
) -> None:
    new_key(tmp_path / "key")
    push(ours, place, signer=load_signer(tmp_path / "key"))
    entries = OciLayout.at(place).entries()
    recipe = next(each for each in entries if each.annotations.get("org.overpaint.name") == "safe")
    trusted = load_keyring([tmp_path / "key.pub"])
    done = pull(theirs, f"{place}@sha256:{recipe.digest}", PullRequest(trusted=trusted))
    assert (len(done.new), done.recipes) == (2, (("safe", "new"),))


def test_signatures_and_signed_lists_hold_in_a_registry(
    ours: Registry, theirs: Registry, place: str, tmp_path: Path
) -> None:
    new_key(tmp_path / "key")
    new_key(tmp_path / "other")
    push(ours, place, signer=load_signer(tmp_path / "key"))
    with pytest.raises(Untrusted):
        pull(theirs, place, PullRequest(trusted=load_keyring([tmp_path / "other.pub"])))
    assert is_empty(theirs)
    listing = json.loads(get(place, "manifests/latest"))
    short = [each for each in listing["manifests"] if each.get("artifactType") != PATCH]
    put(place, "manifests/latest", json.dumps({**listing, "manifests": short}).encode(), INDEX)
    with pytest.raises(Untrusted, match="somebody removed it"):
        pull(theirs, place, PullRequest(trusted=load_keyring([tmp_path / "key.pub"])))
    assert is_empty(theirs)


def test_a_long_list_is_kept_in_pages(
    ours: Registry, theirs: Registry, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oci_registry, "PAGE_ENTRIES", 2)
    push(ours, place)
    assert len(json.loads(get(place, "manifests/latest"))["manifests"]) == 2
    assert len(pull(theirs, place, ALL).new) == 3
    assert holdings(theirs) == holdings(ours)


def test_a_tag_that_moved_meanwhile_is_merged_and_not_overwritten(
    ours: Registry, theirs: Registry, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (record.id for record in ours.patches())
    push(ours, place, patches=[first])
    list_referrers, moves = RegistryFiles._list_referrers, [second]

    def moving(files: RegistryFiles) -> None:
        list_referrers(files)
        if moves:  # between reading the tag and moving it
            push(ours, place, patches=[moves.pop()])

    monkeypatch.setattr(RegistryFiles, "_list_referrers", moving)
    push(ours, place, patches=[third])
    assert set(pull(theirs, place, ALL).new) == {first, second, third}


def test_a_tag_with_something_else_is_overwritten_only_when_asked(ours: Registry, theirs: Registry, place: str) -> None:
    push(ours, f"{place}:other")
    image = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}).encode()
    put(place, "manifests/latest", image, INDEX)
    with pytest.raises(BadLayout, match="holds something else than patches"):
        push(ours, place)
    with pytest.raises(BadLayout, match="holds something else than patches"):
        pull(theirs, place, ALL)
    assert get(place, "manifests/latest") == image
    push(ours, place, overwrite=True)
    assert len(pull(theirs, place, ALL).new) == 3


def test_a_damaged_blob_is_refused_and_mended_by_the_next_push(
    ours: Registry, theirs: Registry, tmp_path: Path
) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    with running(folder) as host:
        place = f"oci://{host}/patches"
        id = push(ours, place).patches[0]
        stored = folder / f"data/docker/registry/v2/blobs/sha256/{id[:2]}/{id}/data"
        stored.write_bytes(stored.read_bytes()[:-1] + b"!")
        with pytest.raises(BadLayout, match=rf"{id} .*is not what its digest says"):
            pull(theirs, place, ALL)
        assert is_empty(theirs)


@pytest.mark.parametrize(
    "place",
    [
        "oci://localhost:5000",
        "oci://localhost:5000/Upper",
        "oci://ada:secret@localhost:5000/name",
        "OCI://ada:secret@localhost:5000/name",
        "oci+http://ada:secret@localhost:5000/name",
        "oci://ada:correct horse secret@localhost:5000/name",
        "oci://ada:1'secret@localhost:5000/name",
        'oci://ada:1"secret@localhost:5000/name',
        "oci://ada:1<secret>@localhost:5000/name",
        "oci://ada:1\nsecret@localhost:5000/name",
        "oci://localhost:5000/name?token=secret",
        "oci://localhost:5000/name:",
        "oci://localhost:5000/name@sha256:12",
    ],
)
def test_what_names_no_repository_is_refused(ours: Registry, place: str) -> None:
    with pytest.raises(OverpaintError, match="names no repository") as caught:
        push(ours, place)
    assert "secret" not in str(caught.value)


def test_a_registry_that_does_not_answer_is_one_sentence(ours: Registry) -> None:
    with pytest.raises(Unreachable, match="does not answer"):
        push(ours, "oci://127.0.0.1:9/patches")


def test_a_login_is_read_where_docker_keeps_it(
    ours: Registry, theirs: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, password_auth(tmp_path)) as host:
        with pytest.raises(Unreachable, match=f"docker login {host}"):
            push(ours, f"oci://{host}/patches")
        log_in(tmp_path, host, password="wrong")
        with pytest.raises(Unreachable, match="may not"):
            push(ours, f"oci://{host}/patches")
        log_in(tmp_path, host)
        push(ours, f"oci://{host}/patches")
        (tmp_path / ".docker").rename(tmp_path / "elsewhere")
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "elsewhere"))
        assert len(pull(theirs, f"oci://{host}/patches", ALL).new) == 3


def test_a_token_that_may_not_write_leaves_nothing(ours: Registry, theirs: Registry, tmp_path: Path) -> None:
    with token_auth(tmp_path) as auth, running(tmp_path, auth) as host:
        place = f"oci://{host}/patches"
        log_in(tmp_path, host, user="reader")
        with pytest.raises(Unreachable, match="may not write to"):
            push(ours, place)
        with pytest.raises(NotFound):
            pull(theirs, place, ALL)
        log_in(tmp_path, host)
        assert push(ours, place).written > 0
        log_in(tmp_path, host, user="reader")
        assert len(pull(theirs, place, ALL).new) == 3


class Referrers(BaseHTTPRequestHandler):
    """A registry of version 1.1 as far as one list of two pages goes."""

    def do_GET(self) -> None:
        digest = f"sha256:{('b' if 'after' in self.path else 'a') * 64}"
        listed = [{"mediaType": MANIFEST, "digest": digest, "size": 2}]
        page = {"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}
        self.send_response(200)
        if "referrers" in self.path and "after" not in self.path:
            self.send_header("Link", f'<{self.path}?after=a>; rel="next"')
        self.end_headers()
        self.wfile.write(json.dumps(page).encode())

    def log_message(self, *args: object) -> None:
        pass


def test_all_pages_of_the_referrers_api_are_read() -> None:
    with serving(Referrers) as address:
        listed = RegistryFiles(f"oci://{address.removeprefix('http://')}/patches").referrers("c" * 64)
    assert [each.digest[0] for each in listed] == ["a", "b"]


Answer = tuple[int, bytes, dict[str, str]]
PAGE_OF_NOTHING = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}).encode()


@contextmanager
def answering(answer: Callable[[str, str], Answer]) -> Iterator[tuple[RegistryFiles, list[str]]]:
    """A registry that gives these answers to a method and a path, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, body, headers = (200, b"{}", {}) if self.path == "/v2/" else answer(self.command, self.path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # whoever has read enough hangs up
                self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD = do_PUT = do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with serving(Handler) as address:
        yield RegistryFiles(f"oci://{address.removeprefix('http://')}/patches"), asked


def test_a_length_that_is_no_number_is_none() -> None:
    with answering(lambda method, path: (200, b"", {"Content-Length": "abc"})) as (files, _):
        info = files.info("blobs/sha256/" + "0" * 64)
        assert info is not None
        assert info.nbytes == -1


@pytest.mark.parametrize("new", [False, True])
def test_a_list_of_referrers_without_an_end_is_refused(new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oci_registry, "MOST_PAGES", 5)
    numbers = itertools.count()

    def answer(method: str, path: str) -> Answer:
        member = {"mediaType": MANIFEST, "digest": f"sha256:{next(numbers) if new else 0:064}", "size": 2}
        page = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [member]})
        return 200, page.encode(), {"Link": f'<{path}>; rel="next"'}

    with answering(answer) as (files, asked):
        with pytest.raises(BadLayout, match="goes on listing what refers to 000000000000"):
            files.referrers("0" * 64)
        assert len(asked) <= 6


def test_a_list_of_referrers_that_is_far_too_long_is_not_read() -> None:
    with (
        answering(lambda method, path: (200, b" " * (9 << 20), {})) as (files, _),
        pytest.raises(OverpaintError, match="at most 4194304 belong there"),
    ):
        files.referrers("0" * 64)


@pytest.mark.parametrize("annotation", ["", "x"])
def test_a_page_that_is_listed_often_is_read_once(annotation: str) -> None:
    page = hashlib.sha256(PAGE_OF_NOTHING).hexdigest()
    entry = {
        "mediaType": INDEX,
        "digest": f"sha256:{page}",
        "size": len(PAGE_OF_NOTHING),
        "artifactType": oci_registry.PAGE,
    }
    entries = [{**entry, "annotations": {"n": annotation and str(number)}} for number in range(300)]
    content = {"schemaVersion": 2, "mediaType": INDEX, "artifactType": oci_registry.LISTING, "manifests": entries}

    def answer(method: str, path: str) -> Answer:
        return 200, PAGE_OF_NOTHING if path.endswith(page) else json.dumps(content).encode(), {}

    with answering(answer) as (files, asked):
        assert json.loads(files.read("index.json") or b"")["manifests"] == []
        assert sum(path.endswith(page) for path in asked) == 1
        content["manifests"] = [{**entry, "size": 1 << 50}]
        with pytest.raises(BadLayout, match="claim more than"):
            files.read("index.json")


def test_what_a_registry_says_is_one_short_line_that_only_shows() -> None:
    rude = "\x1b[31mRED\x1b]0;title\x07\u202e" + "\n" * 9 + "Z" * 5000 + "\x9b"
    refusal = json.dumps({"errors": [{"message": rude}]}).encode()
    odd = json.dumps({"schemaVersion": 2, "mediaType": rude, "artifactType": [rude]}).encode()
    for status, body in ((400, refusal), (200, odd), (400, b"[" * 100_000), (400, b" " * (9 << 20))):
        with answering(lambda method, path, status=status, body=body: (status, body, {})) as (files, _):  # type: ignore[misc]
            with pytest.raises(OverpaintError) as caught:
                files.read("index.json")
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 700


def test_plain_http_is_for_this_machine_or_by_its_own_scheme() -> None:
    places = ("oci://ghcr.io/a", "oci+http://ghcr.io/a", "oci://[::1]:5/a", "OCI://ghcr.io/a", "OCI+HTTP://ghcr.io/a")
    asked = [RegistryFiles(place)._root for place in places]
    assert asked == [
        f"{scheme}://{host}/v2/"
        for scheme, host in zip(
            ("https", "http", "http", "https", "http"),
            ("ghcr.io", "ghcr.io", "[::1]:5", "ghcr.io", "ghcr.io"),
            strict=True,
        )
    ]
    assert all(map(oci_registry.is_registry, places))


def test_the_patches_of_a_base_are_found_under_every_tag(ours: Registry, theirs: Registry, place: str) -> None:
    first, second, _ = (record.id for record in ours.patches())
    push(ours, f"{place}:one", patches=[first])
    push(ours, f"{place}:two", patches=[second])
    listed = browse(theirs, place, ALL, base="mine", referring=True)
    assert [each.id for each in listed] == sorted([first, second])
    with pytest.raises(NotFound):
        browse(theirs, place, ALL)
    assert [each.id for each in browse(theirs, f"{place}:two", ALL)] == [second]
