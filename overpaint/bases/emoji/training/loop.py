"""One training loop for every stage: seeded, resumable, with progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import Tensor, nn


@dataclass(frozen=True)
class Run:
    """Where a stage works and for how long.

    `work` holds checkpoints, `out` the finished files. `steps` is the number of optimiser steps, `lr` the peak
    learning rate of a cosine schedule with a warm-up of 2%, `ema` the decay of the averaged weights (0: none). With
    `restart`, the schedule ends there and begins anew for the rest of the steps (SGDR, arXiv 1608.03983).
    """

    work: Path
    out: Path
    data: Path
    device: torch.device
    seed: int
    steps: int
    batch: int
    lr: float
    ema: float = 0.0
    restart: int = 0


def track(name: str, first: int, steps: int, says: Callable[[], str]) -> Iterator[int]:
    """The steps from `first` on, with a progress bar; every fiftieth is a line where there is no terminal."""
    bar = Progress(*Progress.get_default_columns(), TextColumn("{task.fields[says]}"), console=Console(stderr=True))
    with bar:
        task = bar.add_task(name, total=steps, completed=first, says="")
        for step in range(first, steps):
            yield step
            bar.update(task, completed=step + 1, says=says())
            if (step + 1) % 50 == 0 and not bar.console.is_terminal:
                left = bar.tasks[task].time_remaining or 0.0
                print(f"{name} {step + 1}/{steps} {says()}, {left / 60:.1f} min left", flush=True)


def learning_rate(step: int, run: Run) -> float:
    """Linear warm-up over the first 2% of the steps of a cycle, then half a cosine down to 2% of the peak."""
    start, end = (run.restart, run.steps) if step >= run.restart else (0, run.restart)
    step, length = step - start, end - start
    warm = max(1, length // 50)
    if step < warm:
        return run.lr * (step + 1) / warm
    return run.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, length - warm))))


def train(
    name: str,
    module: nn.Module,
    loss_of: Callable[[torch.Generator, int], Tensor],
    run: Run,
    *,
    every: Callable[[nn.Module, int], None] = lambda module, step: None,
) -> nn.Module:
    """Minimise `loss_of(generator, step)` over `module`'s parameters; returns the module with its averaged weights.

    A checkpoint is written every 250 steps and picked up again by the next call with the same `run.work`. `every` is
    called at each checkpoint with the averaged module, to draw a sample grid.
    """
    optimiser = torch.optim.AdamW(module.parameters(), lr=run.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = {k: v.detach().clone() for k, v in module.state_dict().items()} if run.ema else {}
    path, first = run.work / f"{name}.pt", 0
    if path.exists():
        saved = torch.load(path, map_location=run.device, weights_only=True)
        module.load_state_dict(saved["module"])
        optimiser.load_state_dict(saved["optimiser"])
        average, first = saved["average"], saved["step"]
    module.train()
    shown: dict[str, float] = {}
    for step in track(name, first, run.steps, lambda: f"loss {shown['loss']:.4f}"):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, run)
        # A generator per step, so that a resumed run draws what an uninterrupted one would have drawn.
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        loss = loss_of(generator, step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        _average(average, module.state_dict(), min(run.ema, (step + 1) / (step + 10)))
        value = loss.item()
        shown["loss"] = 0.98 * shown.get("loss", value) + 0.02 * value
        done = step + 1
        if done % 250 == 0 or done == run.steps:
            state = {
                "module": module.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average,
                "step": done,
            }
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            if done % 1000 == 0 or done == run.steps:
                with averaged(module, average):
                    every(module, done)
    if average:
        module.load_state_dict(average)
    return module.eval()


def _average(average: dict[str, Tensor], state: dict[str, Tensor], decay: float) -> None:
    pairs = [(mean, state[key]) for key, mean in average.items() if mean.dtype.is_floating_point]
    if pairs:
        torch._foreach_lerp_([mean for mean, _ in pairs], [value for _, value in pairs], 1 - decay)


class averaged:
    """Within the block, `module` carries the averaged weights and is in evaluation mode."""

    def __init__(self, module: nn.Module, average: dict[str, Tensor]) -> None:
        self.module, self.average = module, average

    def __enter__(self) -> None:
        self.kept = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        if self.average:
            self.module.load_state_dict(self.average)
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.load_state_dict(self.kept)
        self.module.train()


def sheet(pictures: Iterable[Tensor], columns: int, path: Path) -> None:
    """Save pictures ([3, h, w], values in [-1, 1]) as one grid."""
    from PIL import Image

    tiles = [((p.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy() for p in pictures]
    height, width = tiles[0].shape[:2]
    grid = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height))
    for i, tile in enumerate(tiles):
        grid.paste(Image.fromarray(tile), (i % columns * width, i // columns * height))
    grid.save(path)
