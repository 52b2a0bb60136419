"""A stand-in for the Hugging Face Hub's HTTP API, as far as `huggingface_hub` asks it for commits and files.

It is no Hub: it was written from the requests of huggingface_hub 2.4 and its documented answers. All files come within a
commit; the Hub lets large ones go to its own storage first, which is huggingface_hub's matter.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from .oci_server import serving

WRITER, READER = "hf_writer", "hf_reader"


@dataclass
class Hub:
    """What the stand-in holds: per repository its commits, oldest first, each with all files."""

    address: str = ""
    repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    before_commit: Callable[[], None] = lambda: None
    claimed: dict[str, int] = field(default_factory=dict)
    """The size that the list of files gives, where it is not the true one."""

    def commit(self, repo: str, changes: dict[str, bytes]) -> str:
        """Add files on top of the newest commit."""
        commits = self.repositories.setdefault(repo, [])
        files = {**(commits[-1][1] if commits else {}), **changes}
        oid = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits.append((oid, files))
        return oid

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        """The files of a branch or commit."""
        found = self.at(repo, revision)
        return None if found is None else found[1]

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories[repo]
        return next((each for each in reversed(commits) if revision in ("main", each[0])), None)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run one in a thread."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, content: object = None, status: int = 200, error: str = "") -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            if error:
                self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(OSError):  # whoever has read enough hangs up
                self.wfile.write(b"" if self.command == "HEAD" else data)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
            match = match or re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/(.+)", path)
            if match is None:
                self.answer({"error": f"the stand-in does not know {path}"}, 501)
                return
            repo, what, rest = match.groups()
            if repo not in hub.repositories:
                self.answer({"error": "Repository not found"}, 404, "RepoNotFound")
                return
            revision, _, name = (rest or "main").partition("/")
            found = hub.at(repo, revision)
            if found is None:
                self.answer({"error": "Invalid rev id"}, 404, "RevisionNotFound")
            elif what == "tree":
                self.answer(
                    [
                        {"type": "file", "path": p, "size": hub.claimed.get(p, len(d)), "oid": "0"}
                        for p, d in found[1].items()
                    ]
                )
            elif what == "resolve":
                self.answer(found[1][name]) if name in found[1] else self.answer({}, 404, "EntryNotFound")
            else:
                self.answer({"_id": "1", "id": repo, "sha": found[0], "siblings": [], "private": repo in hub.private})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path, body = unquote(urlsplit(self.path).path), self.body()
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif token != WRITER:
                self.answer({"error": "You don't have the rights"}, 403 if token == READER else 401)
            elif path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                hub.commit(repo, {".gitattributes": b""})
                hub.private |= {repo} if asked.get("visibility") == "private" or asked.get("private") else set()
                self.answer({"url": f"{hub.address}/{repo}"})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
                modes = [
                    {
                        "path": each["path"],
                        "uploadMode": "regular",
                        "shouldIgnore": False,
                    }
                    for each in json.loads(body)["files"]
                ]
                self.answer({"files": modes})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
                hub.before_commit()
                self.answer(*self.committed(match[1], body))
            else:
                self.answer({"error": f"the stand-in does not know {path}"}, 501)

        def committed(self, repo: str, body: bytes) -> tuple[object, int]:
            changes: dict[str, bytes] = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header" and value.get("parentCommit") not in (None, hub.repositories[repo][-1][0]):
                    return {"error": "A commit has happened since. Please refresh and try again."}, 412
                if line["key"] == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
            oid = hub.commit(repo, changes)
            return {"success": True, "commitOid": oid, "commitUrl": f"{hub.address}/{repo}/commit/{oid}"}, 200

        def body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def log_message(self, *args: object) -> None:
            pass

    with serving(Handler) as address:
        hub.address = address
        yield hub
