"""A YAML text (and so a JSON text) as nodes that know their places, and in which every value is still what was written.

Nothing is resolved: `no`, `1e-4` and `2027-01-31` stay texts until a schema says what they mean. Of YAML, that is taken
which a list of concepts needs: one document, no aliases (a few lines of them can mean gigabytes) and no tags.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped]

from overpaint.errors import OverpaintError

LARGEST = 16 << 20
"""Bytes of a file. Ten thousand concepts with all they can have take a tenth of it."""
DEEPEST = 8
"""How deeply lists and mappings may lie in each other; a file of concepts needs five."""
_NOTHING = ("", "~", "null", "Null", "NULL")


class BadText(OverpaintError):
    """A text that is not the YAML that is taken here. The message begins with the place."""


@dataclass(frozen=True, order=True)
class Place:
    """Line and column, both from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}"

    @classmethod
    def of(cls, mark: Any) -> Place:
        return cls(mark.line + 1, mark.column + 1)


@dataclass(frozen=True)
class Text:
    """A value. `plain` when it stands without quotation marks."""

    at: Place
    value: str
    plain: bool = True

    @property
    def is_nothing(self) -> bool:
        """Whether this is how YAML and JSON write that there is no value."""
        return self.plain and self.value in _NOTHING


@dataclass(frozen=True)
class Items:
    """A list."""

    at: Place
    items: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Pairs:
    """A mapping. A key may be there twice; that is for the schema to say."""

    at: Place
    pairs: list[tuple[Text, Node]] = field(default_factory=list)


Node = Text | Items | Pairs


def parse(raw: bytes) -> Node | None:
    """The one document of a text in UTF-8; None when there is nothing in it. Raises BadText."""
    if len(raw) > LARGEST:
        raise BadText(f"a file of concepts has at most {LARGEST >> 20} MiB; this one has {len(raw) >> 20}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadText(f"line {line}: byte {raw[error.start]:#x} is not UTF-8; save the file as UTF-8") from error
    if text.lstrip().startswith(("{", "[")):
        # JSON may be indented with tabs, YAML may not; within JSON's texts they are written as \t.
        text = text.replace("\t", " ")
    try:
        return _document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = Place(before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise BadText(f"{place}: the character {chr(error.character)!r} cannot stand in a text; remove it") from error
    except yaml.MarkedYAMLError as error:
        raise BadText(_explained(text, error)) from error


def _explained(text: str, error: Any) -> str:
    mark = error.problem_mark or error.context_mark
    at = text[mark.index : mark.index + 1]
    if at == "\t":
        return f"{Place.of(mark)}: a tab; YAML is indented with spaces"
    if "mapping values" in (error.problem or ""):
        return f"{Place.of(mark)}: a colon where none can be; put quotation marks around a text that contains ': '"
    context = f" {error.context}" if error.context else ""
    return f"{Place.of(mark)}: this is not YAML: {error.problem}{context}"


def _document(events: Iterator[Any]) -> Node | None:
    """Build nodes from the parser's events, without recursion, and stop at the first event that is not taken."""
    root: list[Node] = []
    opened: list[Items | Pairs] = []
    keys: list[Text | None] = []  # of each opened node, the key that waits for its value
    for event in events:
        _refuse(event, len(opened))
        if isinstance(event, yaml.DocumentStartEvent) and root:
            raise BadText(f"{Place.of(event.start_mark)}: a second document begins; put all concepts into one list")
        if isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            opened.pop()
            keys.pop()
            continue
        node = _node(event)
        if node is None:
            continue
        _place(node, opened, keys, root)
        if not isinstance(node, Text):
            opened.append(node)
            keys.append(None)
    if not root or (isinstance(root[0], Text) and root[0].is_nothing):
        return None
    return root[0]


def _place(node: Node, opened: list[Items | Pairs], keys: list[Text | None], root: list[Node]) -> None:
    """Put a node where the events before it say that it belongs."""
    if not opened:
        root.append(node)
    elif isinstance(parent := opened[-1], Items):
        parent.items.append(node)
    elif (key := keys[-1]) is not None:
        parent.pairs.append((key, node))
        keys[-1] = None
    elif isinstance(node, Text):
        keys[-1] = node
    else:
        raise BadText(f"{node.at}: a key must be a word; got a list or a mapping")


def _node(event: Any) -> Node | None:
    if isinstance(event, yaml.ScalarEvent):
        place = Place.of(event.start_mark)
        return Text(place, _whole(event.value, place), plain=event.style is None)
    if isinstance(event, yaml.SequenceStartEvent):
        return Items(Place.of(event.start_mark))
    return Pairs(Place.of(event.start_mark)) if isinstance(event, yaml.MappingStartEvent) else None


def _refuse(event: Any, depth: int) -> None:
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        mark = "*" if isinstance(event, yaml.AliasEvent) else "&"
        raise BadText(
            f"{Place.of(event.start_mark)}: {mark}{event.anchor} is an alias or an anchor of YAML, which is not taken here; "
            "write the value out, or use quotation marks if it is a text"
        )
    if getattr(event, "tag", None) is not None:
        raise BadText(f"{Place.of(event.start_mark)}: the tag {event.tag!r} is not taken here; write a plain value")
    if depth > DEEPEST:
        raise BadText(f"{Place.of(event.start_mark)}: lists and mappings lie more than {DEEPEST} deep in each other")


def _whole(text: str, place: Place) -> str:
    """A text whose characters beyond 16 bits may be written as JSON does, in two halves."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise BadText(f"{place}: half of a character (\\ud800 to \\udfff); write the other half too") from error
