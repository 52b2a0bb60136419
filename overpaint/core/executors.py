"""Where pieces of work run: one after the other in this process, or on a Ray cluster.

A piece is an importable function with arguments that can be pickled, so that it means the same anywhere. What comes back are
numbers and bytes; whoever asked writes them down, and nobody else.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import Progress, silent


@dataclass(frozen=True)
class Resources:
    """What a piece needs: CPU cores, GPUs, bytes of memory (0: whatever there is)."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class Piece:
    """One piece of work: `call(shared, *arguments, progress)`. `name` says what it is, to people."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Result:
    """What became of a piece, by its place among the pieces: its value, or why there is none."""

    index: int
    value: Any = None
    error: str = ""


class Executor(Protocol):
    """Does pieces of work in any order, each once."""

    def results(
        self, pieces: Sequence[Piece], shared: Any, needs: Resources, progress: Progress = silent
    ) -> Generator[Result, None, None]:
        """The result of every piece, as it comes. `shared` goes to each, and travels once.

        `progress` is told what is under way: the steps of the piece that runs, or how many workers there are. A piece that
        raises OverpaintError is a result with its message. Closing the iterator ends what is under way.
        """
        ...

    def close(self) -> None:
        """Let go of whatever was started for the work."""
        ...


class InProcess:
    """One piece after the other, here; the next begins when the result before it has been taken."""

    def results(
        self, pieces: Sequence[Piece], shared: Any, needs: Resources, progress: Progress = silent
    ) -> Generator[Result, None, None]:
        for index, piece in enumerate(pieces):
            progress(0, 1, piece.name)
            try:
                yield Result(index, piece.call(shared, *piece.arguments, _named(piece.name, progress)))
            except OverpaintError as error:
                yield Result(index, error=str(error))

    def close(self) -> None:
        """Nothing was started."""


def _named(name: str, progress: Progress) -> Progress:
    return lambda step, of, text: progress(step, of, f"{name}: {text}")


def machine_name() -> str:
    """This machine's name, for messages about a worker."""
    return socket.gethostname()
