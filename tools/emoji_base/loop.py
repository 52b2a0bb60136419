"""One training loop for every stage: seeded, resumable, stopped by a signal without loss."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

SAVE_EVERY = 150.0
"""Seconds between two checkpoints."""


@dataclass(frozen=True)
class Place:
    """Where a stage works: `work` holds checkpoints and caches, `out` the finished base, `data` the artwork.

    `start` is the folder of an earlier base whose weights the first stages begin with; None: from random weights.
    """

    work: Path
    out: Path
    data: Path
    device: torch.device
    seed: int = 0
    start: Path | None = None


@dataclass(frozen=True)
class Schedule:
    """How long a stage trains.

    The learning rate warms up over `warm` steps, stays at `lr`, and falls along half a cosine over the last `fall` of
    the steps. So a finished or unfinished stage can be resumed with more steps: it goes on at `lr` and falls later.
    `ema` is the decay of the averaged weights (0: none).
    """

    steps: int
    batch: int
    lr: float
    ema: float = 0.0
    warm: int = 100
    fall: float = 0.4

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        start = self.steps * (1 - self.fall)
        if step < start:
            return self.lr * min(1.0, (step + 1) / self.warm)
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1.0, self.steps - start))))


@dataclass
class Stop:
    """Set by SIGTERM or SIGINT; the loop then writes a checkpoint and ends the program."""

    asked: bool = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within the block, the first SIGTERM or SIGINT asks for a stop."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class State:
    """What a checkpoint holds: the module, its averaged weights, the optimiser, and how many steps are done."""

    path: Path
    module: nn.Module
    optimiser: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int = 0
    seconds: float = field(default=0.0)

    def save(self) -> None:
        """Write the checkpoint; a half-written one never takes its place."""
        state = {
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def load(self, device: torch.device) -> None:
        """Read the checkpoint if there is one."""
        if self.path.exists():
            saved: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
            self.module.load_state_dict(saved["module"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.average, self.step, self.seconds = saved["average"], saved["step"], saved["seconds"]

    def update_average(self, decay: float) -> None:
        """Move the averaged weights towards the present ones."""
        state = self.module.state_dict()
        pairs = [(mean, state[key]) for key, mean in self.average.items() if mean.dtype.is_floating_point]
        if pairs:
            torch._foreach_lerp_([mean for mean, _ in pairs], [value for _, value in pairs], 1 - decay)


def train(
    name: str,
    module: nn.Module,
    loss_of: Callable[[torch.Generator, int], Tensor],
    place: Place,
    schedule: Schedule,
) -> nn.Module:
    """Minimise `loss_of(generator, step)` over `module`'s parameters; returns the module with its averaged weights."""
    chosen = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=schedule.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = {k: v.detach().clone() for k, v in module.state_dict().items()} if schedule.ema else {}
    state = State(place.work / f"{name}.pt", module, optimiser, average)
    state.load(place.device)
    module.train()
    with stoppable() as stop:
        for _ in _steps(name, state, loss_of, place, schedule):
            if stop.asked:
                state.save()
                raise SystemExit(f"{name} stopped at step {state.step} of {schedule.steps}; the same command goes on")
    if state.average:
        module.load_state_dict(state.average)
    return module.eval()


def _steps(
    name: str, state: State, loss_of: Callable[[torch.Generator, int], Tensor], place: Place, schedule: Schedule
) -> Iterator[int]:
    began = saved = time.monotonic()
    before, first, shown = state.seconds, state.step, math.nan
    while state.step < schedule.steps:
        for group in state.optimiser.param_groups:
            group["lr"] = schedule.rate(state.step)
        # A generator per step, so that a resumed run draws what an uninterrupted one would have drawn.
        generator = torch.Generator().manual_seed(place.seed * 1_000_003 + state.step)
        loss = loss_of(generator, state.step)
        state.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(state.module.parameters(), 1.0)
        state.optimiser.step()
        state.update_average(min(schedule.ema, (state.step + 1) / (state.step + 10)))
        value = loss.item()
        shown = value if math.isnan(shown) else 0.98 * shown + 0.02 * value
        state.step += 1
        now = time.monotonic()
        state.seconds = before + now - began
        if state.step % 50 == 0:
            each = (now - began) / (state.step - first)
            left = each * (schedule.steps - state.step) / 60
            print(
                f"{name} {state.step}/{schedule.steps} loss {shown:.4f}, {each:.3f} s a step, {left:.1f} min left",
                flush=True,
            )
        if now - saved > SAVE_EVERY or state.step == schedule.steps:
            state.save()
            saved = now
        yield state.step
