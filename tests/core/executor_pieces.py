"""Pieces of work that tests send to workers: an importable module, as a cluster needs it."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from overpaint.core.errors import OverpaintError
from overpaint.core.executors import Piece, Resources, Result
from overpaint.core.reporting import Progress, silent
from overpaint.solvers.problem import OutOfMemory


class Travelling:
    """An executor without a cluster: everything travels, and of every three pieces the last is done first."""

    def __init__(self) -> None:
        self.names = list[str]()
        self.ahead = 0

    def results(
        self, pieces: Sequence[Piece], shared: Any, needs: Resources, progress: Progress = silent, *, ahead: int = 0
    ) -> Generator[Result, None, None]:
        self.ahead = ahead
        sent = pickle.dumps(shared)
        for start in range(0, len(pieces), 3):
            for index in reversed(range(start, min(start + 3, len(pieces)))):
                piece: Piece = pickle.loads(pickle.dumps(pieces[index]))
                self.names.append(piece.name)
                progress(0, 1, "1 under way on 1 workers")
                try:
                    value = piece.call(pickle.loads(sent), *piece.arguments, silent)
                except OverpaintError as error:
                    yield Result(index, error=str(error))
                else:
                    yield Result(index, pickle.loads(pickle.dumps(value)))

    def close(self) -> None:
        """Nothing was started."""


def double(shared: int, number: int, progress: Progress) -> int:
    return shared * number


def slow_first(shared: float, number: int, progress: Progress) -> int:
    """The first piece takes so many seconds, and the others none."""
    time.sleep(0 if number else shared)
    return number


def refuse(shared: Any, progress: Progress) -> None:
    raise OverpaintError("this piece is refused")


def fail(shared: Any, progress: Progress) -> None:
    raise KeyError("a fault of the piece")


def worker_id(shared: float, progress: Progress) -> tuple[int, str]:
    """The process that did it, and its node's id, after so many seconds."""
    import ray

    time.sleep(shared)
    return os.getpid(), str(ray.get_runtime_context().get_node_id())


def die_once(mark: str, progress: Progress) -> str:
    """Kills its own process the first time that it is done."""
    if not Path(mark).exists():
        Path(mark).touch()
        os._exit(9)
    return "done"


def die(shared: Any, progress: Progress) -> None:
    os._exit(9)


def hungry(mark: str, progress: Progress) -> str:
    """Has too little memory the first time."""
    if not Path(mark).exists():
        Path(mark).touch()
        raise OutOfMemory("no room for 2 GiB")
    return "done"


def marked(mark: str, progress: Progress) -> str:
    """Runs for a moment, beside the others."""
    time.sleep(0.5)
    return "marked"


def opens(shared: Any, progress: Progress) -> str:
    """Opens a base by its reference."""
    return str(shared.open().fingerprint)
