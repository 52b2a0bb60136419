"""Builds that are killed (SIGKILL) at every step and at random moments; run as a program of its own, which forks for each.

`python -m tests.patches.killed_builds BASE FOLDER` prints, as JSON, what was found under the final name after each death.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from overpaint.bases.base import Base
from overpaint.core import atomic
from overpaint.patches import build as build_module
from overpaint.patches.build import build
from overpaint.patches.compose import Term
from overpaint.patches.delta import TextMap

MOMENTS = 12


def terms() -> list[Term]:
    return [Term("a", TextMap("text_encoder", torch.full((64, 1), 0.1), torch.full((64, 1), 0.2)))]


def die_at(step: int) -> None:
    """Make the so many-th step of a build its last: half of what it writes is written, then the process is gone."""
    left = [step]

    def dying(real: Callable[..., Any], half: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        def last(*given: Any) -> Any:
            if left[0] == 0:
                if part := half(*given):
                    real(*part)
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*given)

        return last

    build_module.write_all = dying(
        build_module.write_all, lambda to, data, at: (to, memoryview(data)[: len(data) // 2], at)
    )
    build_module.copy_range = dying(
        build_module.copy_range, lambda of, to, start, at, size: (of, to, start, at, size // 2)
    )
    for name in ("sync", "move_new"):
        setattr(atomic, name, dying(getattr(atomic, name), lambda *given: ()))


def forked(base: Base, out: Path, prepare: Callable[[], None], wait: float | None) -> bool:
    """Build in a process of its own, killed after so many seconds unless it ended; whether it was killed."""
    child = os.fork()
    if child == 0:
        prepare()
        build(base, terms(), out)
        os._exit(0)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def found(out: Path, digest: str) -> str:
    """`nothing`, `whole` or `broken`: what lies under the final name."""
    if not os.path.lexists(out):
        return "nothing"
    return "whole" if Base.open(out).fingerprint == digest else "broken"


def killed(base: Base, folder: Path) -> Iterator[dict[str, Any]]:
    suffix = ".safetensors" if base.is_single_file else ""
    started = time.monotonic()
    digest = build(base, terms(), folder / f"first{suffix}").digest
    seconds = time.monotonic() - started
    for step in range(10_000):
        out = folder / f"step-{step}{suffix}"
        died = forked(base, out, lambda step=step: die_at(step), None)  # type: ignore[misc]
        yield {"when": f"step {step}", "died": died, "found": found(out, digest)}
        if not died:
            break
    moments = random.Random(0)
    for number in range(MOMENTS):
        out = folder / f"moment-{number}{suffix}"
        died = forked(base, out, lambda: None, moments.random() * seconds)
        yield {"when": f"moment {number}", "died": died, "found": found(out, digest)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    opened = Base.open(sys.argv[1])
    _ = opened.fingerprint
    print(json.dumps(list(killed(opened, Path(sys.argv[2])))))
