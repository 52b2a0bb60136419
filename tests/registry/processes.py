"""Processes of their own for tests, some of which are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

THOROUGH = int(os.environ.get("OVERPAINT_THOROUGH", "1"))
"""How many times as much the tests of killed and racing processes do as they have time for in every run."""

# Forked from a clean process that has imported what they need: a fork of the test run would carry whatever threads and
# locks other tests left, and starting afresh takes a second each.
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["pytest", "alembic.command", "tests.registry.workers", "tests.registry.crash_workers"])


def run_until_killed(target: Callable[[Path], None], folder: Path) -> None:
    """Run `target` in a process that is to kill itself."""
    process = CLEAN.Process(target=target, args=(folder,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
