"""Some of many things, always the same ones: by place, or in an order without any pattern."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, or all where there are fewer, spread evenly from the first on."""
    wanted = min(count, len(items))
    return [items[i * len(items) // wanted] for i in range(wanted)]


def by_digest(words: Iterable[str]) -> list[str]:
    """Words in the order of their digests: one that is the same everywhere, and of which any beginning is a sample."""
    return sorted(words, key=lambda word: hashlib.sha256(word.encode()).digest())
