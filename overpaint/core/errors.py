"""The one root of every error a caller can cause. Each package keeps its few kinds beside the code that raises them."""

from __future__ import annotations


class OverpaintError(Exception):
    """Something the caller can mend. The message says what was found, what was needed and what to do."""


class NotFound(OverpaintError):
    """A name that nothing answers to."""


class AlreadyExists(OverpaintError):
    """A name that is taken, or an output that is there."""
