"""A repository of an OCI registry as the place of a layout: `oci://HOST/NAME[:TAG]`, by the client `oras`.

There documents are manifests and everything else is a blob. What `index.json` is in a folder is here the index that the
tag names; a long one is kept in pages, because registries refuse manifests of more than 4 MiB. A registry lists by itself
which documents refer to a base; for one that cannot, this program keeps the tag that the OCI distribution specification
(1.1, "Referrers Tag Schema") describes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from overpaint.core.encoding import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.core.names import printed_url, reported
from overpaint.registry.files import FileInfo, Unreachable, too_long
from overpaint.registry.sharing.documents import (
    INDEX,
    INDEX_LIMIT,
    MANIFEST,
    MARK,
    PATCH,
    RECIPE,
    SIGNATURE,
    SUBJECT,
    BadLayout,
    Descriptor,
    members_of,
    read_document,
)

SCHEME = re.compile(r"oci(?P<plain>\+http)?://", re.IGNORECASE)
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?P<host>[^/@]+)/(?P<name>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_LOCAL = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")
LISTING = "application/vnd.overpaint.layout.v1"
"""The artifact type of the index that stands for `index.json`; what else a tag may hold is not touched."""
PAGE = "application/vnd.overpaint.layout.page.v1"
PAGE_ENTRIES = 4000
LARGEST_MANIFEST = 4 << 20
"""The most bytes that registries accept for a manifest (distribution specification, "Pushing Manifests")."""
ANY = f"{INDEX}, {MANIFEST}, application/vnd.docker.distribution.manifest.list.v2+json, "
ANY += "application/vnd.docker.distribution.manifest.v2+json"
TIMEOUT = (20.0, 300.0)
"""Seconds to wait for a connection, and for the next bytes of an answer."""
ATTEMPTS = 4
MOST_PAGES = 1000
"""Of a list of referrers; registries have a hundred entries and more in each."""
LONGEST_ANSWER = 64 << 10
"""How many bytes of a refusal are read."""


def is_registry(location: str | Path) -> bool:
    """Whether a location is `oci://` or, without TLS, `oci+http://`."""
    return isinstance(location, str) and SCHEME.match(location) is not None


class RegistryFiles:
    """The layout in a repository of a registry. Raises OverpaintError for a URL that names none.

    Docker's and oras' logins are used (`config.json`, credential helpers). A registry on this machine is asked without TLS.
    With `overwrite`, a tag that holds something else is written over.
    """

    documents = "manifests/sha256"

    def __init__(self, url: str, *, overwrite: bool = False) -> None:
        scheme = SCHEME.match(url)
        match = scheme and _REFERENCE.fullmatch(url[scheme.end() :])
        if scheme is None or match is None:
            raise OverpaintError(
                f"{printed_url(url)} names no repository of a registry; write oci://HOST/NAME or oci://HOST/NAME:TAG, with "
                "the name in lower case and no user in it (log in with `docker login HOST`)"
            )
        self.host, self.name, digest = match["host"], match["name"], match["digest"]
        self.reference = digest or match["tag"] or "latest"
        self.where = f"oci://{self.host}/{self.name}{'@' if digest else ':'}{self.reference}"
        self._overwrite = overwrite
        plain = scheme["plain"] is not None or _LOCAL.fullmatch(self.host) is not None
        self._root = f"{'http' if plain else 'https'}://{self.host}/v2/"
        self._client = _Client(self.host, self.name, self.where, plain)
        self._referring: dict[str, dict[str, Descriptor]] = {}
        """By subject: documents that were read or written here and refer to it."""
        self._seen = ""
        """The digest of what the tag held when it was last read."""

    def read(self, name: str, *, limit: int | None = None) -> bytes | None:
        if name == "oci-layout":
            return MARK if self.info("index.json") else None
        if name == "index.json":
            return self._read_index()
        data = self._get(self._url(name), limit)
        if data is not None and name.startswith(self.documents):
            self._note_subject(data)
        return data

    def info(self, name: str) -> FileInfo | None:
        response = self._client.ask("HEAD", self._url(name), headers={"Accept": ANY}, missing=True)
        return None if response is None else FileInfo(name, _claimed_length(response), 0.0)

    def write(self, name: str, chunks: Iterable[bytes | memoryview], *, final: bool = True) -> None:
        if name == "oci-layout":
            return  # a registry is one
        data = b"".join(chunks)
        if name == "index.json":
            self._write_index(data)
        elif name.startswith(self.documents):
            self._put_manifest(data, f"sha256:{_sha256(data)}")
            self._note_subject(data)
        else:
            self._put_blob(data)

    def exclusive(self) -> AbstractContextManager[bool]:
        """Nobody can be kept waiting by a registry."""
        return nullcontext(False)

    def referrers(self, digest: str) -> list[Descriptor]:
        """What the registry lists as referring to a document, by its API or by the tag that stands in for it."""
        url: str | None = f"{self._root}{self.name}/referrers/sha256:{digest}"
        listed: dict[str, Descriptor] = {}
        pages = 0
        while url is not None:
            response = self._client.ask("GET", url, stream=True, missing=True)
            if response is None:
                return self._referrers_tag(digest)
            data = self._content(response, url, LARGEST_MANIFEST)
            page = members_of(read_document(data, "the list of referrers"), f"a list of {self.where}")
            new, pages = {each.digest: each for each in page if each.digest not in listed}, pages + 1
            listed |= new
            following = response.links.get("next", {}).get("url")
            url = following and urljoin(url, following)
            if url is not None and (not new or pages == MOST_PAGES):
                raise BadLayout(
                    f"{self.where} goes on listing what refers to {digest[:12]} after {len(listed)} entries in {pages} pages, "
                    f"the last of {len(new)} new ones; nothing was taken from it"
                )
        return list(listed.values())

    def _url(self, name: str) -> str:
        if name == "index.json":
            return f"{self._root}{self.name}/manifests/{self.reference}"
        kind, _, digest = name.rpartition("/sha256/")
        return f"{self._root}{self.name}/{kind}/sha256:{digest}"

    def _get(self, url: str, limit: int | None) -> bytes | None:
        """The content at a URL of at most `limit` bytes. Raises BadFile."""
        response = self._client.ask("GET", url, headers={"Accept": ANY}, stream=True, missing=True)
        return None if response is None else self._content(response, url, limit)

    def _content(self, response: Any, url: str, limit: int | None) -> bytes:
        pieces, nbytes = [], 0
        with response, self._client.plain(url):
            for piece in response.iter_content(1 << 20):
                pieces.append(piece)
                nbytes += len(piece)
                if limit is not None and nbytes > limit:
                    raise too_long(printed_url(url), max(nbytes, _claimed_length(response)), limit)
        return b"".join(pieces)

    def _read_index(self) -> bytes | None:
        data = self._get(self._url("index.json"), INDEX_LIMIT)
        if data is None:
            self._seen = ""
            return None
        self._seen = f"sha256:{_sha256(data)}"
        if self.reference.startswith("sha256:") and self.reference != self._seen:
            raise BadLayout(f"{self.where} is not what its digest says; it was altered, and nothing was taken from it")
        content = read_document(data, self.where)
        kind = content.get("artifactType")
        if kind in (PATCH, RECIPE):
            entries = self._entries_of(data, content)
            return canonical_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})
        if kind != LISTING:
            if self._overwrite:
                return canonical_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": []})
            kinds = reported(
                ", ".join(str(each) for each in (content.get("mediaType") or "no media type", kind) if each)
            )
            raise BadLayout(
                f"{self.where} holds something else than patches ({kinds}); name another tag, or push over it with --overwrite"
            )
        members = members_of(content, self.where)
        entries = [each.as_json() for each in members if each.artifact_type != PAGE]
        pages = {each.digest: each for each in members if each.artifact_type == PAGE}
        if sum(page.size for page in pages.values()) > INDEX_LIMIT:
            raise BadLayout(
                f"the pages of the index of {self.where} claim more than {INDEX_LIMIT} bytes; none was read"
            )
        for page in pages.values():
            entries += self._page(page)
        return canonical_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})

    def _entries_of(self, data: bytes, content: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A patch, or a recipe with its patches, to which a reference points directly; and the signatures over them."""
        entries = [Descriptor.of(data, str(content.get("mediaType")), str(content["artifactType"]))]
        if content["artifactType"] == RECIPE:
            entries += [each for each in members_of(content, self.where) if each.artifact_type == PATCH]
        signatures = [
            Descriptor(each.media_type, each.digest, each.size, SIGNATURE, {SUBJECT: entry.digest})
            for entry in {each.digest: each for each in entries}.values()
            for each in self.referrers(entry.digest)
            if each.artifact_type == SIGNATURE
        ]
        return [each.as_json() for each in (*entries, *signatures)]

    def _page(self, entry: Descriptor) -> list[dict[str, Any]]:
        page = self._get(self._url(f"{self.documents}/{entry.digest}"), entry.size)
        if page is None or _sha256(page) != entry.digest:
            raise BadLayout(f"a page of the index of {self.where} is missing or altered; its owner should push again")
        return [each.as_json() for each in members_of(read_document(page, self.where), self.where)]

    def _write_index(self, data: bytes) -> None:
        """Move the tag, unless it was moved since it was read: the layout then looks again, and merges."""
        if self.reference.startswith("sha256:"):
            raise OverpaintError(f"{self.where} is a digest, and only a tag can be pushed to; name a tag")
        self._list_referrers()
        entries = json.loads(data)["manifests"]
        if len(entries) > PAGE_ENTRIES:
            pages = [entries[start : start + PAGE_ENTRIES] for start in range(0, len(entries), PAGE_ENTRIES)]
            entries = [self._put_index(page, PAGE).as_json() for page in pages]
        now = self._client.ask("HEAD", self._url("index.json"), headers={"Accept": ANY}, missing=True)
        if now is None or not self._seen or now.headers.get("Docker-Content-Digest", self._seen) == self._seen:
            self._put_index(entries, LISTING, self.reference)

    def _put_index(self, entries: list[dict[str, Any]], artifact_type: str, reference: str = "") -> Descriptor:
        content = {"schemaVersion": 2, "mediaType": INDEX, "artifactType": artifact_type, "manifests": entries}
        data = canonical_json(content if artifact_type else {k: v for k, v in content.items() if k != "artifactType"})
        self._put_manifest(data, reference or f"sha256:{_sha256(data)}")
        return Descriptor.of(data, INDEX, artifact_type)

    def _put_manifest(self, data: bytes, reference: str) -> None:
        headers = {"Content-Type": json.loads(data)["mediaType"]}
        url = f"{self._root}{self.name}/manifests/{reference}"
        self._client.ask("PUT", url, data=data, headers=headers)

    def _put_blob(self, data: bytes) -> None:
        started = self._client.ask("POST", f"{self._root}{self.name}/blobs/uploads/")
        location = urljoin(self._root, started.headers.get("Location", ""))
        place = f"{location}{'&' if '?' in location else '?'}digest=sha256:{_sha256(data)}"
        self._client.ask("PUT", place, data=data, headers={"Content-Type": "application/octet-stream"})

    def _note_subject(self, data: bytes) -> None:
        with suppress(BadLayout):  # whoever asked for it finds out what is wrong with it
            content = read_document(data, self.where)
            if "subject" in content:
                subject = Descriptor.from_json(content["subject"], self.where)
                kinds = str(content.get("mediaType")), str(content.get("artifactType", ""))
                described = Descriptor.of(data, *kinds, annotations=content.get("annotations") or {})
                self._referring.setdefault(subject.digest, {})[described.digest] = described

    def _list_referrers(self) -> None:
        """Where the registry has no API for it, keep the tags that say which documents refer to which."""
        for subject, documents in sorted(self._referring.items()):
            if self._client.ask("GET", f"{self._root}{self.name}/referrers/sha256:{subject}", missing=True):
                return
            known = {each.digest: each for each in self._referrers_tag(subject)}
            if documents.keys() - known.keys():
                every = {**known, **documents}
                entries = [every[digest].as_json() for digest in sorted(every)]
                if len(canonical_json(entries)) < LARGEST_MANIFEST - 1000:  # a longer list has no place there
                    self._put_index(entries, "", f"sha256-{subject}")

    def _referrers_tag(self, digest: str) -> list[Descriptor]:
        data = self._get(f"{self._root}{self.name}/manifests/sha256-{digest}", LARGEST_MANIFEST)
        return (
            [] if data is None else members_of(read_document(data, "the list of referrers"), f"a list of {self.where}")
        )


class _Client:
    """Requests to one registry by `oras`, which knows the logins; every refusal is one sentence."""

    def __init__(self, host: str, name: str, where: str, plain: bool) -> None:
        self._host, self._name, self._where, self._plain_http = host, name, where, plain
        self._lock = threading.Lock()
        self._connected: Any = None

    def ask(
        self,
        method: str,
        url: str,
        *,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
        missing: bool = False,
    ) -> Any:
        """An answer that is no refusal, with `stream` its content unread; None for what is not there, if it may be `missing`."""
        with self._lock:
            if self._connected is None:
                self._connected = self._connect()
        with self.plain(url):
            response = self._send(method, url, data, headers)
            if stream and response.status_code < 400:
                return response
            answer = _beginning(response, LONGEST_ANSWER)
        if missing and response.status_code == 404:
            return None
        if response.status_code >= 400:
            raise self._refused(method, response, answer)
        return response

    def _send(self, method: str, url: str, data: bytes | None, headers: Mapping[str, str] | None) -> Any:
        client = self._connected
        # Without oras' own attempts, which wait for more than two minutes where nobody listens.
        request = type(client).do_request.__wrapped__
        response = request(client, url, method, data=data, headers=dict(headers or {}), stream=True)
        if response.status_code == 401 and getattr(client.auth, "token", None):
            client.auth.token = None  # it was for reading, and oras gets none for writing while it has one
            response = request(client, url, method, data=data, headers=dict(headers or {}), stream=True)
        return response

    def _connect(self) -> Any:
        """A client with the login that this machine has for the host, in the way that the registry asks for."""
        try:
            from oras.container import Container  # type: ignore[import-untyped]
            from oras.provider import Registry  # type: ignore[import-untyped]
            from requests.adapters import HTTPAdapter
            from urllib3.util import Retry
        except ImportError:
            raise OverpaintError("oci:// needs the package oras; run `pip install 'overpaint[oci]'`") from None
        retries = Retry(
            ATTEMPTS, connect=1, backoff_factor=0.3, status_forcelist=(429, 502, 503, 504), allowed_methods=None,
            raise_on_status=False,
        )  # fmt: skip
        for backend in ("token", "basic"):
            client = Registry(self._host, insecure=self._plain_http, auth_backend=backend)
            client.session.mount(
                f"{client.prefix}://", _with_timeout(HTTPAdapter)(max_retries=retries, pool_maxsize=16)
            )
            if backend == "token":
                url = f"{client.prefix}://{self._host}/v2/"
                with self.plain(self._host), client.session.get(url, stream=True) as answer:
                    challenge = answer.headers.get("WWW-Authenticate", "")
            if backend == "basic" or not challenge.lower().startswith("basic"):
                break
        folder = os.environ.get("DOCKER_CONFIG")
        try:
            configs = [str(Path(folder) / "config.json")] if folder else []
            client.auth.load_configs(Container(f"{self._host}/{self._name}"), configs=configs)
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise OverpaintError(f"Docker's config.json cannot be read ({error}); mend it, or log in again") from error
        if backend == "basic" and not hasattr(client.auth, "_basic_auth"):
            raise self._no_login()
        return client

    @contextmanager
    def plain(self, url: str) -> Iterator[None]:
        """Turn what oras and requests raise into one error without credentials."""
        from requests.exceptions import RequestException, SSLError

        try:
            yield
        except SSLError as error:
            raise Unreachable(
                f"{self._where} does not speak TLS as it should ({reported(str(error))}); check the address, or ask it without "
                "TLS with --plain-http"
            ) from None
        except RequestException as error:
            raise Unreachable(
                f"{self._where} does not answer ({reported(str(error), url)}); check the address and the network"
            ) from None
        except ValueError as error:  # how oras says that it has no login to answer with
            if "authentication" in str(error):
                raise self._no_login() from None
            raise Unreachable(
                f"{self._where} cannot be used ({reported(str(error), url)}); check the address"
            ) from None

    def _no_login(self) -> Unreachable:
        return Unreachable(
            f"{self._where} asks for a login, and this machine has none for {self._host}; run `docker login {self._host}` or "
            f"`oras login {self._host}`"
        )

    def _refused(self, method: str, response: Any, answer: bytes) -> Unreachable:
        try:
            errors = json.loads(answer)["errors"]
            details = "; ".join(str(each.get("message") or each.get("code")) for each in errors if each)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            details = response.reason or ""
        reason = reported(f"{response.status_code} {details}".strip())
        if response.status_code in (401, 403):
            act = "read from" if method in ("GET", "HEAD") else "write to"
            return Unreachable(
                f"the login of this machine may not {act} {self._where} ({reason}); ask its owner, or log in as somebody else "
                f"with `docker login {self._host}`. Nothing was listed there"
            )
        return Unreachable(f"{self._where} refused this ({reason}); what was sent before it is not listed there")


def _with_timeout(adapter: Any) -> Any:
    class Patient(adapter):  # type: ignore[misc]
        def send(self, request: Any, **options: Any) -> Any:
            return super().send(request, **{**options, "timeout": options.get("timeout") or TIMEOUT})

    return Patient


def _beginning(response: Any, limit: int) -> bytes:
    """The first bytes of an answer, which is then closed."""
    data = b""
    with response:
        for piece in response.iter_content(limit):
            data += piece
            if len(data) >= limit:
                break
    return data[:limit]


def _claimed_length(response: Any) -> int:
    """How many bytes an answer claims to have; -1 for none that is a number."""
    text = response.headers.get("Content-Length", "")
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else -1


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
