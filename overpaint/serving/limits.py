"""How much a caller may ask for: pictures in a minute, counted over all workers, and bytes in the body of a request."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overpaint.core.asgi import refuse
from overpaint.core.errors import OverpaintError


class TryLater(OverpaintError):
    """What is refused now and may be asked again after some `seconds`."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class TooMany(TryLater):
    """A caller who asks too often."""


class RateLimiter:
    """At most `rate` pictures in a minute for each caller, all at once if they like; 0 is any number.

    The generic cell rate algorithm (ITU-T I.371): one number is kept for each caller, the time at which their whole allowance
    is back. It is in a database file, in which several workers count together; without a file this process counts for itself.
    """

    def __init__(self, rate: int, file: Path | None) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._database = sqlite3.connect(
            ":memory:" if file is None else file, timeout=10, isolation_level=None, check_same_thread=False
        )
        if file is not None:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE IF NOT EXISTS caller (name TEXT PRIMARY KEY, whole REAL NOT NULL)")

    def spend(self, caller: str, count: int = 1, now: float | None = None) -> None:
        """Take `count` from a caller's allowance, or nothing and raise TooMany; OverpaintError where no waiting would help."""
        if not self._rate:
            return
        if count > self._rate:
            raise OverpaintError(
                f"{count} pictures in one request, and at most {self._rate} in a minute; ask for fewer"
            )
        now, each = time.time() if now is None else now, 60.0 / self._rate
        with self._lock, closing(self._database.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            try:
                row = cursor.execute("SELECT whole FROM caller WHERE name = ?", (caller,)).fetchone()
                whole = max(now, row[0] if row else now) + count * each
                wait = whole - now - 60.0
                if wait <= 1e-6:
                    cursor.execute("REPLACE INTO caller VALUES (?, ?)", (caller, whole))
                cursor.execute("COMMIT")
            except BaseException:
                cursor.execute("ROLLBACK")
                raise
        if wait > 1e-6:
            raise TooMany(
                f"at most {self._rate} pictures in a minute; come again in {wait:.0f} seconds", max(wait, 1.0)
            )

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()


class BodyLimit:
    """Answers 413 to a body of more than `limit` bytes, announced or not, before it is read whole."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._limit:
            await self._refuse(send)
            return
        size, began = 0, False

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLarge:
            if not began:
                await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        await refuse(send, 413, "body_too_large", f"a body has at most {self._limit} bytes; send less")


class _TooLarge(BaseException):
    """Passes through the handlers of errors on its way to `BodyLimit`."""
