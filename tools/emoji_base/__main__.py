"""Train the embedded bases: `python -m tools.emoji_base --data FOLDER --work FOLDER --out FOLDER`.

Every stage resumes from its last checkpoint in `--work` and reads what earlier stages left in `--out`. A stage whose
checkpoint has all its steps only saves its files again. SIGTERM stops after a checkpoint; the same command goes on.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import click
import torch

from tools.emoji_base.loop import Place, Schedule

STAGES: dict[str, tuple[str, str, Schedule]] = {
    "vae": ("autoencoder", "emoji", Schedule(steps=2700, batch=8, lr=1e-3)),
    "clip": ("clip", "emoji", Schedule(steps=700, batch=64, lr=1e-3)),
    "judge": ("judge_training", "emoji", Schedule(steps=1200, batch=64, lr=2e-3)),
    "unet": ("unet", "emoji", Schedule(steps=6000, batch=32, lr=1.2e-3, ema=0.998)),
    "vae-decoder": ("decoder", "emoji", Schedule(steps=1500, batch=8, lr=1e-3)),
    "card": ("card", "emoji", Schedule(steps=0, batch=50, lr=0.0)),
    "dit-text": ("text_encoders", "emoji-dit", Schedule(steps=400, batch=64, lr=2e-3)),
    "dit": ("transformer", "emoji-dit", Schedule(steps=4000, batch=64, lr=1.2e-3, ema=0.998)),
    "dit-card": ("transformer_card", "emoji-dit", Schedule(steps=0, batch=50, lr=0.0)),
}
"""By stage: the module that runs it, the base it belongs to, how long it trains."""


@click.command(help=__doc__)
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="the artwork"
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("work"), show_default=True, help="checkpoints")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bases"), show_default=True, help="both bases")
@click.option("--start", type=click.Path(path_type=Path, exists=True), help="an earlier emoji base to begin with")
@click.option("--stage", "stages", type=click.Choice(list(STAGES)), multiple=True, help="only these; default: all")
@click.option("--steps", type=int, help="instead of the stage's own number")
@click.option("--batch", type=int, help="instead of the stage's own number")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="CPU threads")
@click.option("--seed", default=0, show_default=True)
def main(
    data: Path,
    work: Path,
    out: Path,
    start: Path | None,
    stages: tuple[str, ...],
    steps: int | None,
    batch: int | None,
    device: str,
    threads: int | None,
    seed: int,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    work.mkdir(parents=True, exist_ok=True)
    for stage in stages or tuple(STAGES):
        module, base, schedule = STAGES[stage]
        schedule = replace(schedule, steps=steps or schedule.steps, batch=batch or schedule.batch)
        place = Place(work, out / base, data, torch.device(device), seed, start)
        importlib.import_module(f"tools.emoji_base.{module}").run(place, schedule)


if __name__ == "__main__":
    main()
