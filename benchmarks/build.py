"""Building a checkpoint against copying it: `python -m benchmarks.build [--gib 4] [--rounds 5] [--json FILE]`.

A single-file checkpoint of Stable Diffusion 1.5's shapes in fp32, with random weights, is built with one rank-1 text map on
its 32 cross-attention keys and values, and copied by `cp`, in turns; both until the disk has it. Each round is a fresh
program that has imported everything, opened the base and knows its digests, as after `overpaint base add`; computing those
is timed apart. What goes first alternates, and each begins with nothing left to write, or it would pay for the other's
last file. Memory is the highest resident size during a build less that before it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.checkpoints import single_file_keys, single_file_shape, stable_diffusion_shapes, write_single_file
from overpaint.bases.base import Base
from overpaint.patches.build import build
from overpaint.patches.compose import Term
from overpaint.patches.delta import TextMap

GIB = 1 << 30
UNET_SIZE, REST_SIZE = 3.2, 0.77
"""GiB of the true shapes in fp32: the U-Net, and the decoder with the text encoder."""
BAR_TIME, BAR_MEMORY = 1.25, 300.0


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--gib", type=float, default=4.0, help="size; less than 4, down to 0.8, narrows the U-Net")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is done")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--round", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.round:
        print(json.dumps(one_round(Path(chosen.round[0]), Path(chosen.round[1]), int(chosen.round[2]))))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="overpaint-benchmark-") as folder:
        rows = measure(Path(folder), chosen.gib, chosen.rounds)
    tables.save(chosen.json, tables.show("Building a checkpoint", ["what", "measured", "bar"], rows))


def measure(folder: Path, gib: float, rounds: int) -> list[list[Any]]:
    """The rows of the table; `folder` needs room for three checkpoints."""
    source, cache = folder / "base.safetensors", folder / "digests.json"
    write_random(source, gib)
    base = Base.open(source)
    digesting = timed(lambda: base.fingerprint)
    base.save_digests(cache)
    # The first round warms the caches.
    found = [apart(source, cache, number) for number in range(rounds + 1)][1:]
    built, copied, peaks = (list(column) for column in zip(*found, strict=True))
    largest = max(place.entry.size for place in base.places.values()) / (1 << 20)
    ratios = [ours / theirs for ours, theirs in zip(built, copied, strict=True)]
    return [
        ["size, GiB", source.stat().st_size / GIB, None],
        ["tensors that change, MiB", sum(base.places[n].entry.size for n in base.projections()) / (1 << 20), None],
        ["cp and sync, median of rounds, s", statistics.median(copied), None],
        ["build, median of rounds, s", statistics.median(built), None],
        ["build / cp, median of rounds", statistics.median(ratios), f"<= {BAR_TIME}"],
        ["build / cp, best and worst round", f"{min(ratios):.2f}, {max(ratios):.2f}", None],
        ["peak memory over idle, MiB", max(peaks), f"<= {BAR_MEMORY:.0f} + {largest:.0f}"],
        ["digests of the whole base, once, s", digesting, None],
    ]


def apart(source: Path, cache: Path, number: int) -> list[float]:
    """`one_round` in a program of its own."""
    words = [sys.executable, "-m", "benchmarks.build", "--round", str(source), str(cache), str(number)]
    ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: list[float] = json.loads(ran.stdout)
    return found


def one_round(source: Path, cache: Path, number: int) -> list[float]:
    """Seconds of a build, seconds of `cp`, and by how many MiB the build raised this program's resident memory."""
    target = source.with_name("out.safetensors")
    base = Base.open(source)
    base.load_digests(cache)
    torch.manual_seed(0)
    terms = [Term("a" * 64, TextMap("text_encoder", torch.randn(768, 1) / 768, torch.randn(768, 1) / 768))]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    idle = resident("VmRSS")
    ways: list[tuple[str, Callable[[], object]]] = [
        ("build", lambda: build(base, terms, target)),
        ("cp", lambda: copy(source, target)),
    ]
    seconds = {}
    for name, way in ways if number % 2 else reversed(ways):
        os.sync()
        seconds[name] = timed(way)
        target.unlink()
    return [seconds["build"], seconds["cp"], resident("VmHWM") - idle]


def write_random(file: Path, gib: float) -> None:
    """A checkpoint of true shapes, or with a narrower U-Net where less is asked for; written tensor by tensor."""
    share = min(max(gib - REST_SIZE, 0) / UNET_SIZE, 1)
    width = max(32, round(320 * math.sqrt(share) / 32) * 32)
    shapes = dict(stable_diffusion_shapes(width))
    keys = single_file_keys(shapes)
    stored = {key: single_file_shape(key, shapes[name]) for name, key in keys.items()}
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1 << 24, generator=generator) / 50

    def value(key: str) -> Tensor:
        count = torch.Size(stored[key]).numel()
        start = int(torch.randint(1 << 20, (1,), generator=generator))
        return torch.cat([values[start:]] * (count // (len(values) - start) + 1))[:count].reshape(stored[key])

    write_single_file(file, ((key, torch.float32, shape) for key, shape in stored.items()), value)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", str(source), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def resident(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


if __name__ == "__main__":
    main()
