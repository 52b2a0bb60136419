"""Reading values out of nodes: what is wrong is put down with its place, and reading goes on beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from overpaint.errors import OverpaintError
from overpaint.registry.names import checked_name
from overpaint.solving.yaml_text import Items, Node, Pairs, Place, Text

SHOWN = 50
"""How many mistakes are shown."""
SEEDS = 2**63


class Reading:
    """One pass over a file's nodes, and the mistakes found so far.

    Every method gives the value of one node: None (or nothing) where there is no node, or where it has a mistake.
    """

    def __init__(self) -> None:
        self.mistakes: list[tuple[Place, str]] = []

    def wrong(self, at: Place, text: str) -> None:
        """Put down a mistake."""
        self.mistakes.append((at, text))

    def told(self, file: str) -> str:
        """All mistakes as one message, in the order of the file."""
        lines = [f"  {place}: {text}" for place, text in sorted(self.mistakes)]
        more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        count = "a mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        return "\n".join([f"{file} has {count}, so nothing was stored:", *lines[:SHOWN], *more])

    def pairs(self, node: Node, keys: tuple[str, ...] | None, what: str) -> dict[str, Node]:
        """The values of a mapping by key; `keys` are those it may have, None for any."""
        if not isinstance(node, Pairs):
            named = f" ({', '.join(keys)})" if keys else ""
            self.wrong(node.at, f"{what} must be a mapping of names to values{named}; got {shape(node)}")
            return {}
        found: dict[str, Node] = {}
        for key, value in node.pairs:
            if keys is not None and key.value not in keys:
                had = ", ".join(keys)
                self.wrong(key.at, f"{what} has no {key.value!r}{nearest(key.value, keys)}; it can have {had}")
            elif key.value in found:
                self.wrong(key.at, f"{key.value!r} is there twice; keep one of them")
            else:
                found[key.value] = value
        return found

    def word(self, node: Node | None, what: str, *, may_be_empty: bool = False) -> str | None:
        """A name or a phrase, in Unicode's composed form."""
        if node is None or (may_be_empty and isinstance(node, Text) and (node.is_nothing or not node.value)):
            return None
        if not isinstance(node, Text):
            self.wrong(node.at, f"{what} must be a text; got {shape(node)}")
            return None
        if node.is_nothing or not node.value.strip():
            quoted = f", in quotation marks if {node.value!r} is meant" if node.value.strip() else ""
            self.wrong(node.at, f"{what} is empty; write one{quoted}")
            return None
        try:
            return checked_name(node.value.strip(), "concept")
        except OverpaintError as error:
            self.wrong(node.at, str(error))
            return None

    def words(self, node: Node | None, what: str) -> list[tuple[str, Place]]:
        """Words with their places, of a list or of a single word."""
        listed = node.items if isinstance(node, Items) else [] if node is None else [node]
        return [(word, each.at) for each in listed if (word := self.word(each, what)) is not None]

    def seed(self, node: Node | None) -> int | None:
        """A seed that a registry can keep."""
        text = self.word(node, "a seed")
        if node is None or text is None:
            return None
        if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) >= SEEDS:
            self.wrong(node.at, f"a seed is a whole number from 0 to {SEEDS - 1}; got {text!r}")
            return None
        return int(text)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most like a wrong one, or nothing."""
    near = get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def shape(node: Node) -> str:
    """What a node is, in words."""
    if isinstance(node, Text):
        return "nothing" if node.is_nothing else f"{node.value!r}"
    return "a list" if isinstance(node, Items) else "a mapping"
