"""What a server that trusts its own machine answers, and what it refuses before any route sees it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from overpaint.core.asgi import OwnPages, is_local


def status(host: str, origin: str | None = None, kind: str = "http", local: bool = True, **more: str) -> int:
    """The status of the answer, 200 where the request reaches the application; a closed websocket has its code."""
    named = {"host": host, **({} if origin is None else {"origin": origin}), **more}
    headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()]
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(OwnPages(app, local)({"type": kind, "headers": headers}, None, send))  # type: ignore[arg-type]
    found: int = sent[0].get("status") or sent[0]["code"]
    return found


def test_a_host_is_local_where_only_this_machine_reaches_it() -> None:
    assert all(is_local(host) for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"))
    assert not any(is_local(host) for host in ("0.0.0.0", "10.0.0.1", "name", "localhost.evil.example", ""))


@pytest.mark.parametrize("host", ["localhost", "localhost:7860", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"])
def test_this_machine_is_answered_under_its_own_names(host: str) -> None:
    assert status(host) == 200
    assert status(host, f"http://{host}") == 200


@pytest.mark.parametrize(
    "host", ["", "evil.example", "evil.example:7860", "localhost.evil.example", "[::1", "10.0.0.1"]
)
def test_a_name_that_somebody_points_at_this_machine_is_refused(host: str) -> None:
    assert status(host) == 400
    assert status(host, f"http://{host}") == 400
    assert status(host, kind="websocket") == 1008


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:8000", "http://localhost.evil.example"]
)
def test_a_page_of_another_site_is_refused(origin: str) -> None:
    assert status("localhost", origin) == 403
    assert status("page.example", origin, local=False) == 403


def test_behind_a_proxy_the_name_that_the_visitor_asked_for_counts() -> None:
    assert status("10.0.0.5:7860", "https://page.example", local=False, x_forwarded_host="page.example") == 200
    assert status("10.0.0.5:7860", "https://evil.example", local=False, x_forwarded_host="page.example") == 403
