"""How a server runs, who may do what on it and how much: options, tokens with roles, pictures in a minute, bytes in a body.

A token is 256 random bits, so one SHA-256 of it is as good as a slow hash: there is nothing to guess. The registry's folder has
digests alone. Their file is read anew when it changed, so a token that is revoked is refused at once, by every worker. A file
that is damaged, or that every user of the machine may write, lets nobody in.

This is apart from the server, so that a worker answers its supervisor before it loads PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shlex
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from overpaint.core.asgi import refuse
from overpaint.core.atomic import locked, share, write_over
from overpaint.core.errors import OverpaintError
from overpaint.core.names import checked_name, unknown

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Where prometheus_client has workers write, when this variable is set before it is imported."""


@dataclass(frozen=True)
class ServeOptions:
    """How a server runs. `rate` is pictures in a minute for each token, 0 for any number; `queue`, how many may wait in a worker.

    `max_body` is in bytes. Without `tokens`, whoever reaches the port may do everything, and only a local name of the host is
    answered to. `shared` is a folder in which several workers count together.
    """

    registry: str
    base: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    tokens: bool = True
    enforce_expiry: bool = False
    rate: int = 600
    queue: int = 64
    max_steps: int = 100
    max_body: int = 64 << 10
    shared: Path | None = None


Role = Literal["read", "generate", "change"]
ROLES: tuple[Role, ...] = ("read", "generate", "change")
"""Each may also do what those before it may."""
FILE_NAME = "tokens.json"
LOCK_SECONDS = 20.0


class BadTokens(OverpaintError):
    """A file of tokens that cannot be read, or not be trusted."""


@dataclass(frozen=True)
class Token:
    """What is stored of a token: its owner, who is the author of changes made with it, and what it allows.

    `recipes` are the only recipes that it may draw with, as they are now, and change; empty means any, with earlier revisions
    and free sets of patches too.
    """

    owner: str
    role: Role
    recipes: tuple[str, ...]
    created: str
    sha256: str

    @property
    def id(self) -> str:
        """What lists show and `revoke` takes."""
        return self.sha256[:12]

    def allows(self, role: Role) -> bool:
        """Whether it has this role or one above it."""
        return ROLES.index(self.role) >= ROLES.index(role)

    def may_use(self, recipe: str | None) -> bool:
        """Whether it may draw with a recipe and, with that role, change it; None is a free set of patches."""
        return not self.recipes or recipe in self.recipes


class TokenFile:
    """The tokens of a registry, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._read: tuple[tuple[int, ...] | None, tuple[Token, ...]] = (None, ())

    def tokens(self) -> tuple[Token, ...]:
        """All tokens, oldest first. Raises BadTokens for a file that cannot be read, or that everybody may write."""
        try:
            file = self.path.stat()
            stamp = file.st_ino, file.st_size, file.st_mtime_ns, file.st_mode
            if self._read[0] != stamp:
                if os.name != "nt" and file.st_mode & stat.S_IWOTH:
                    raise BadTokens(
                        f"every user of this machine may write {self.path}, and so give themselves a token; run "
                        f"`chmod o-w {shlex.quote(str(self.path))}`, then look through `overpaint token list`"
                    )
                self._read = stamp, _parsed(self.path.read_bytes())
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, RecursionError) as error:
            raise BadTokens(
                f"the tokens in {self.path} cannot be read ({error}); put the file back, or remove it and make new tokens"
            ) from error
        return self._read[1]

    def find(self, text: str) -> Token | None:
        """The token with this text; None for an unknown one."""
        digest = _digest(text)
        return next((each for each in self.tokens() if secrets.compare_digest(each.sha256, digest)), None)

    def add(self, owner: str, role: Role, recipes: Iterable[str] = ()) -> str:
        """Make a token and return its text, which is stored nowhere."""
        text = f"overpaint-{secrets.token_urlsafe(32)}"
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        token = Token(checked_name(owner, "token's owner"), role, tuple(recipes), now, _digest(text))
        self._change(lambda tokens: (*tokens, token))
        return text

    def revoke(self, key: str) -> list[Token]:
        """Remove the token of that id, or all of that owner, and return them. Raises NotFound."""
        revoked: list[Token] = []

        def without(tokens: tuple[Token, ...]) -> tuple[Token, ...]:
            revoked[:] = [each for each in tokens if key in (each.owner, each.id)]
            if not revoked:
                raise unknown("token", key, {name for each in tokens for name in (each.owner, each.id)})
            return tuple(each for each in tokens if each not in revoked)

        self._change(without)
        return revoked

    def _change(self, change: Callable[[tuple[Token, ...]], tuple[Token, ...]]) -> None:
        try:
            with locked(self.path.with_name(f"{FILE_NAME}.lock"), LOCK_SECONDS):
                listed = [asdict(each) for each in change(self.tokens())]
                write_over(self.path, json.dumps({"tokens": listed}, indent=1).encode(), durable=True, mode=0o600)
                share(self.path)
        except (OSError, TimeoutError, sqlite3.Error) as error:
            raise OverpaintError(
                f"the tokens in {self.path} cannot be changed ({error}); nothing was changed"
            ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _parsed(content: bytes) -> tuple[Token, ...]:
    """The tokens of a file. Raises ValueError, RecursionError: read leniently, a value of a wrong type could allow more."""
    match json.loads(content):
        case {"tokens": [*listed]}:
            return tuple(_token(number, each) for number, each in enumerate(listed, 1))
    raise ValueError("it has no list of tokens")


def _token(number: int, stored: Any) -> Token:
    match stored:
        case {
            "owner": str(owner),
            "role": "read" | "generate" | "change" as role,
            "recipes": [*recipes],
            "created": str(created),
            "sha256": str(digest),
        } if all(isinstance(each, str) and each for each in recipes) and re.fullmatch("[0-9a-f]{64}", digest):
            return Token(owner, role, tuple(recipes), created, digest)
    raise ValueError(
        f"token {number} needs an owner, one of the roles {', '.join(ROLES)}, a list of recipes, the time it was created and "
        "a SHA-256 of 64 hexadecimal digits"
    )


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
