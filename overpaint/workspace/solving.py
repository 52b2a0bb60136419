"""Carrying out a plan: one patch after the other, each stored before the next is begun.

Ctrl-C while a patch is stored waits until it is stored, so that what was reported as done is done.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from string import capwords
from typing import Any

import torch

from overpaint.bases.base import Base, BaseReference
from overpaint.core.concepts import Concept
from overpaint.core.executors import Executor, InProcess, Piece, Resources
from overpaint.core.reporting import Progress, html_table, silent
from overpaint.patches.patch import Patch, make_patch, read_patch
from overpaint.registry.records import PatchRecord
from overpaint.registry.registry import Registry
from overpaint.solvers.problem import EditProblem, Unsolvable
from overpaint.solvers.trained.denoiser import releasing
from overpaint.workspace.derived_patches import compress_patch, decouple_patch
from overpaint.workspace.planning import PlannedSolve, SolveContext, SolvePlan, SolveRequest, provenance


@dataclass(frozen=True, eq=False)
class SolvedPatch:
    """A patch that is not stored yet, what its solver reported, and the seconds that took."""

    request: SolveRequest
    patch: Patch
    diagnostics: Mapping[str, Any]
    seconds: float

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes the patch travels as its file, whose digests are checked where it is read."""
        return _solved_of_file, (self.request, self.patch.blob, dict(self.diagnostics), self.seconds)


def _solved_of_file(request: SolveRequest, blob: bytes, diagnostics: Mapping[str, Any], seconds: float) -> SolvedPatch:
    return SolvedPatch(request, read_patch(blob), diagnostics, seconds)


@dataclass(frozen=True)
class SolveInputs:
    """What all pieces of a run read: the base, the concepts and prompts around, the device."""

    base: BaseReference
    context: SolveContext
    device: str


def solve_piece(inputs: SolveInputs, request: SolveRequest, progress: Progress) -> SolvedPatch:
    """Carry out one request, in whichever process."""
    return solve_request(request, inputs.base.open(), inputs.context, torch.device(inputs.device), progress)


def solve_request(
    request: SolveRequest,
    base: Base,
    context: SolveContext,
    device: torch.device,
    report: Progress,
) -> SolvedPatch:
    """Carry out a request. Nothing is stored; what the solver raises passes through."""
    solver = request.configured()
    if reason := solver.supports(base.layout):
        raise Unsolvable(reason)
    problem = EditProblem(
        base, request.concept, context.universe, request.seed, device, report, context.preserve_prompts, context.cache
    )
    started = time.perf_counter()
    solution = solver.solve(problem)
    seconds = time.perf_counter() - started
    # Another backend sums in another order, so its patch has other bits and an id of its own.
    backend = {} if device.type == "cpu" else {"backend": device.type}
    recorded = {**provenance(request, solver, context), **solution.record, **backend}
    patch = make_patch(base, request.concept, solution.delta, recorded)
    errors: dict[str, float] = {}
    if request.decoupled:
        separate = decouple_patch(base, patch, request.decoupled, context, device, report)
        patch, errors = separate.patch, {f"decoupled: {name}": value for name, value in separate.diagnostics.items()}
    for truncation in request.truncations:
        smaller = compress_patch(base, patch, truncation)
        patch = smaller.patch
        errors["compression error"] = max(smaller.errors.values())
    notes = [solution.diagnostics.get("note"), _unlisted_spelling(base, request.concept)]
    note = {"note": "; ".join(filter(None, notes))} if any(notes) else {}
    return SolvedPatch(request, patch, {**solution.diagnostics, **errors, **note}, seconds)


def _unlisted_spelling(base: Base, concept: Concept) -> str:
    """Says that a text encoder reads a word otherwise when its capitals differ, unless the concept lists it so, too.

    CLIP's tokenizer, which reads the bases that are not caught, knows small letters alone; T5's takes "Banksy" and "banksy" for
    two words, and erasing one of them need not erase the other.
    """
    if base.layout.is_caught:
        for word in concept.words:
            others = {word.lower(), capwords(word)} - set(concept.words)
            if any(reads(word) != reads(other) for reads in _tokenizers(base.config_folder) for other in others):
                return OTHER_SPELLINGS
    return ""


@cache
def _tokenizers(folder: Path) -> tuple[Callable[[str], Any], ...]:
    """What gives the tokens of a text, for each tokenizer of a pipeline; one that cannot be read by itself is left out."""
    from transformers import AutoTokenizer

    found: list[Callable[[str], Any]] = []
    for each in sorted(folder.glob("tokenizer*")):
        with suppress(Exception):  # for a note, nothing that was solved is lost
            tokenizer = AutoTokenizer.from_pretrained(each, local_files_only=True, trust_remote_code=False)
            found.append(partial(tokenizer.encode, add_special_tokens=False))
    return tuple(found)


OTHER_SPELLINGS = (
    "a text encoder of this base tells capital letters from small ones, and a concept is erased as its words are written: where "
    "people may write it otherwise, list that as a synonym"
)


@dataclass(frozen=True)
class Solved:
    """A patch that was solved and stored, what its solver reported, and the seconds it took."""

    record: PatchRecord
    diagnostics: Mapping[str, Any]
    seconds: float

    @property
    def id(self) -> str:
        """The patch's id: the digest of its manifest."""
        return self.record.id

    @property
    def nbytes(self) -> int:
        """Size of the patch's file, in bytes."""
        return self.record.nbytes

    def __repr__(self) -> str:
        return f"<Solved {self.id[:12]}: {self.record.concept} on {self.record.base}, {self.nbytes:,} bytes>"

    def _repr_html_(self) -> str:
        record = self.record
        rows = [("solver", record.solver), *record.settings.items(), ("seed", record.seed), ("kind", record.kind)]
        numbers = [("bytes", f"{self.nbytes:,}"), ("seconds", f"{self.seconds:.3g}"), *self.diagnostics.items()]
        return html_table(repr(self), ["what", "value"], [*rows, *numbers])


def store_patch(registry: Registry, patch: Patch, base: str, seconds: float) -> PatchRecord:
    """Store a patch and the row that follows from its manifest. Raises NotFound for a concept or a base that is not known."""
    solver = patch.manifest["solver"]
    return registry.add_patch(
        id=patch.id,
        blob=patch.blob,
        concept=patch.concept.name,
        base=base,
        solver=solver["name"],
        kind=patch.delta.kind,
        settings=solver.get("settings", {}),
        seed=solver.get("seed", 0),
        seconds=seconds,
    )


@contextmanager
def deferring_interrupts() -> Iterator[None]:
    """Within the block, the first Ctrl-C is deferred to its end; a second one is not.

    Where somebody else has decided what Ctrl-C does, or in a thread that it does not reach, nothing changes.
    """
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked = False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class SolveOutcome:
    """What became of one task: its patch, or the error; `before` when the patch was there already."""

    task: PlannedSolve
    record: PatchRecord | None
    before: bool = False
    error: str = ""
    diagnostics: Mapping[str, Any] = field(default_factory=dict, hash=False)
    seconds: float = 0.0


def carry_out(
    registry: Registry,
    plan: SolvePlan,
    open_base: Callable[[str], Base],
    device: torch.device,
    *,
    executor: Executor | None = None,
    report: Progress = silent,
    on_result: Callable[[SolveOutcome], None] = lambda outcome: None,
) -> list[SolveOutcome]:
    """Solve and store what a plan leaves open; the outcome of every task, in the plan's order.

    `open_base` gives the plan's base by name, and is not asked when there is nothing to solve. `executor` says where the
    solvers run, this process by default; the registry is written here alone.
    The registry learns the plan's concepts in one transaction when the first patch is there to be stored: whatever stops
    before that leaves nothing. Where a solver gives up, the others go on. `on_result` is called with every outcome when it is
    final; KeyboardInterrupt leaves what it was called with stored, and nothing half done.
    """
    outcomes = {
        index: SolveOutcome(task, task.done, before=True, seconds=task.done.seconds)
        for index, task in enumerate(plan.tasks)
        if task.done is not None
    }
    for outcome in outcomes.values():
        on_result(outcome)
    indices = [index for index, task in enumerate(plan.tasks) if task.done is None]
    if indices:
        inputs = SolveInputs(BaseReference(open_base(plan.base.name)), plan.context, device.type)
        requests = [plan.tasks[index].request for index in indices]
        pieces = [Piece(f"solving {request.concept.name}", solve_piece, (request,)) for request in requests]
        clock = Clock(len(pieces), report)
        needs = Resources(gpus=gpu_share(requests, inputs.base.open(), device))
        learnt = False
        running = (executor or InProcess()).results(pieces, inputs, needs, clock.progress)
        with releasing(inputs.base.open()), closing(running) as results:
            for result in results:
                index = indices[result.index]
                with deferring_interrupts():
                    outcome = SolveOutcome(plan.tasks[index], None, error=result.error)
                    if not result.error:
                        if not learnt:
                            concepts = {task.request.concept.name: task.request.concept for task in plan.tasks}
                            registry.learn_concepts(concepts.values(), update=bool(plan.changed))
                            learnt = True
                        solved: SolvedPatch = result.value
                        record = store_patch(registry, solved.patch, plan.base.name, solved.seconds)
                        outcome = replace(
                            outcome, record=record, diagnostics=solved.diagnostics, seconds=solved.seconds
                        )
                    outcomes[index] = outcome
                    on_result(outcome)
                clock.tick()
    return [outcomes[index] for index in range(len(plan.tasks))]


AT_ONCE = 8
"""Solvers on one GPU, at most: each keeps one core busy."""
USABLE = 0.9
"""The share of a GPU's memory that is counted on."""


def gpu_share(requests: Iterable[SolveRequest], base: Base, device: torch.device) -> float:
    """The share of a GPU that each request gets: 1 over as many as its memory has room for, as the solvers estimate it."""
    if device.type != "cuda":
        return 0.0
    needed = [request.configured().peak_bytes(base) for request in requests]
    if not all(needed):
        return 1.0
    room = USABLE * torch.cuda.get_device_properties(device).total_memory
    return 1.0 / min(AT_ONCE, max(1, int(room // max(needed))))


class Clock:
    """How far a run is, and how long the rest will take."""

    def __init__(self, tasks: int, report: Progress) -> None:
        self._tasks, self._done, self._report = tasks, 0, report
        self._began: float | None = None

    def tick(self) -> None:
        """A task is done. The first is no measure: it may have read the vocabulary for all."""
        self._done += 1
        self._began = self._began or time.monotonic()

    def progress(self, step: int, of: int, text: str) -> None:
        """Pass on a solver's steps as steps of the run."""
        now = min(self._done + 1, self._tasks)
        self._report(now, self._tasks, f"{text}{f' {step}/{of}' if of > 1 else ''}{self.left()}")

    def left(self) -> str:
        """The time left in words, once there is something to go by."""
        if self._began is None or self._done < 2:
            return ""
        seconds = (time.monotonic() - self._began) / (self._done - 1) * (self._tasks - self._done)
        return f", about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class SolverInfo:
    """A solver by name: what it does, the package it is from, its settings with their defaults, its presets."""

    name: str
    about: str
    package: str
    settings: Mapping[str, Any] = field(hash=False)
    presets: Mapping[str, Mapping[str, Any]] = field(hash=False)


def solver_infos() -> list[SolverInfo]:
    """All solvers that can be loaded, with what can be set on each."""
    from overpaint.solvers import BrokenSolver, solver_class, solvers
    from overpaint.solvers.problem import settable

    infos = []
    for each in solvers()[0].values():
        with suppress(BrokenSolver):
            kind = solver_class(each.name)
            settings = {name: spec.default for name, spec in settable(kind).items()}
            infos.append(SolverInfo(each.name, each.about, each.package, settings, kind.PRESETS))
    return infos
