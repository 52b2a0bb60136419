"""Other tools' files at full size: `python -m benchmarks.formats [--architecture 1.x|XL] [--patches 20] [--json FILE]`.

A random U-Net of true shapes in float16, with patches of rank-1 text maps at every door, is exported as a LoRA, that LoRA is
imported again, and so are the edited weights themselves, as UCE saves them; and a LoRA of rank 16 on every layer of the
U-Net is exported and imported. Each step is a program of its own that has
imported everything and knows the base's digests, as after `overpaint base add`. Memory is the highest resident size during
the step less that before it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.build import resident
from benchmarks.checkpoints import write_single_file
from benchmarks.shapes import CONFIGS
from overpaint.bases.base import Base
from overpaint.patches.compose import Term
from overpaint.patches.delta import LowRank, TextMap
from overpaint.patches.formats.exporting import About, export
from overpaint.patches.formats.importing import import_weights

BAR_MEMORY = 1024.0
MIB = 1 << 20
# Of the other models only what says how wide a door is.
Shapes = dict[str, tuple[int, ...]]
ENCODERS: dict[str, Shapes] = {"text_encoder": {"final_layer_norm.weight": (768,)}}
ENCODERS_XL: dict[str, Shapes] = {
    **ENCODERS,
    "text_encoder_2": {"final_layer_norm.weight": (1280,), "text_projection.weight": (1280, 1280)},
}
STEPS = {
    "export kohya": "kohya",
    "import that LoRA": "kohya",
    "export full": "full",
    "import edited weights": "full",
    "export a LoRA of every layer": "every",
    "import a LoRA of every layer": "every",
}
"""Each step, and the file that it writes or reads."""


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--architecture", choices=["1.x", "XL"], default="XL")
    parser.add_argument("--patches", type=int, default=20, help="how many lie on the base")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.step:
        print(json.dumps(step(Path(chosen.step[0]), chosen.step[1], int(chosen.step[2]))))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="overpaint-benchmark-") as folder:
        rows = measure(Path(folder), chosen.architecture, chosen.patches)
    columns = [
        "step",
        "seconds",
        "file, MiB",
        "patch, MiB",
        "peak over idle, MiB",
        "bar, MiB",
        "max error",
        "values that differ",
    ]
    title = f"Other tools' files, {chosen.architecture}, {chosen.patches} patches"
    tables.save(chosen.json, tables.show(title, columns, rows))


def measure(folder: Path, architecture: str, patches: int) -> list[list[Any]]:
    """One row for each step."""
    base = random_base(folder / "base", architecture)
    _ = base.fingerprint
    base.save_digests(folder / "digests.json")
    rows = []
    for what in STEPS:
        words = [sys.executable, "-m", "benchmarks.formats", "--step", str(folder), what, str(patches)]
        ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        rows.append([what, *json.loads(ran.stdout)])
    return rows


def step(folder: Path, what: str, patches: int) -> list[Any]:
    """Seconds, sizes of file and patch, by how much resident memory rose, the bar for that, the largest relative
    error, and the part of values that differ."""
    base = Base.open(folder / "base")
    base.load_digests(folder / "digests.json")
    kind = STEPS[what]
    file = folder / f"{kind}.safetensors"
    terms = [Term("a", every_layer(base))] if kind == "every" else list(some_terms(base, patches))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    idle, started = resident("VmRSS"), time.perf_counter()
    size = None
    if what.startswith("export"):
        done = export(base, terms, file, "full" if kind == "full" else "kohya", About("benchmark"))
        error, differing, of, bar = max(done.errors.values()), done.differing, done.of, f"<= {BAR_MEMORY:.0f}"
    else:
        found = import_weights(base, file)
        error, differing, of, bar = found.proof.worst, found.proof.differing, found.proof.of, ""
        size = sum(array.nbytes for array in found.delta.tensors().values()) / MIB
    seconds = time.perf_counter() - started
    return [seconds, file.stat().st_size / MIB, size, resident("VmHWM") - idle, bar, f"{error:.1e}", differing / of]


def some_terms(base: Base, patches: int) -> Iterator[Term]:
    """Rank-1 text maps at every door, of different strength and direction."""
    generator = torch.Generator().manual_seed(0)
    for number in range(patches):
        maps = []
        for text_input in base.text_inputs:
            columns = base.columns(text_input, base.projections(text_input)[0])
            width = columns.stop - columns.start
            up, down = torch.randn(2, width, 1, generator=generator) / width**0.5
            maps.append(TextMap(text_input, up, down))
        yield Term(f"{number:04}", sum(maps[1:], start=maps[0]))


def every_layer(base: Base, rank: int = 16) -> LowRank:
    """Random factors for every linear layer and convolution of the U-Net."""
    generator, factors = torch.Generator().manual_seed(0), {}
    for name in base.names:
        out, *rest = base.places[name].shape
        if rest and name.startswith("unet/"):
            sides = (out, rank), (rank, math.prod(rest))
            up, down = (torch.randn(side, generator=generator) / 100 for side in sides)
            factors[name] = up, down
    return LowRank(factors)


def random_base(folder: Path, architecture: str) -> Base:
    """A diffusers folder with a random U-Net of true shapes, and of the other models next to nothing."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**CONFIGS[architecture])
    is_xl = architecture == "XL"
    models = {name: dict(shapes) for name, shapes in (ENCODERS_XL if is_xl else ENCODERS).items()}
    models["vae"] = {"quant_conv.bias": (8,)}
    models["unet"] = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    values = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) / 50).half()
    for component, shapes in models.items():
        (folder / component).mkdir(parents=True)
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        described = ((name, torch.float16, shape) for name, shape in shapes.items())

        def value(name: str, shapes: Shapes = shapes) -> Tensor:
            count = torch.Size(shapes[name]).numel()
            start = (31 * len(name) + count) % (1 << 20)
            return torch.cat([values[start:]] * (count // (len(values) - start) + 1))[:count].reshape(shapes[name])

        write_single_file(folder / component / f"{stem}.safetensors", described, value)
    index = {"_class_name": "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return Base.open(folder)


if __name__ == "__main__":
    main()
