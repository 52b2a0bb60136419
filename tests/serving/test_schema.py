"""The server's interface: the page has every route and its role, and no malformed request gets a server's error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
from fastapi.routing import APIRoute

from benchmarks.serving import malformed
from overpaint.serving.app import Changer, Generator, Reader, router
from overpaint.workspace.workspace import Workspace
from tests.serving.conftest import Serve

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
ROLES = {"read": Reader, "generate": Generator, "change": Changer}


@pytest.mark.slow
def test_no_request_gets_a_servers_error(serve: Serve, workspace: Workspace) -> None:
    client = serve(max_steps=1, rate=0)
    answers = list(malformed(client.http, client.headers, 150))
    assert len(answers) >= 150
    for call, answer in answers:
        assert answer.status_code < 500, f"{call}: {answer.text}"
    assert {200, 404, 422} <= {answer.status_code for _, answer in answers}
    assert workspace.recipe("all").digest(), "the registry is whole"


def test_the_page_has_every_route_and_the_role_it_needs() -> None:
    routes = set()
    for route in router.routes:
        assert isinstance(route, APIRoute)
        hints = get_type_hints(route.endpoint, include_extras=True).values()
        (role,) = [name for name, kind in ROLES.items() if kind in hints] or ["none"]
        routes |= {(f"{method} {re.sub('{.*?}', '*', route.path)}", role) for method in route.methods or ()}
    assert set(_listed()) == routes


def _listed() -> Iterator[tuple[str, str]]:
    """Each request of the page's table, names in paths as `*`, with its role; `GET /a`, `/b` is two of one method."""
    for requests, roles in re.findall(r"^\| (`(?:GET|POST) /.*?) \| (.*?) \|", PAGE.read_text("utf-8"), re.MULTILINE):
        method, role_of = "", roles.split(", ")
        for number, request in enumerate(re.findall("`(.*?)`", requests)):
            method, path = request.split() if " " in request else (method, request)
            yield f"{method} {re.sub('NAME|PATCH', '*', path)}", role_of[min(number, len(role_of) - 1)]
