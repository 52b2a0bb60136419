"""A base as large as Stable Diffusion XL, from end to end: `python -m benchmarks.sdxl [--vocabulary 12] [--json FILE]`.

A diffusers folder of Stable Diffusion XL's shapes in half precision (6.9 GB), with random weights, is added, patched by
`separable`, exported, built as a folder and built as a single file. Each step is a fresh program. What is shown is its time,
and its highest resident memory less that of an interpreter that imported torch and did nothing; what importing all the
libraries takes of it stands beside.

The tokenizer knows letters and `--vocabulary` words, where the published ones know some 40,000: encoding those on two cores
takes a day. A piece of the vocabulary, which is what decides about memory, is whole from 256 words on. `--scale` narrows the
U-Net and takes layers from the text encoders, which are no narrower then: with `--scale 0.1 --vocabulary 256` whole pieces
are encoded in minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.build import GIB, resident
from benchmarks.full_size import write_base
from overpaint.workspace.workspace import Workspace

BAR_MEMORY = 1024.0
STEPS: dict[str, Callable[[Workspace, Path], object]] = {
    "add, with the fingerprint": lambda workspace, folder: workspace.add_base("xl", folder / "base"),
    "solve separable, one concept": lambda workspace, folder: workspace.solve("cat", base="xl"),
    "add the patch to a recipe": lambda workspace, folder: workspace.create_recipe("r", base="xl", exist_ok=True).add(
        workspace.patches()[0].id
    ),
    "export a LoRA": lambda workspace, folder: workspace.recipe("r").export(folder / "built.safetensors"),
    "build a folder": lambda workspace, folder: workspace.recipe("r").build(folder / "built"),
    "build a single file": lambda workspace, folder: workspace.recipe("r").build(folder / "built.safetensors"),
}


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--scale", type=float, default=1.0, help="of the U-Net's values and the text encoders' layers")
    parser.add_argument("--vocabulary", type=int, default=12, help="words that the tokenizer knows")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.step:
        print(json.dumps(one(chosen.step[0], Path(chosen.step[1]))))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="overpaint-benchmark-") as folder:
        sizes = write_base(Path(folder) / "base", "XL", chosen.scale, chosen.vocabulary)
        bare = idle_torch()
        rows: list[list[Any]] = [["base, GiB", sum(sizes.values()) / GIB, None, None]]
        for step in STEPS:
            seconds, imported, highest = apart(step, Path(folder))
            print(f"{step}: {seconds:.1f} s, {highest - bare:.0f} MiB", file=sys.stderr)
            rows.append([step, seconds, highest - bare, imported - bare])
            clear(Path(folder))
    columns = ["what", "seconds", f"memory over torch's own, MiB (bar {BAR_MEMORY:.0f})", "of it imports, MiB"]
    title = f"Stable Diffusion XL, scale {chosen.scale:g}, {chosen.vocabulary} words"
    tables.save(chosen.json, tables.show(title, columns, rows))


def clear(folder: Path) -> None:
    """Take away what a step wrote beside the base and the registry."""
    shutil.rmtree(folder / "built", ignore_errors=True)
    (folder / "built.safetensors").unlink(missing_ok=True)


def idle_torch() -> float:
    """MiB that an interpreter has which imported torch."""
    program = "import torch; from benchmarks.build import resident; print(resident('VmRSS'))"
    return float(subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout)


def apart(step: str, folder: Path) -> tuple[float, float, float]:
    """`one` in a program of its own."""
    words = [sys.executable, "-m", "benchmarks.sdxl", "--step", step, str(folder)]
    ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    seconds, imported, highest = json.loads(ran.stdout.splitlines()[-1])
    return seconds, imported, highest


def one(step: str, folder: Path) -> tuple[float, float, float]:
    """Seconds of a step, and the MiB that this program had when everything was imported, and at most during the step."""
    from diffusers import StableDiffusionXLPipeline  # noqa: F401
    from transformers import CLIPTextModelWithProjection  # noqa: F401

    from overpaint.patches import build  # noqa: F401

    workspace = Workspace.open(folder / "registry")
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    imported, started = resident("VmRSS"), time.perf_counter()
    STEPS[step](workspace, folder)
    return time.perf_counter() - started, imported, resident("VmHWM")


if __name__ == "__main__":
    main()
