"""Carrying out a plan: one patch after the other, each stored before the next is begun."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from overpaint.bases.base import Base
from overpaint.errors import OverpaintError
from overpaint.registry.records import PatchRecord
from overpaint.registry.registry import Registry
from overpaint.solving.interrupts import held_back
from overpaint.solving.making import Made, make, store
from overpaint.solving.plans import Plan, Task


@dataclass(frozen=True)
class Outcome:
    """What became of one task: its patch, or the error; `before` when the patch was there already."""

    task: Task
    record: PatchRecord | None
    before: bool = False
    error: str = ""
    diagnostics: Mapping[str, Any] = field(default_factory=dict, hash=False)
    seconds: float = 0.0


def carry_out(
    registry: Registry,
    plan: Plan,
    open_base: Callable[[str], Base],
    device: torch.device,
    *,
    report: Callable[[int, int, str], None] = lambda step, of, text: None,
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Solve and store what a plan leaves open; the outcome of every task, in the plan's order.

    `open_base` gives the plan's base by name, and is not asked when there is nothing to solve.
    The registry learns the plan's concepts in one transaction when the first patch is there to be stored: whatever stops
    before that leaves nothing. A task whose solver gives up is told and the others go on. `told` hears of every outcome
    when it is final; KeyboardInterrupt leaves what was told stored, and nothing half done.
    """
    outcomes: list[Outcome] = []
    base = open_base(plan.base.name) if plan.open else None
    clock = Clock(len(plan.open))
    learnt = False
    for task in plan.tasks:
        if task.done is not None:
            outcomes.append(Outcome(task, task.done, before=True, seconds=task.done.seconds))
            told(outcomes[-1])
            continue
        assert base is not None, "a task is open in a plan without open tasks"
        try:
            tell = clock.reporter(task, report)
            made = make(task.order, task.provenance, base, plan.around, device, tell)
        except OverpaintError as error:
            outcomes.append(Outcome(task, None, error=str(error)))
            told(outcomes[-1])
        else:
            with held_back():
                if not learnt:
                    _learn(registry, plan)
                    learnt = True
                outcomes.append(_stored(registry, plan, task, made))
                told(outcomes[-1])
        clock.tick()
    return outcomes


def _learn(registry: Registry, plan: Plan) -> None:
    wanted = {task.order.concept.name: task.order.concept for task in plan.tasks}
    registry.learn_concepts(wanted.values(), update=bool(plan.changed))


def _stored(registry: Registry, plan: Plan, task: Task, made: Made) -> Outcome:
    record = store(registry, made, plan.base.name)
    return Outcome(task, record, diagnostics=made.diagnostics, seconds=made.seconds)


class Clock:
    """How far a run is, and how long the rest will take."""

    def __init__(self, tasks: int) -> None:
        self._tasks, self._done = tasks, 0
        self._began: float | None = None

    def tick(self) -> None:
        """A task is done. The first is no measure: it may have read the vocabulary for all."""
        self._done += 1
        self._began = self._began or time.monotonic()

    def reporter(self, task: Task, report: Callable[[int, int, str], None]) -> Callable[[int, int, str], None]:
        """Where a solver reports its steps; passed on as steps of the run."""
        name, step = task.order.concept.name, self._done + 1
        report(step, self._tasks, f"solving {name}{self.left()}")
        return lambda inner, of, text: report(
            step, self._tasks, f"solving {name}: {text}{f' {inner}/{of}' if of > 1 else ''}{self.left()}"
        )

    def left(self) -> str:
        """The time left in words, once there is something to go by."""
        if self._began is None or self._done < 2:
            return ""
        seconds = (time.monotonic() - self._began) / (self._done - 1) * (self._tasks - self._done)
        return f", about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
