"""Debian's `docker-registry` in a temporary folder, on a free port: open, with a password, or with tokens."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

REQUIRED = "OVERPAINT_OCI_REGISTRY"
"""Set to "required", a missing program fails the tests that need it instead of skipping them."""
USER, PASSWORD = "ada", "s3cret-word"
HASHED = "$2b$04$abcdefghijklmnopqrstuuzQDw2v3CQSMowG.sq3X.nH1lfmlmQMW"
"""The password, by bcrypt."""
START_SECONDS = 30
ISSUER, SERVICE = "overpaint-tests", "registry"


def program() -> str:
    """The registry's program; skips the test where there is none."""
    path = shutil.which("docker-registry")
    if path is None:
        missing = "docker-registry is not installed (on Debian: apt-get install docker-registry)"
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    return path


@contextmanager
def oci_registry(folder: Path, auth: str = "") -> Iterator[str]:
    """Run one whose content is in `folder`; yields HOST:PORT. `auth` is the YAML of that section."""
    path, port = program(), free_port()
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n{auth}"
    )
    silent = subprocess.DEVNULL
    server = subprocess.Popen([path, "serve", str(config)], stdout=silent, stderr=silent)
    try:
        _wait_for(server, f"http://127.0.0.1:{port}/v2/")
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def password_auth(folder: Path) -> str:
    """The configuration that asks for USER and PASSWORD."""
    (folder / "htpasswd").write_text(f"{USER}:{HASHED}\n")
    return f"auth: {{htpasswd: {{realm: tests, path: {folder}/htpasswd}}}}\n"


def log_in(home: Path, host: str, user: str = USER, password: str = PASSWORD) -> None:
    """Write the login as `docker login` does."""
    folder = home / ".docker"
    folder.mkdir(parents=True, exist_ok=True)
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


@contextmanager
def token_auth(folder: Path) -> Iterator[str]:
    """A server that gives tokens to USER, who may write, and to "reader", who may not; yields the configuration."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    from cryptography.hazmat.primitives.serialization import Encoding

    key, now = rsa.generate_private_key(65537, 2048), datetime.now(timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "tests")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "root.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    chain = base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()

    def token(user: str, scopes: list[str]) -> str:
        access = []
        for scope in scopes:
            kind, target, actions = scope.split(":")
            allowed = [each for each in actions.split(",") if user == USER or each == "pull"]
            access.append({"type": kind, "name": target, "actions": allowed})
        claims: dict[str, Any] = {"iss": ISSUER, "aud": SERVICE, "sub": user, "access": access, "jti": "1"}
        claims.update({"iat": int(time.time()) - 10, "nbf": int(time.time()) - 10, "exp": int(time.time()) + 600})
        parts = [{"typ": "JWT", "alg": "RS256", "x5c": [chain]}, claims]
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{_base64url(key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            user, _, password = (
                base64.b64decode(self.headers.get("Authorization", "Basic ")[6:]).decode().partition(":")
            )
            if password != PASSWORD:
                self.send_error(401)
                return
            data = json.dumps({"token": token(user, parse_qs(urlsplit(self.path).query).get("scope", []))}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    with serving(Handler) as address:
        yield (
            f"auth: {{token: {{realm: '{address}/token', service: {SERVICE}, issuer: {ISSUER}, "
            f"rootcertbundle: {folder}/root.pem}}}}\n"
        )


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server in a thread of its own; yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _wait_for(server: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            return  # it asks for a login, so it is there
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"no registry answered at {address}; it ended with {server.poll()}")
