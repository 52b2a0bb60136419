"""Hot swap on a U-Net of the true Stable Diffusion 1.5 shape: laying a patch on, lifting it off, a thousand at once.

Times are medians of interleaved rounds, compared with copying the touched tensors once in the same round: that is what any
way of restoring them costs at least. Weights are random; only the 32 cross-attention keys and values matter here.
diffusers' way of the same rank-1 change, a LoRA that is loaded and fused, is measured beside it where `peft` is installed.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.tables import arguments, save, show
from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import Delta, LowRank, TextMap
from overpaint.patches.live import Overlay
from overpaint.patches.patch import make_patch
from overpaint.solvers.closed_form.separable import Separable

WIDTH = 768
CONFIG = {"cross_attention_dim": WIDTH, "attention_head_dim": 8, "sample_size": 64}
INSTALL = "pip install -c constraints.txt peft"


def sd15_unet(dtype: torch.dtype) -> Any:
    """A U-Net of Stable Diffusion 1.5's shape; nothing is filled in but cross-attention keys and values."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**CONFIG)
    unet = unet.to(dtype).to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in projections(unet).values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return unet


def projections(unet: Any) -> dict[str, Tensor]:
    """Cross-attention keys and values by canonical name."""
    ends = (".attn2.to_k.weight", ".attn2.to_v.weight")
    return {f"unet/{name}": p for name, p in unet.named_parameters() if name.endswith(ends)}


def base_of(unet: Any, folder: Path) -> Base:
    """A base whose U-Net has these projections and nothing else."""
    tensors = {name.removeprefix("unet/"): p.detach().clone() for name, p in projections(unet).items()}
    (folder / "model_index.json").parent.mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for component, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("vae", "diffusion_pytorch_model"),
    ):
        (folder / component).mkdir()
        found = tensors if component == "unet" else {"placeholder": torch.zeros(1)}
        safetensors.torch.save_file(found, folder / component / f"{stem}.safetensors")
    return Base.open(folder)


def text_maps(count: int, rank: int) -> list[Term]:
    """Random text maps of the size that erasers give."""
    rng = torch.Generator().manual_seed(rank)
    factors = (torch.randn(2, WIDTH, rank, generator=rng) * 0.03 for _ in range(count))
    return [Term(f"{i:04}", TextMap("text_encoder", *pair)) for i, pair in enumerate(factors)]


class Rounds:
    """Interleaved timings: each round runs every step once, in order, so that a busy machine slows all alike."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._device = device

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        """Time what is done within the block."""
        self._settle()
        start = time.perf_counter()
        yield
        self._settle()
        self.seconds.setdefault(step, []).append(time.perf_counter() - start)

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def median(self, step: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[step])


def measure(unet: Any, base: Base, rounds: int, device: torch.device, lora: bool) -> Rounds:
    """All steps, `rounds` times."""
    one, eight, many = text_maps(1, 1), text_maps(1, 8), text_maps(1000, 1)
    steps, live = Rounds(device), projections(unet)
    aside = {name: p.detach().clone() for name, p in live.items()}
    back = {name: p.clone() for name, p in aside.items()}
    overlay = Overlay(SimpleNamespace(unet=unet), base)
    with steps.time("first patch (reads and compares the base's file)"):
        overlay.set(one)
    for _ in range(rounds):
        overlay.clear()
        with steps.time("copy"), torch.no_grad():
            for name, parameter in live.items():
                aside[name].copy_(parameter)
        for step, terms in (("1 direction", one), ("8 directions", eight)):
            with steps.time(f"add one patch, {step}"):
                overlay.set(terms)
            with steps.time(f"remove it, {step}"):
                overlay.clear()
        with steps.time("add 1,000 patches"):
            overlay.set(many)
        with steps.time("remove 1,000 patches"):
            overlay.clear()
        if lora:
            with fused(unet, one[0], steps):
                pass
            # Unfusing leaves other weights behind, which an overlay would refuse.
            with torch.no_grad():
                for name, parameter in live.items():
                    parameter.copy_(back[name])
        # What somebody else wrote is compared with the base first, whichever change comes next; that is not what is timed.
        overlay.set(many)
        overlay.set(one)
    overlay.close()
    for _ in range(rounds):
        for step, terms in (("one", one), ("1,000", many)):
            with steps.time(f"compose {step}, from the base's file"):
                compose(base, terms)
    return steps


@contextmanager
def fused(unet: Any, term: Term, steps: Rounds) -> Iterator[None]:
    """The same change as a LoRA, loaded and fused by diffusers; unfused and unloaded at the end."""
    state = lora_of(unet, term)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with steps.time("diffusers: load and fuse"):
            unet.load_lora_adapter(state, prefix=None, adapter_name="one")
            unet.fuse_lora()
        yield
        with steps.time("diffusers: unfuse and unload"):
            unet.unfuse_lora()
            unet.unload_lora()


def lora_of(unet: Any, term: Term) -> dict[str, Tensor]:
    """A text map as a LoRA of the U-Net: down = D^T, up = W U."""
    delta = term.delta
    assert isinstance(delta, TextMap)
    state = {}
    for name, weight in projections(unet).items():
        key = name.removeprefix("unet/").removesuffix(".weight")
        state[f"{key}.lora_A.weight"] = delta.down.T.to(weight).contiguous()
        state[f"{key}.lora_B.weight"] = weight @ delta.up.to(weight)
    return state


def speed_rows(dtype: str, steps: Rounds, bar: float) -> Iterator[Sequence[Any]]:
    """One row per step: milliseconds, what it is compared with, the ratio, the bar."""
    copy, one = steps.median("copy"), steps.median("add one patch, 1 direction")
    gone, composed = steps.median("remove it, 1 direction"), steps.median("compose one, from the base's file")

    def row(step: str, other: str = "", by: float = 0.0, most: float | None = None) -> Sequence[Any]:
        seconds = steps.median(step)
        return dtype, step, 1e3 * seconds, other, seconds / by if by else None, most

    yield row("copy")
    yield row("add one patch, 1 direction", "copy", copy, bar)
    yield row("remove it, 1 direction", "copy", copy, 1.3)
    yield row("add one patch, 8 directions", "copy", copy)
    yield row("remove it, 8 directions", "copy", copy, 1.3)
    yield row("add 1,000 patches", "add one", one, 15.0)
    yield row("remove 1,000 patches", "copy", copy, 1.3)
    yield row("compose one, from the base's file", "copy", copy)
    yield row("compose 1,000, from the base's file", "compose one", composed, 15.0)
    yield row("first patch (reads and compares the base's file)", "copy", copy)
    for step, ours in (("diffusers: load and fuse", one), ("diffusers: unfuse and unload", gone)):
        if step in steps.seconds:
            yield row(step)
            yield (
                dtype,
                f"ours against {step.removeprefix('diffusers: ')}",
                1e3 * ours,
                "theirs",
                ours / steps.median(step),
                0.2,
            )


def restore_rows(dtype: str, unet: Any, base: Base, changes: int, lora: int) -> Iterator[Sequence[Any]]:
    """How many values differ from the base after random adds and removes and a final restore."""
    rng, terms = random.Random(0), text_maps(16, 1)
    with Overlay(SimpleNamespace(unet=unet), base) as overlay:
        for _ in range(changes):
            term = rng.choice(terms)
            if any(t.id == term.id for t in overlay.terms):
                overlay.remove(term.id)
            else:
                overlay.add(Term(term.id, term.delta, rng.uniform(-2, 2)))
    yield dtype, "Overpaint", changes, *differing(unet, base)
    if lora:
        steps = Rounds(torch.device("cpu"))
        for i in range(lora):
            with fused(unet, terms[i % len(terms)], steps):
                pass
        yield dtype, "diffusers, fuse and unfuse", 2 * lora, *differing(unet, base)


def differing(unet: Any, base: Base) -> tuple[int, str]:
    """Values that are not the base's, and their share."""
    live = projections(unet)
    wrong = sum(int((p.detach().cpu() != base.tensor(name)).sum()) for name, p in live.items())
    return wrong, f"{wrong / sum(p.numel() for p in live.values()):.2%}"


def size_rows(base: Base) -> Iterator[Sequence[Any]]:
    """Patch files on disk, in kilobytes of 1,000 bytes, held to 8 a direction; by default a concept has two at most."""
    rng = torch.Generator().manual_seed(0)
    solver = {"name": "separable", "settings": asdict(Separable()), "seed": 0}

    def size(delta: Delta) -> float:
        concept = Concept("a concept", "object", ("a synonym", "another one"))
        return make_patch(base, concept, delta, solver).nbytes / 1000

    for dtype, ranks in ((torch.float32, (1, 2, 8)), (torch.float16, (1, 5, 8))):
        for rank in ranks:
            factors = torch.randn(2, WIDTH, rank, generator=rng).to(dtype)
            step = f"text map, {rank} direction{'s' if rank > 1 else ''}"
            arrays = str(dtype).removeprefix("torch.")
            yield step, arrays, size(TextMap("text_encoder", *factors)), 8.0 * rank
    thin = {n: (torch.randn(base.places[n].shape[0], 1), torch.randn(1, WIDTH)) for n in base.projections()}
    yield "low rank, 1 direction, 32 tensors", "float32", size(LowRank(thin)), 210.0


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=25, help="how often each step is timed")
    parser.add_argument("--changes", type=int, default=1000, help="random adds and removes before the restore")
    parser.add_argument("--device", default="cpu", help="where the U-Net lies: cpu or cuda")
    chosen = parser.parse_args()
    lora, device = find_spec("peft") is not None, torch.device(chosen.device)
    if not lora:
        print(f"peft is not installed, so diffusers is not measured beside this; to see it: {INSTALL}")
    speed: list[Sequence[Any]] = []
    restore: list[Sequence[Any]] = []
    sizes: list[Sequence[Any]] = []
    for dtype, bar in ((torch.float32, 3.0), (torch.float16, 5.0)):
        with tempfile.TemporaryDirectory() as scratch:
            unet = sd15_unet(dtype)
            base = base_of(unet, Path(scratch) / "base")
            unet.to(device)
            name = str(dtype).removeprefix("torch.")
            speed += speed_rows(name, measure(unet, base, chosen.rounds, device, lora), bar)
            restore += restore_rows(name, unet, base, chosen.changes, 10 if lora else 0)
            sizes = sizes or list(size_rows(base))
    save(
        chosen.json,
        show(
            f"Hot swap, 32 tensors with 19.2 M values, {device}, {torch.get_num_threads()} threads",
            ("weights", "step", "ms", "against", "ratio", "bar"),
            speed,
        ),
        show("Restore", ("weights", "program", "changes", "values that differ", "share"), restore),
        show("Size of a patch file at d = 768", ("patch", "arrays", "KB", "bar"), sizes),
    )


if __name__ == "__main__":
    main()
