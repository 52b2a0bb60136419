"""The server as it is run: workers that are started again, clients that exist already, changes that reach all workers."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest

from overpaint.serving.access import TokenFile
from overpaint.workspace.workspace import Workspace
from tests.serving.conftest import texts

pytestmark = pytest.mark.slow

PATIENCE = 600.0
"""Seconds for workers to load PyTorch, on machines that are busy with other things."""


@pytest.fixture
def url(workspace: Workspace, tmp_path: Path) -> Iterator[str]:
    """A server with two workers."""
    command = [sys.executable, "-m", "overpaint", "--registry", str(workspace.registry.folder)]
    command += ["serve", "--workers", "2", "--port", "0", "--device", "cpu"]
    TokenFile(workspace.registry.folder).add("nobody", "read")
    with (tmp_path / "log").open("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while (found := re.search(r"http://[\d.]+:\d+", (tmp_path / "log").read_text())) is None:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield found[0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()


def workers(url: str, count: int) -> set[int]:
    """The process ids of `count` workers, once so many answer."""
    found: set[int] = set()
    deadline = time.monotonic() + PATIENCE

    def ask(_: int) -> int:
        with suppress(httpx.TransportError):
            return int(httpx.get(f"{url}/health", timeout=PATIENCE).json()["pid"])
        return 0

    with ThreadPoolExecutor(8) as pool:  # at once, or an idle worker would answer them all
        while len(found) < count and time.monotonic() < deadline:
            found |= set(pool.map(ask, range(8))) - {0}
    return found


@pytest.mark.skipif(os.name == "nt", reason="kills a worker as Linux and macOS do")
def test_workers_serve_openais_client_and_a_killed_one_is_replaced(workspace: Workspace, url: str) -> None:
    token = TokenFile(workspace.registry.folder).add("Ada", "change")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=5, timeout=PATIENCE)

    def digest() -> str:
        answer = client.images.generate(model="cat", prompt="a photo", n=1, extra_body={"steps": 1, "seed": 1})
        assert answer.data is not None
        return texts(base64.b64decode(answer.data[0].b64_json or ""))[0]

    before = workers(url, 2)
    assert len(before) == 2
    assert {model.id for model in client.models.list()} == {record.name for record in workspace.recipes()}
    assert digest() == workspace.recipe("cat").digest()
    with pytest.raises(openai.NotFoundError, match="did you mean 'cat'"):
        client.images.generate(model="kat", prompt="a photo")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()

    headers = {"Authorization": f"Bearer {token}"}
    taken_down = httpx.post(f"{url}/v1/add/cat", json={"patches": ["dog"]}, headers=headers, timeout=PATIENCE).json()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: digest(), range(4))) == {taken_down["weights"]}, "in whichever worker"

    os.kill(min(before), signal.SIGKILL)
    after = workers(url, 2)
    while min(before) in after:
        after = workers(url, 2)
    assert len(after - before) == 1
    assert digest() == taken_down["weights"] == workspace.recipe("cat").digest()
    counted = httpx.get(f"{url}/metrics", headers=headers, timeout=PATIENCE).text
    assert 'overpaint_pictures_total{recipe="cat"} 6.0' in counted, "all workers count together, the killed one too"
