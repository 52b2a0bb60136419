"""What people type: names, paths, numbers, URLs. What may be one, which one was meant, and how messages show it.

URLs are shown without user names, passwords, tokens and signatures: everything that prints one, or what another package said
about one, prints what `printed_url`, `printed` and `reported` return.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from overpaint.core.errors import NotFound, OverpaintError

Item = TypeVar("Item")
LONGEST_NAME = 400
LONGEST_NOTE = 10_000
SEEDS = 2**63
"""Seeds are below it, as databases and PyTorch's generators take them."""
# Control characters, halves of broken characters, line and paragraph separators: they spoil any table they appear in.
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}


# What no reader sees, beside the category Cf (zero-width, bidirectional and tag characters): fillers and selectors. Other
# blanks than " " and the wide one of Japanese look like " ".
INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
BLANKS = frozenset(" \u3000")
JOINERS, EMOJI_STYLE = frozenset("\u200c\u200d"), "\ufe0f"


SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
URL = re.compile(rf"(?:{SCHEME}::)*{SCHEME}://")
"""How a URL begins, also one that `fsspec` chains, such as simplecache::s3://bucket."""
_SCHEME_OF_PATH = re.compile(rf"(?:{SCHEME}::)*{SCHEME}(?<!^.):")
"""The same as the first part of a path; one letter is a drive of Windows."""


def checked_name(name: str, what: str) -> str:
    """`name`, for something new, in Unicode's composed form, so that both encodings of "é" are one.

    Two names that look alike could stand side by side, so blanks at the ends and characters that nobody sees are
    refused; joiners pass where a script or an emoji needs them. Raises OverpaintError if unfit.
    """
    composed = sought_name(name, what)
    if composed != composed.strip():
        raise OverpaintError(f"the name of a {what} neither begins nor ends with a blank; got {quoted(composed)}")
    for at, character in enumerate(composed):
        if _looks_like_nothing(composed, at):
            raise OverpaintError(
                f"the name of a {what} cannot contain {character!a}, which nobody sees; got {quoted(ascii(composed))}"
            )
    return composed


def sought_name(name: str, what: str) -> str:
    """`name` in its composed form, for a search: what an older version let pass is found too. Raises OverpaintError."""
    # Composing makes a text shorter, by less than this; what is longer still is not worth the work.
    if not isinstance(name, str):
        raise OverpaintError(f"the name of a {what} is a text; got {shown(name)}")
    composed = name if len(name) > 4 * LONGEST_NAME else unicodedata.normalize("NFC", name)
    if not composed.strip():
        raise OverpaintError(f"a {what} needs a name; got an empty one")
    return _checked(composed, f"the name of a {what}", LONGEST_NAME)


def _looks_like_nothing(text: str, at: int) -> bool:
    character, before, after = text[at], text[at - 1 : at] or " ", text[at + 1 : at + 2] or " "
    category = unicodedata.category(character)
    if character in JOINERS:
        of_script = unicodedata.combining(before) == 9 or {
            unicodedata.bidirectional(each) for each in before + after
        } == {"AL"}
        return not (of_script or (_is_symbol(before) and _is_symbol(after)))
    if unicodedata.name(character, "").startswith("VARIATION SELECTOR"):
        return character != EMOJI_STYLE or not _is_symbol(before)
    return category == "Cf" or character in INVISIBLE or (category == "Zs" and character not in BLANKS)


def _is_symbol(character: str) -> bool:
    return character == EMOJI_STYLE or unicodedata.category(character).startswith("S")


def typed_path(text: str | Path) -> Path:
    """The absolute path that somebody means, "~" and "~name" being home folders.

    Raises OverpaintError for a home that is not known, and for what is no path or what no file system can have as one, such as
    a URL, which would become a folder called `s3:`.
    """
    if not isinstance(text, str | Path):
        raise OverpaintError(f"a path is a text or a pathlib.Path; got {shown(text)}")
    refuse_url(text)
    try:
        path = Path(text).expanduser().absolute()
        path.exists()
        os.fsencode(path)
        if "\0" in str(path):
            raise ValueError("embedded null character")
        return path
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise OverpaintError(f"{quoted(str(text))} cannot be used as a path ({why}); mend it") from error
    except RuntimeError as error:
        raise OverpaintError(f"{text} names a home folder that is not known; write the whole path") from error


def refuse_url(path: str | Path) -> None:
    """Raise OverpaintError for a URL where a path is needed, unless there is a folder of that name."""
    first, *more = Path(path).parts or ("",)
    if more and _SCHEME_OF_PATH.fullmatch(first) and not os.path.lexists(first):
        # Without the rest of it, which may hold a password.
        raise OverpaintError(f"a path on this machine is needed here, and {first}// begins a URL; write the path alone")


def checked_tag(tag: str, *, new: bool = False) -> str:
    """`tag` in lower case, so that two people mean one tag; a `new` one as `checked_name` has it. Raises OverpaintError.

    After the "@" of a recipe a number is a revision and anything else a tag, so a tag is no number and has no "@".
    """
    lowered = (checked_name if new else sought_name)(tag, "tag").lower()
    if "@" in lowered or lowered.isdecimal():
        raise OverpaintError(f"a tag has no '@' and is not a number, because recipe@3 is a revision; got {tag!r}")
    return lowered


def checked_texts(values: Iterable[str], what: str) -> tuple[str, ...]:
    """`values`, each a text. Raises OverpaintError for one text alone, which Python would take letter by letter."""
    return checked_list(values, what, str, "texts, such as ['one', 'two']")


def checked_list(values: Iterable[Item], what: str, kinds: type | tuple[type, ...], named: str) -> tuple[Item, ...]:
    """`values`, each of these types, which are `named` in words. Raises OverpaintError for what is no list of such."""
    listed = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes) else None
    if listed is None or not all(isinstance(each, kinds) for each in listed):
        raise OverpaintError(f"{what} are a list of {named}; got {shown(values)}")
    return listed


def checked_page(limit: int | None, offset: int) -> tuple[int | None, int]:
    """`limit` and `offset` of a list, where both count. Raises OverpaintError."""
    limit = None if limit is None else checked_count(limit, "the limit of a list")
    return limit, checked_count(offset, "the offset of a list")


def checked_count(count: int, what: str) -> int:
    """`count` if it counts something. Raises OverpaintError."""
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < SEEDS:
        raise OverpaintError(f"{what} is a whole number of at least 0; got {shown(count)}")
    return count


def checked_note(text: str, what: str) -> str:
    """`text`, which may be empty or of several lines. Raises OverpaintError if it does not print or is far too long."""
    if not isinstance(text, str):
        raise OverpaintError(f"{what} is a text; got {shown(text)}")
    _checked(text.replace("\n", " ").replace("\t", " "), what, LONGEST_NOTE)
    return text


def checked_id(id: str) -> str:
    """`id` if it can be a patch's. Raises OverpaintError if it cannot."""
    if not re.fullmatch(r"[0-9a-f]{64}", id):
        raise OverpaintError(f"the id of a patch is 64 lower-case hexadecimal digits; got {quoted(id)}")
    return id


def checked_number(number: float, what: str) -> float:
    """`number` as a float. Raises OverpaintError if it is not a finite one: SQLite would keep NaN as nothing."""
    with suppress(OverflowError):
        if isinstance(number, Real) and not isinstance(number, bool) and math.isfinite(number):
            return float(number)
    raise OverpaintError(f"{what} must be a finite number; got {shown(number)}")


def checked_seed(seed: int) -> int:
    """`seed` if databases and PyTorch's generators take it. Raises OverpaintError."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not -SEEDS <= seed < SEEDS:
        raise OverpaintError(f"a seed is a whole number of at most 63 bits; got {shown(seed)}")
    return int(seed)


def parsed_number(text: str, what: str) -> float:
    """The finite decimal number that a text writes: none of the other ways that Python's `float` takes. Raises OverpaintError."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        raise OverpaintError(f"{what} is a number, such as 0.5; got {quoted(text)}")
    return checked_number(float(text), what)


def parsed_day(text: str, what: str, *, other: str = "") -> date:
    """The day that a text writes as YYYY-MM-DD, no other way of ISO 8601. Raises OverpaintError, which names an `other` word."""
    with suppress(ValueError):
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            return date.fromisoformat(text)
    raise OverpaintError(f"{what} is written YYYY-MM-DD{other and f', or {other}'}; got {quoted(text)}")


def checked_json(value: dict[str, Any], what: str) -> str:
    """`value` as JSON text, keys sorted. Raises OverpaintError for what JSON cannot express."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OverpaintError(f"{what} cannot be written as JSON: {error}") from error


def quoted(text: str) -> str:
    """`text` in quotation marks for a message, cut when it is long."""
    return repr(text) if len(text) <= 100 else f"{text[:80]!r}... ({len(text)} characters)"


def shown(value: object) -> str:
    """What somebody gave instead of a text or a number, for a message, cut when it is long."""
    if isinstance(value, int) and abs(value) >> 128:  # of which Python may refuse to write all digits
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}..."


def unknown(what: str, name: str, known: Iterable[str]) -> NotFound:
    """The error for a name that nothing answers to, with the nearest names that something does."""
    names = list(dict.fromkeys(known))
    if near := nearest(name, names, most=3):
        return NotFound(f"no {what} answers to {name!r}{near}")
    hint = "there is " + ", ".join(map(repr, names[:8])) if names else f"the registry has no {what} yet"
    return NotFound(f"no {what} answers to {name!r}; {hint}")


def nearest(name: str, known: Iterable[str], most: int = 1) -> str:
    """The known names that are most like a wrong one, as what is put behind it in a message; empty where none is like it."""
    by_folded = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=most)
    return f" (did you mean {' or '.join(repr(by_folded[each]) for each in near)}?)" if near else ""


def _checked(text: str, what: str, longest: int) -> str:
    if len(text) > longest:
        raise OverpaintError(f"{what} has at most {longest} characters; this one has {len(text)}")
    for character in text:
        if unicodedata.category(character) in UNPRINTABLE:
            raise OverpaintError(f"{what} cannot contain {character!r}, which does not print")
    return text


HIDDEN = "***"
_URL_IN_TEXT = re.compile(rf"({SCHEME})://((?:(?!::{SCHEME}://)[^\s'\"<>])*)")
_WHOLE_URL = re.compile(rf"({SCHEME})://((?:(?!::{SCHEME}://).)*)", re.DOTALL)
_HOST_AND_PORT = re.compile(r"(\[[^]]*\]|[^:]*)(:[0-9]*)?")
# Of a query's values only these are shown: any other may be a password, a token or a signature.
_PUBLIC_VALUES = {"host", "port", "user", "dbname", "sslmode", "connect_timeout", "blobs", "versionId", "region"}
_SHORTEST_SECRET = 3


def without_file_scheme(location: str) -> str:
    """The path that a `file://` URL names, its `%20` being a blank unless it is there as written; any other text as it is."""
    path = location.removeprefix("file://")
    return path if path == location or os.path.lexists(path) else unquote(path)


def has_credentials(url: str) -> bool:
    """Whether a URL holds something that `printed_url` hides."""
    return printed_url(url) != url


def printed_url(url: str) -> str:
    """A URL, or a chain of them, without credentials; a text that is no URL as it is."""
    return _WHOLE_URL.sub(lambda match: _without_credentials(match[1], match[2])[0], url)


def printed(text: str, url: str = "") -> str:
    """A text whose URLs have lost their credentials, and in which no credential of `url` stands by itself either."""
    secrets = [secret for match in _WHOLE_URL.finditer(url) for secret in _without_credentials(match[1], match[2])[1]]
    for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    return _URL_IN_TEXT.sub(lambda match: _without_credentials(match[1], match[2])[0], text)


LONGEST_REPORT = 300
"""How many characters of what a server or another package says stand in a message."""


def reported(text: str, url: str = "") -> str:
    """What a server or another package said, for a message: `printed`, in one line that a terminal only shows, and cut."""
    line = " ".join(printed(text[: 10 * LONGEST_REPORT], url).split())
    shown = "".join(each if each.isprintable() else HIDDEN[0] for each in line[:LONGEST_REPORT])
    return shown if len(line) <= LONGEST_REPORT else f"{shown}..."


def _without_credentials(scheme: str, rest: str) -> tuple[str, list[str]]:
    """A URL without its credentials, and the credentials."""
    place, mark, query = re.fullmatch(r"([^?#]*)([?#]?)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    place, secrets = _without_user(scheme, place)
    pieces = []
    for piece in re.split(r"[&#]", query) if mark else []:
        key, equals, value = piece.partition("=")
        if value and key not in _PUBLIC_VALUES:
            secrets.append(value)
        elif piece and not equals:
            secrets.append(piece)
            key = HIDDEN
        pieces.append(f"{key}{equals}{value if key in _PUBLIC_VALUES else HIDDEN if value else ''}")
    return f"{scheme}://{place}{mark}{'&'.join(pieces)}", secrets


def _without_user(scheme: str, place: str) -> tuple[str, list[str]]:
    """The host and path. A password with "/" or "@" in it, which should be written %2F or %40, is hidden whole."""
    server = place.partition("/")[0]
    if "@" not in server and _HOST_AND_PORT.fullmatch(server):
        return place, []
    user_info, at, host = place.rpartition("@")
    if not at:  # not host:port, and no "@" before the query: a password that has "?" or "#" in it
        user_info, host = place, ""
    user, colon, password = user_info.partition(":")
    if scheme.startswith("postgresql"):  # the server's user is no secret, and errors are about it
        return f"{user}{':' + HIDDEN if colon else ''}@{host}", [password] if password else []
    return f"{HIDDEN}@{host}", [each for each in (user_info, user, password) if each]
