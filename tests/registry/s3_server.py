"""A real S3 server in a process of its own, on a free port, for the tests that talk to one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "overpaint-tests"
ACCOUNT = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "tester", "AWS_DEFAULT_REGION": "us-east-1"}
START_SECONDS = 120


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start one with an empty bucket, and stop it afterwards; yields the environment that leads clients to it."""
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {**ACCOUNT, "AWS_ENDPOINT_URL": address}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        command, env={**os.environ, **ACCOUNT}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(server, address)
        request = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=tester/20260101/us-east-1/s3/aws4_request")
        urllib.request.urlopen(request).close()
        yield environment
    finally:
        server.terminate()
        server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(server: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/moto-api/").close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"no S3 server answered at {address}; it ended with {server.poll()}")
