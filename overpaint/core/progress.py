"""How long work reports what it has done: the one progress callback of the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with the step, of how many, and what is being done. A step smaller than the last begins another piece of work."""


def silent(step: int, of: int, text: str) -> None:
    """Reports no progress."""
