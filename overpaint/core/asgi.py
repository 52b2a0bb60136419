"""What a server of this package refuses before any of its routes runs; plain ASGI, for the API and the page alike.

A server without tokens or password trusts whoever reaches it, and a browser on this machine reaches it for every site that
its user looks at. Two headers, which no script of a site can forge, tell such requests from the user's own: `Host` names the
site where its name was pointed at this machine (DNS rebinding), and `Origin` where its page asks another server.
"""

from __future__ import annotations

import ipaddress
import json
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


def is_local(host: str) -> bool:
    """Whether only this machine can reach a host, given as a name or an address without a port."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class OwnPages:
    """Refuses requests that pages of other sites make, and with `local` also those for any host but this machine."""

    def __init__(self, app: ASGIApp, local: bool = True) -> None:
        self._app, self._local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None if scope["type"] == "lifespan" else self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "of another site"})
        else:
            status, message = refusal
            await refuse(send, status, "foreign_request", message)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self._local and not is_local(_name(host)):
            return 400, f"this server is for its own machine; open it as localhost or 127.0.0.1, not as {host[:100]!r}"
        # A proxy may ask under another name than the visitor did, and says so; a page can set no such header across sites.
        if origin is not None and origin.partition("://")[2] not in (host, headers.get(b"x-forwarded-host", host)):
            return 403, f"a page of {origin[:100]!r} asked for this, and only this server's own pages may"
        return None


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def refuse(send: Send, status: int, kind: str, message: str) -> None:
    """Answer a request with one sentence as JSON, in the form of every refusal of the API."""
    body = json.dumps({"error": {"message": message, "type": kind}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
