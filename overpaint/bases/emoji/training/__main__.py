"""Train the embedded base: `python -m overpaint.bases.emoji.training --data FOLDER --work FOLDER --out FOLDER`.

Stages in order: vae, clip, judge, unet. Each can be run alone, resumes from its last checkpoint, and reads what
the earlier ones left in `--out`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click
import torch

from overpaint.bases.emoji.training.loop import Run

STAGES: dict[str, dict[str, Any]] = {
    "vae": {"steps": 3000, "batch": 16, "lr": 2e-3, "restart": 1500},
    "clip": {"steps": 900, "batch": 64, "lr": 1e-3},
    "judge": {"steps": 900, "batch": 64, "lr": 2e-3},
    "unet": {"steps": 5800, "batch": 64, "lr": 1.5e-3, "ema": 0.998, "restart": 3400},
}


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="emoji64.npz"
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("work"), show_default=True, help="checkpoints")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(__file__).parent.parent / "model", help="the model"
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--stage", "stages", type=click.Choice(list(STAGES)), multiple=True, help="only these; default: all")
@click.option("--steps", type=int, help="instead of the stage's own number")
@click.option("--threads", type=int, help="CPU threads")
def main(
    data: Path,
    work: Path,
    out: Path,
    device: str,
    seed: int,
    stages: tuple[str, ...],
    steps: int | None,
    threads: int | None,
) -> None:
    """Train the embedded base on the emoji artwork."""
    if threads:
        torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    for stage in stages or tuple(STAGES):
        settings = dict(STAGES[stage])
        if steps:
            settings["steps"] = steps
        module = importlib.import_module(f"overpaint.bases.emoji.training.{stage}")
        module.run(Run(work=work, out=out, data=data, device=torch.device(device), seed=seed, **settings))


if __name__ == "__main__":
    main()
