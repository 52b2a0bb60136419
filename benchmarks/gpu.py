"""What Overpaint does on a GPU, in one table and within minutes: `python -m benchmarks.gpu --json FILE`.

Bases of the true shapes of Stable Diffusion 1.5, XL and FLUX.1 (T5-XXL included) with random weights are written to a
temporary folder; nothing is downloaded. Every row is one measurement: the seconds of a step, with the GPU's work waited for,
and the most memory that the GPU held (on the CPU: the program). A part that fails is a row that says so, and the program ends
with 1. `--minutes` is the time after which no further part begins; what is left out is named.

`--device cpu --small` runs every part within minutes on a CPU: narrow denoisers, text encoders of few layers, short prompts.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import swap, tables
from benchmarks.build import resident
from benchmarks.full_size import models, words_of_three, write_base
from overpaint.bases.base import Base
from overpaint.core.errors import OverpaintError
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import TextMap
from overpaint.patches.live import Overlay
from overpaint.workspace.workspace import Workspace

FAMILIES = ("1.5", "XL", "FLUX.1")
COLUMNS = ("part", "base", "step", "seconds", "memory, MiB", "note")
TRAINED: dict[str, dict[str, object]] = {
    "esd": {"steps": 50},
    "few_shot": {"steps": 8},
    "few_shot_lora": {"steps": 50},
    "sepme": {"iterations": 50, "pictures": 4},
}
"""Solvers that train, with as many gradient steps as are timed."""
QUICK: dict[str, dict[str, object]] = {
    "esd": {"steps": 2, "sampling_steps": 2},
    "few_shot": {"steps": 2, "sampling_steps": 2, "pictures": 1, "batch": 1},
    "few_shot_lora": {"steps": 2, "sampling_steps": 2, "pictures": 1, "batch": 1, "retained": 4, "retain_batch": 2},
    "sepme": {"iterations": 2, "steps": 2, "pictures": 1},
}
"""The same as little work as there can be."""
AGREEMENT = 1e-3
"""How far, as a part of itself, a change solved on the GPU may be from the CPU's: key moments are summed in another order."""


@dataclass
class Bench:
    """The rows so far, the folder of the bases, and the time that is left."""

    folder: Path
    device: torch.device
    is_small: bool
    ends: float
    families: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    failed: bool = False
    _workspaces: dict[str, Workspace] = field(default_factory=dict)

    def note(self, part: str, base: str, step: str, note: str) -> None:
        self.rows.append((part, base, step, None, None, note))

    def time(self, part: str, base: str, step: str, call: Callable[[], Any], note: str = "") -> float:
        """Do a step, and write its seconds and memory down; returns the seconds."""
        self._settle()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        call()
        self._settle()
        seconds = time.perf_counter() - started
        memory = (
            torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else resident("VmHWM")
        )
        self.rows.append((part, base, step, seconds, memory, note))
        print(f"{part}, {base}: {step}: {seconds:.2f} s", file=sys.stderr)
        return seconds

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def workspace(self, family: str) -> Workspace:
        """A registry with a base of the family, its vocabulary as large as the published one's or small."""
        if family not in self._workspaces:
            place = self.folder / family
            write_base(place / "base", family, 0.1 if self.is_small else 1.0, 64 if self.is_small else 8192)
            if self.is_small and family == "FLUX.1":  # whose T5 takes seconds for each prompt of 512 tokens
                (place / "base" / "overpaint.json").write_text('{"prompt_length": 32}')
            workspace = Workspace.open(place / "registry")
            self.time("base", family, "add, with the fingerprint", lambda: workspace.add_base("base", place / "base"))
            self._workspaces[family] = workspace
        return self._workspaces[family]


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="narrow models, so that a CPU ends within minutes")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later than this")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="one part; can be repeated")
    parser.add_argument("--base", action="append", choices=FAMILIES, help="one family of bases; can be repeated")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; try --device cpu --small")
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="overpaint-benchmark-") as folder:
        bench = Bench(
            Path(folder), device, chosen.small, time.monotonic() + 60 * chosen.minutes, chosen.base or FAMILIES
        )
        for name in chosen.only or PARTS:
            attempt(bench, name)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"On {name}, PyTorch {torch.__version__}{', small models' if chosen.small else ''}"
    tables.save(chosen.json, tables.show(title, COLUMNS, bench.rows))
    sys.exit(1 if bench.failed else 0)


def attempt(bench: Bench, name: str) -> None:
    """Run a part unless the time is over. What it raises becomes a row."""
    if time.monotonic() > bench.ends:
        bench.note(name, "", "", "left out: the time is over")
        return
    try:
        PARTS[name](bench)
    except (OverpaintError, RuntimeError, ValueError, OSError, AssertionError, TypeError, AttributeError) as error:
        traceback.print_exc()
        bench.failed = True
        bench.note(name, "", "", f"failed: {type(error).__name__}: {str(error)[:200]}")


def tests(bench: Bench) -> None:
    """The tests that need a CUDA device; on a CPU they are skipped, which the row says."""
    words = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", "-p", "no:cacheprovider", "tests"]
    ran: list[str] = []

    def run() -> None:
        found = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        ran.append(found.stdout.strip().splitlines()[-1])
        bench.failed |= found.returncode != 0

    bench.time("tests", "tiny", "pytest -k cuda", run)
    bench.note("tests", "tiny", "pytest -k cuda", ran[0])


def separable(bench: Bench) -> None:
    """The vocabulary, then 1, 100 and 1,000 concepts with all their encoding, on each family."""
    concepts = words_of_three(1000)
    for family in bench.families:
        workspace = bench.workspace(family)
        device = bench.device.type
        words = 48 if bench.is_small else 1024 if family == "FLUX.1" else 4096
        bench.time(
            "separable",
            family,
            f"encode a vocabulary of {words:,} words",
            partial(workspace.prepare, "base", vocabulary=words, device=device),
        )
        before, last = 0, 0.0
        for count in (1, 4, 8) if bench.is_small else (1, 100, 1000):
            wanted = concepts[before:count]
            if time.monotonic() + last * len(wanted) > bench.ends:
                bench.note("separable", family, f"{count - before:,} concepts", "left out: the time is over")
                break
            seconds = bench.time(
                "separable",
                family,
                f"{len(wanted):,} more concepts" if before else "the first concept",
                partial(workspace.solve_many, wanted, base="base", solver="separable", device=device, vocabulary=words),
            )
            before, last = count, seconds / len(wanted)


def agreement(bench: Bench) -> None:
    """The same concept solved here and on the CPU: how far the changes are apart, and that the manifest names the backend."""
    workspace = bench.workspace("1.5")
    words = 48 if bench.is_small else 512
    here = workspace.solve("zoo", base="base", device=bench.device.type, vocabulary=words)
    there = workspace.solve("zoo", base="base", device="cpu", vocabulary=words, seed=1)
    base = workspace.base("base")
    name = base.projections()[0]
    original = base.tensor(name)
    changes = [
        next(iter(compose(base, [Term("a", workspace.patch(patch.record.id).delta)]).items()))[1].double()
        - original.double()
        for patch in (here, there)
    ]
    apart = float((changes[0] - changes[1]).norm() / changes[1].norm())
    backend = workspace.patch(here.record.id).manifest["solver"].get("backend", "cpu")
    bench.note("agreement", "1.5", "change of a projection, GPU against CPU", f"{apart:.1e} apart, backend {backend}")
    bench.failed |= apart > AGREEMENT or backend != bench.device.type


def trained(bench: Bench) -> None:
    """Solvers that train on Stable Diffusion 1.5's shapes, each from nothing: drawing its pictures included."""
    workspace = bench.workspace("1.5")
    for solver, settings in TRAINED.items():
        if time.monotonic() > bench.ends:
            bench.note("trained", "1.5", solver, "left out: the time is over")
            continue
        chosen = QUICK[solver] if bench.is_small else settings
        said = ", ".join(f"{value} {name}" for name, value in chosen.items())
        bench.time(
            "trained",
            "1.5",
            f"{solver}, {said}",
            partial(workspace.solve, "abc", base="base", solver=solver, device=bench.device.type, settings=chosen),
        )


def swapping(bench: Bench) -> None:
    """Adding and removing 1 and 1,000 patches beside a copy of the touched tensors, and diffusers' load and fuse."""
    for family in bench.families:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            _swap(bench, family, dtype)


def _swap(bench: Bench, family: str, dtype: torch.dtype) -> None:
    component = "transformer" if family == "FLUX.1" else "unet"
    denoiser = dict(models(family, 0.1 if bench.is_small else 1.0))[component]
    base = narrow_base(bench.folder / f"{family}-{dtype}", family, component, denoiser, dtype)
    denoiser = denoiser.to(dtype).to_empty(device=bench.device).requires_grad_(False)
    for name in base.projections():
        denoiser.get_parameter(name.partition("/")[2]).copy_(base.tensor(name))
    live = {name: p for n, p in denoiser.named_parameters() if (name := f"{component}/{n}") in set(base.projections())}
    aside = {name: p.detach().clone() for name, p in live.items()}
    one, many = terms(base, 1), terms(base, 16 if bench.is_small else 1000)
    steps = swap.Rounds(bench.device)
    with Overlay(SimpleNamespace(**{component: denoiser}), base) as overlay:
        for _ in range(3 if bench.is_small else 10):
            with steps.time("copy"), torch.no_grad():
                for name, parameter in live.items():
                    aside[name].copy_(parameter)
            for step, wanted in (("one patch", one), (f"{len(many):,} patches", many)):
                with steps.time(f"add {step}"):
                    overlay.set(wanted)
                if step == "one patch":
                    composed = compose(base, wanted)
                    exact = all(torch.equal(live[name].cpu(), value) for name, value in composed.items())
                    bench.failed |= not exact
                with steps.time(f"remove {step}"):
                    overlay.clear()
    name, copied = f"{family} {str(dtype).removeprefix('torch.')}", steps.median("copy")
    for step in steps.seconds:
        seconds = steps.median(step)
        note = "" if step == "copy" else f"{seconds / copied:.1f} x copying"
        bench.rows.append(("swap", name, step, seconds, None, note))
    with steps.time("diffusers"):
        fuse(denoiser, lora(live, component, base, one[0]))
    theirs, ours = steps.median("diffusers"), steps.median("add one patch")
    bench.rows.append(("swap", name, "diffusers: load and fuse", theirs, None, f"ours takes {ours / theirs:.2f} of it"))
    bench.note("swap", name, "bits after adding one patch", "the CPU's" if exact else "NOT the CPU's")


def narrow_base(folder: Path, family: str, component: str, denoiser: Any, dtype: torch.dtype) -> Base:
    """A base of the family that holds the text projections alone of this denoiser (without storage), random, in a dtype."""
    from safetensors.torch import save_file

    write_base(folder, family, 0.1, 64)
    wanted = {name.partition("/")[2] for name in Base.open(folder).projections()}
    generator = torch.Generator().manual_seed(0)
    values = {
        name: (torch.randn(parameter.shape, generator=generator) * 0.03).to(dtype)
        for name, parameter in denoiser.named_parameters()
        if name in wanted
    }
    save_file(values, folder / component / "diffusion_pytorch_model.safetensors")
    denoiser.save_config(folder / component)
    return Base.open(folder)


def terms(base: Base, count: int) -> list[Term]:
    """Random text maps of one direction at the base's widest text input."""
    name = max(base.text_inputs, key=lambda known: _width(base, known))
    width = _width(base, name)
    generator = torch.Generator().manual_seed(count)
    factors = (torch.randn(2, width, 1, generator=generator) * 0.03 for _ in range(count))
    return [Term(f"{i:04}", TextMap(name, *pair)) for i, pair in enumerate(factors)]


def _width(base: Base, text_input: str) -> int:
    reader = base.projections(text_input)[0]
    columns = base.columns(text_input, reader)
    return len(range(*columns.indices(base.places[reader].shape[1])))


def lora(live: dict[str, Tensor], component: str, base: Base, term: Term) -> dict[str, Tensor]:
    """The same change as a LoRA: down = D^T on the input's columns, up = W U."""
    delta = term.delta
    assert isinstance(delta, TextMap)
    state = {}
    for name in base.projections(delta.encoder):
        weight, columns = live[name], base.columns(delta.encoder, name)
        down = torch.zeros(delta.down.shape[1], weight.shape[1], dtype=weight.dtype, device=weight.device)
        down[:, columns] = delta.down.T.to(weight)
        key = name.removeprefix(f"{component}/").removesuffix(".weight")
        state[f"{key}.lora_A.weight"] = down
        state[f"{key}.lora_B.weight"] = weight[:, columns] @ delta.up.to(weight)
    return state


def fuse(denoiser: Any, state: dict[str, Tensor]) -> None:
    """Load a LoRA and fuse it, as diffusers has it."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        denoiser.load_lora_adapter(state, prefix=None, adapter_name="one")
        denoiser.fuse_lora()


PARTS: dict[str, Callable[[Bench], None]] = {
    "tests": tests,
    "agreement": agreement,
    "swap": swapping,
    "trained": trained,
    "separable": separable,
}


if __name__ == "__main__":
    main()
