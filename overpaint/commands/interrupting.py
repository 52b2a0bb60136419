"""Ctrl-C while a command works: one sentence that says what is kept, and the exit code that shells expect."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from overpaint.commands.common import Talk

INTERRUPTED = 130
"""128 and the number of the signal, as every shell has it."""


@contextmanager
def interruptible(talk: Talk, kept: Callable[[], str]) -> Iterator[None]:
    """Within the block, Ctrl-C ends the command with `kept()`."""
    try:
        yield
    except KeyboardInterrupt:
        talk.say(f"interrupted: {kept()}")
        sys.exit(INTERRUPTED)
