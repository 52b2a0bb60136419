"""How much more memory a piece of work needs than was in use before, in a process that has worked before."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

EVERY = 0.005
"""Seconds between two looks at the process."""


@contextmanager
def peak_megabytes(device: torch.device) -> Iterator[list[float]]:
    """Put into the list how many megabytes (10^6) more than before were in use at most within the block.

    On a GPU, what PyTorch allocated there; otherwise the process's resident memory, looked at every few milliseconds. The
    system's own highest mark only ever rises, so that a second piece of work would seem to need nothing; and memory that
    an earlier one freed is given back first, because what is taken from it again would not be seen.
    """
    found = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        yield found
        found[0] = (torch.cuda.max_memory_allocated(device) - allocated) / 1e6
        return
    _give_back()
    before, done = resident(), threading.Event()

    def look() -> None:
        found[0] = max(found[0], (resident() - before) / 1e6)

    def watch() -> None:
        while not done.wait(EVERY):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        look()
        done.set()
        watcher.join()


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def _give_back() -> None:
    """Return freed memory to the system, where the C library knows how."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
