"""Requests made from the server's own OpenAPI schema, half of them malformed: none gets a server's error."""

from __future__ import annotations

import pytest

from benchmarks.serving import malformed
from overpaint.workspace.workspace import Workspace
from tests.serving.conftest import Serve

pytestmark = pytest.mark.slow


def test_no_request_gets_a_servers_error(serve: Serve, workspace: Workspace) -> None:
    client = serve(max_steps=1, rate=0)
    answers = list(malformed(client.http, client.headers, 150))
    assert len(answers) >= 150
    for call, answer in answers:
        assert answer.status_code < 500, f"{call}: {answer.text}"
    assert {200, 404, 422} <= {answer.status_code for _, answer in answers}
    assert workspace.recipe("all").digest(), "the registry is whole"
