"""How long the embedded base takes to draw, one batch after the other and as many at once as there are cores:
`python -m benchmarks.images [--count 1000] [--json FILE]`."""

from __future__ import annotations

import os
import time

import torch

from benchmarks.tables import arguments, save, show
from overpaint.bases.base import Base
from overpaint.bases.loading import resolve_device
from overpaint.core.executors import available_cores
from overpaint.evaluation.images import Sampler, generate
from overpaint.evaluation.prompts import catalogue, object_scenes

BAR = 240.0
"""Seconds for 1,000 pictures of 20 steps on two cores."""


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--count", type=int, default=1000, help="pictures")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    asked = parser.parse_args()
    device, base = resolve_device(asked.device), Base.open("emoji")
    pipe = base.pipeline(device=str(device))
    objects = catalogue().objects
    scenes = object_scenes(objects, -(-asked.count // len(objects)), held_out=True)[: asked.count]
    prompts, seeds = [scene.prompt for scene in scenes], [scene.seed for scene in scenes]
    generate(pipe, prompts[:50], seeds[:50], Sampler.of(base, 1))  # warm
    rows = []
    for cores in dict.fromkeys((1, available_cores())):
        os.environ["OMP_NUM_THREADS"] = str(cores)
        torch.set_num_threads(1)
        started, before = time.perf_counter(), time.process_time()
        generate(pipe, prompts, seeds, Sampler.of(base, asked.steps))
        seconds, of_processor = time.perf_counter() - started, time.process_time() - before
        rows.append([len(scenes), cores, seconds, of_processor, 1000 * seconds / len(scenes), BAR])
    columns = ["pictures", "batches at once", "seconds", "of CPU", "seconds for 1,000", "bar"]
    save(asked.json, show(f"Pictures of the embedded base, {asked.steps} steps, {device}", columns, rows))


if __name__ == "__main__":
    main()
