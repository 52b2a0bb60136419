"""URLs as messages may show them: without user names, passwords, tokens and signatures.

Everything that prints a URL, or what another package said about one, prints what these functions return.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
URL = re.compile(rf"(?:{SCHEME}::)*{SCHEME}://")
"""How a URL begins, also one that `fsspec` chains, such as simplecache::s3://bucket."""
HIDDEN = "***"
_ONE = re.compile(rf"({SCHEME})://((?:(?!::{SCHEME}://)[^\s'\"<>])*)")
_WHOLE = re.compile(rf"({SCHEME})://((?:(?!::{SCHEME}://).)*)", re.DOTALL)
_PORT = re.compile(r"(\[[^]]*\]|[^:]*)(:[0-9]*)?")
# Of a query's values only these are shown: any other may be a password, a token or a signature.
_PUBLIC = {"host", "port", "user", "dbname", "sslmode", "connect_timeout", "blobs", "versionId", "region"}
_SHORTEST = 3


def without_file_scheme(location: str) -> str:
    """The path that a `file://` URL names, its `%20` being a blank unless it is there as written; any other text as it is."""
    path = location.removeprefix("file://")
    return path if path == location or os.path.lexists(path) else unquote(path)


def has_credentials(url: str) -> bool:
    """Whether a URL holds something that `printed_url` hides."""
    return printed_url(url) != url


def printed_url(url: str) -> str:
    """A URL, or a chain of them, without credentials; a text that is no URL as it is."""
    return _WHOLE.sub(lambda match: _split(match[1], match[2])[0], url)


def printed(text: str, url: str = "") -> str:
    """A text whose URLs have lost their credentials, and in which no credential of `url` stands by itself either."""
    secrets = [secret for match in _WHOLE.finditer(url) for secret in _split(match[1], match[2])[1]]
    for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, HIDDEN)
    return _ONE.sub(lambda match: _split(match[1], match[2])[0], text)


LONGEST_REPORT = 300
"""How many characters of what a server or another package says stand in a message."""


def reported(text: str, url: str = "") -> str:
    """What a server or another package said, for a message: `printed`, in one line that a terminal only shows, and cut."""
    line = " ".join(printed(text[: 10 * LONGEST_REPORT], url).split())
    shown = "".join(each if each.isprintable() else HIDDEN[0] for each in line[:LONGEST_REPORT])
    return shown if len(line) <= LONGEST_REPORT else f"{shown}..."


def _split(scheme: str, rest: str) -> tuple[str, list[str]]:
    """A URL without its credentials, and the credentials."""
    place, mark, query = re.fullmatch(r"([^?#]*)([?#]?)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    place, secrets = _without_user(scheme, place)
    pieces = []
    for piece in re.split(r"[&#]", query) if mark else []:
        key, equals, value = piece.partition("=")
        if value and key not in _PUBLIC:
            secrets.append(value)
        elif piece and not equals:
            secrets.append(piece)
            key = HIDDEN
        pieces.append(f"{key}{equals}{value if key in _PUBLIC else HIDDEN if value else ''}")
    return f"{scheme}://{place}{mark}{'&'.join(pieces)}", secrets


def _without_user(scheme: str, place: str) -> tuple[str, list[str]]:
    """The host and path. A password with "/" or "@" in it, which should be written %2F or %40, is hidden whole."""
    server = place.partition("/")[0]
    if "@" not in server and _PORT.fullmatch(server):
        return place, []
    user_info, at, host = place.rpartition("@")
    if not at:  # not host:port, and no "@" before the query: a password that has "?" or "#" in it
        user_info, host = place, ""
    user, colon, password = user_info.partition(":")
    if scheme.startswith("postgresql"):  # the server's user is no secret, and errors are about it
        return f"{user}{':' + HIDDEN if colon else ''}@{host}", [password] if password else []
    return f"{HIDDEN}@{host}", [each for each in (user_info, user, password) if each]
