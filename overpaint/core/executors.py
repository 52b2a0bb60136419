"""Where pieces of work run: one after the other in this process, or on a Ray cluster.

A piece is an importable function with arguments that can be pickled, so that it means the same anywhere. What comes back are
numbers and bytes; whoever asked writes them down, and nobody else.

On a cluster, actors keep what they loaded, and every one does one piece at a time. A piece whose worker or node is lost is
given to another; one that ran out of memory gets more of it, on a worker of its own; one that fails by itself is
reported, and the others go on. Only this process keeps results, so that one that is started again goes on with what is missing.
"""

from __future__ import annotations

import logging
import os
import socket
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from overpaint.core import __version__
from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import Progress, silent


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        self, pieces: Sequence[Piece], shared: Any, needs: Resources, progress: Progress = silent, *, ahead: int = 0
    ) -> Generator[Result, None, None]:
        """The result of every piece, as it comes. `shared` goes to each, and travels once.

        `progress` is told what is under way: the steps of the piece that runs, or how many workers there are. A piece that
        raises OverpaintError is a result with its message. No piece is begun `ahead` places or more behind the first that is
        not done (0: any may be), so whoever takes results in order never holds as many. Closing the iterator ends what is
        under way.
        """
        ...

    def close(self) -> None:
        """Let go of whatever was started for the work."""
        ...


class InProcess:
    """One piece after the other, here; the next begins when the result before it has been taken."""

    def results(
        self, pieces: Sequence[Piece], shared: Any, needs: Resources, progress: Progress = silent, *, ahead: int = 0
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


ATTEMPTS = 3
"""How often a piece is begun before it is reported as lost."""
PATIENCE = 60.0
"""Seconds in which a cluster must answer, and a worker must start."""
VALUE, REFUSED, FAILED, MEMORY = "value", "refused", "failed", "memory"


def _ray() -> Any:
    """Ray, which is imported only where somebody works on a cluster; without its types, which are there in part."""
    import ray

    return ray


class Worker:
    """An actor: does pieces, and keeps what they load in this process between them."""

    def about(self) -> tuple[str, str]:
        """The version of Overpaint here, and the machine's name."""
        return __version__, machine_name()

    def run(self, piece: Piece, shared: Any) -> tuple[str, Any]:
        """The value of a piece, or what kind of failure it was and its message."""
        try:
            return VALUE, piece.call(shared, *piece.arguments, silent)
        except MemoryError as error:  # a solver's own OutOfMemory, too
            return MEMORY, str(error)
        except OverpaintError as error:
            return REFUSED, str(error)
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's, for a GPU's memory
                return MEMORY, str(error).partition("\n")[0]
            last = traceback.extract_tb(error.__traceback__)[-1]
            return FAILED, f"{type(error).__name__}: {error} (in {last.name}, on {machine_name()})"


@dataclass(eq=False)
class _Waiting:
    """A piece that is not done: how often it was begun, and what it needs."""

    index: int
    needs: Resources
    begun: int = 0


class RayExecutor:
    """Work on a cluster: on this machine where no address is given and RAY_ADDRESS names none.

    Raises OverpaintError where no cluster answers at the address, or its version of Ray or Python is another.
    """

    def __init__(self, address: str = "") -> None:
        self._started = not _ray().is_initialized()
        if self._started:
            _connect(address)
        self._idle: dict[Resources, list[Any]] = {}
        self._under_way: list[_Run] = []

    def close(self) -> None:
        """End the workers and leave the cluster; one that was started here ends."""
        for run in self._under_way:  # whoever was interrupted may not have closed the iterator yet
            run.stop()
        for worker in (worker for workers in self._idle.values() for worker in workers):
            _end(worker)
        self._idle = {}
        if self._started and _ray().is_initialized():
            _ray().shutdown()

    def results(
        self, pieces: Sequence[Piece], shared: Any, needs: Resources, progress: Progress = silent, *, ahead: int = 0
    ) -> Generator[Result, None, None]:
        """The result of every piece, as it comes; `progress` gets how many workers there are and what failed.

        Raises OverpaintError where the cluster has not what one piece needs, or a worker runs another version of Overpaint.
        """
        for other in () if self._under_way else self._idle.keys() - {needs}:  # they would hold what these need
            for worker in self._idle.pop(other):
                _end(worker)
        idle = self._idle.setdefault(needs, [])  # they keep what they loaded for the next call
        run = _Run(pieces, _ray().put(shared), needs, progress, idle, ahead)
        self._under_way.append(run)
        try:
            yield from run.results()
        finally:
            run.stop()
            self._under_way.remove(run)


class _Run:
    def __init__(
        self, pieces: Sequence[Piece], shared: Any, needs: Resources, progress: Progress, idle: list[Any], ahead: int
    ) -> None:
        self._pieces, self._shared, self._needs, self._progress, self._idle = pieces, shared, needs, progress, idle
        self._ahead = ahead
        self._waiting = deque(_Waiting(index, needs) for index in range(len(pieces)))
        self._running: dict[Any, tuple[Any, _Waiting]] = {}
        self._failed = 0

    def results(self) -> Generator[Result, None, None]:
        while self._waiting or self._running:
            self._begin()
            ready, _ = _ray().wait(list(self._running), num_returns=1, timeout=PATIENCE)
            for reference in ready:
                worker, waiting = self._running.pop(reference)
                result = self._result(reference, worker, waiting)
                if result is None:
                    continue
                self._failed += bool(result.error)
                self._report()
                yield result

    def stop(self) -> None:
        """Cut off what runs."""
        for worker, _ in self._running.values():
            _end(worker)
        self._running = {}

    def _report(self) -> None:
        failed = f", {self._failed} failed" if self._failed else ""
        self._progress(0, 1, f"{len(self._running)} under way on {self._size()} workers{failed}")

    def _size(self) -> int:
        return len(self._idle) + len(self._running)

    def _begin(self) -> None:
        """Give a piece to every worker that the cluster has room for.

        A piece that needs more than the others waits until none of them runs: only then is its share free for certain.
        """
        while (waiting := self._next()) is not None:
            if waiting.needs != self._needs:
                if self._running:
                    return
                while self._idle:
                    _end(self._idle.pop())
                worker = self._hired(waiting.needs)
            elif self._idle:
                worker = self._idle.pop()
            elif not self._running or (self._size() < _room(self._needs) and _is_free(self._needs)):
                worker = self._hired(self._needs)
            else:
                return
            if worker is None:
                return
            self._waiting.remove(waiting)
            waiting.begun += 1
            piece = self._pieces[waiting.index]
            reference = worker.run.options(name=piece.name).remote(piece, self._shared)
            self._running[reference] = (worker, waiting)

    def _next(self) -> _Waiting | None:
        """The piece to begin next, one that needs no more than the others if there is one; None while none may begin."""
        waiting: Sequence[_Waiting] = self._waiting
        if self._ahead and waiting:
            first = min(each.index for each in (*waiting, *(begun for _, begun in self._running.values())))
            waiting = [each for each in waiting if each.index < first + self._ahead]
        usual = next((each for each in waiting if each.needs == self._needs), None)
        return usual or next(iter(waiting), None)

    def _hired(self, needs: Resources) -> Any:
        """A new worker; None where others were faster to take the room, and there are workers to go on with.

        Raises OverpaintError where there is no room for a single one, or it runs another version.
        """
        total: dict[str, float] = _ray().cluster_resources()
        short = [
            f"{wanted:g} {name}"
            for name, wanted in (("CPU", needs.cpus), ("GPU", needs.gpus), ("memory", needs.memory))
            if wanted > total.get(name, 0)
        ]
        if short:
            raise OverpaintError(f"no node of the cluster can do this: a piece needs {', '.join(short)}")
        options: dict[str, Any] = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "max_restarts": 0}
        if needs.memory:
            options["memory"] = needs.memory
        for begun in range(1, ATTEMPTS + 1):
            worker = _ray().remote(Worker).options(**options).remote()
            try:
                version, machine = _ray().get(worker.about.remote(), timeout=PATIENCE)
                break
            except _ray().exceptions.GetTimeoutError:
                _end(worker)
                if self._running:
                    return None
                raise OverpaintError(
                    f"no worker started within {PATIENCE:.0f} s; the cluster is busy or has lost its nodes: see `ray status`"
                ) from None
            except _ray().exceptions.RayActorError as error:  # its node may have been lost meanwhile; another has room
                if begun == ATTEMPTS:
                    raise OverpaintError(f"no worker could start: {_first_line(error)}") from None
        if version != __version__:
            _end(worker)
            raise OverpaintError(
                f"the worker on {machine} has Overpaint {version} and this program {__version__}; install the same everywhere"
            )
        return worker

    def _result(self, reference: Any, worker: Any, waiting: _Waiting) -> Result | None:
        """What came of a piece; None where it is to be done again."""
        try:
            kind, value = _ray().get(reference)
        except (_ray().exceptions.RayActorError, _ray().exceptions.OutOfMemoryError) as error:
            return self._again(waiting, isinstance(error, _ray().exceptions.OutOfMemoryError), _first_line(error))
        if kind == MEMORY:
            _end(worker)  # what it holds may be what there is no room for
            return self._again(waiting, True, value)
        if waiting.needs == self._needs:
            self._idle.append(worker)
        else:
            _end(worker)
        return Result(waiting.index, value) if kind == VALUE else Result(waiting.index, error=value)

    def _again(self, waiting: _Waiting, was_memory: bool, reason: str) -> Result | None:
        needs = _more(waiting.needs) if was_memory else waiting.needs
        if waiting.begun >= ATTEMPTS or needs is None:
            why = "ran out of memory" if was_memory else "lost its worker"
            return Result(waiting.index, error=f"{why} {waiting.begun} times: {reason}")
        self._waiting.append(replace(waiting, needs=needs))
        return None


def _end(worker: Any) -> None:
    with suppress(_ray().exceptions.RayError, ValueError):
        _ray().kill(worker)


def _more(needs: Resources) -> Resources | None:
    """What a piece gets that ran out of memory: the whole GPU that it had a share of; without a GPU, twice the share of a node,
    so that fewer run beside it. None where it had the whole GPU, or no node of the cluster has so much.
    """
    if needs.gpus:
        return replace(needs, gpus=1.0) if needs.gpus < 1 else None
    larger = replace(needs, cpus=2 * needs.cpus, memory=2 * needs.memory)
    nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
    fits = any(larger.cpus <= node.get("CPU", 0) and larger.memory <= node.get("memory", 0) for node in nodes)
    return larger if fits else None


def _room(needs: Resources) -> int:
    """How many workers the living nodes have room for."""
    room = 0
    for node in _ray().nodes():
        has = node["Resources"] if node["Alive"] else {}
        wanted = (("CPU", needs.cpus), ("GPU", needs.gpus), ("memory", needs.memory))
        # A little more than it is: a GPU has room for five fifths, which floating point takes for four.
        room += int(min((has.get(name, 0) / amount + 1e-6 for name, amount in wanted if amount), default=0))
    return room


def _is_free(needs: Resources) -> bool:
    """Whether the cluster, which others may use as well, has something left for one more worker."""
    free: dict[str, float] = _ray().available_resources()
    wanted = (("CPU", needs.cpus), ("GPU", needs.gpus), ("memory", needs.memory))
    return all(amount <= free.get(name, 0) for name, amount in wanted)


def _refuse_silent(address: str) -> None:
    """Ray itself asks for minutes where nobody answers."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (port.isascii() and port.isdigit()):
        raise OverpaintError(
            f"{address} has no port; name a Ray cluster as ray://HOST:PORT, for instance ray://10.0.0.1:10001"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise OverpaintError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or name another"
        ) from None


def _connect(address: str) -> None:
    if address:
        _refuse_silent(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    # So that a worker without a GPU of its own does not hide those of the machine; Ray warns unless this is set.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    asked: dict[str, Any] = {"address": address} if address else {}
    if not address and not os.environ.get("RAY_ADDRESS"):
        asked["address"] = "local"
        asked["include_dashboard"] = False
    try:
        _ray().init(**asked, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except Exception as error:  # of whatever class: that a node timed out while it started is a bare Exception
        raise OverpaintError(
            f"no Ray cluster can be used at {address or os.environ.get('RAY_ADDRESS', 'this machine')}: {_first_line(error)}"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def open_executor(on: str = "") -> Executor:
    """The executor of a word: nothing for this process, `ray` for a cluster on this machine or the one that RAY_ADDRESS
    names, `ray://HOST:PORT` or `HOST:PORT` for a cluster elsewhere.

    Raises OverpaintError for any other word, where Ray is not installed, or where no cluster answers.
    """
    if not on:
        return InProcess()
    if not isinstance(on, str) or (on != "ray" and not on.startswith("ray://") and ":" not in on):
        raise OverpaintError(
            f"got {on!r} as the place to run on; ray is a cluster on this machine, ray://HOST:PORT another"
        )
    try:
        _ray()
    except ModuleNotFoundError:
        raise OverpaintError("running on Ray needs the package ray: pip install 'overpaint[ray]'") from None
    return RayExecutor("" if on == "ray" else on)
