"""Overpaint beside what people do today: `python -m benchmarks.compare` measures on the embedded base and writes the page.

The same eight concepts, erased by the same text maps, are added and removed in five ways: as patches of Overpaint; as LoRAs that
diffusers and PEFT fuse and unfuse; as LoRAs merged into the weights by the equation of kohya's `merge_lora.py`
(`W + ratio * up @ down`, and with the ratio turned round to remove); as UCE was published, one dense edit of the weights; and as
whole checkpoints. Seconds are those of the processor, medians of several rounds, so that a busy machine changes little.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.tables import arguments, show
from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.patches.compose import Term
from overpaint.patches.delta import TextMap
from overpaint.patches.live import Overlay
from overpaint.patches.patch import make_patch
from overpaint.solvers.closed_form.separable import Separable
from overpaint.solvers.problem import EditProblem
from tests.solvers.test_uce import published

CONCEPTS = ("cat", "car", "sun", "pistol", "rose", "bomb", "robot", "boat")
RESULT = Path(__file__).parent / "results" / "compare.json"
PAGE = Path(__file__).parents[1] / "docs" / "comparison.md"
UNET = "unet/diffusion_pytorch_model.safetensors"
ROUNDS = 7
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Row:
    """What was measured of one way. Seconds are None where nothing is computed, shares where nothing is combined."""

    way: str
    bytes_per_concept: int
    seconds_to_add: float | None
    seconds_to_remove: float | None
    off_float16: float | None
    off_float32: float | None
    worst_float16: float | None
    order_float16: float | None
    order_float32: float | None


class Way:
    """One way to add and remove concepts, on a U-Net of one dtype: `live` are the weights that it changes."""

    begins_from_the_base = False
    """Whether every change does, so that a few of them show as much as a thousand."""

    def __init__(self, unet: Any, base: Base, terms: Sequence[Term]) -> None:
        self.unet, self.base, self.terms = unet, base, terms
        self.live = {name: p for name, p in unet.named_parameters() if f"unet/{name}" in set(base.projections())}
        self.on: list[Term] = []

    def add(self, term: Term) -> None:
        """Add one concept to those that are erased."""
        raise NotImplementedError

    def remove(self, term: Term) -> None:
        """Take one concept out of those that are erased."""
        raise NotImplementedError

    def factors(self, term: Term) -> Iterator[tuple[str, Tensor, Tensor]]:
        """A text map as a LoRA of each projection: name, up = W0 U, down = D^T, in float32."""
        assert isinstance(term.delta, TextMap)
        for name in self.live:
            weight = self.base.tensor(f"unet/{name}").float()
            yield name, weight @ term.delta.up.float(), term.delta.down.float().T.contiguous()


class Overpaint(Way):
    """Patches on a live pipeline: composed from the base at every change."""

    def __init__(self, unet: Any, base: Base, terms: Sequence[Term]) -> None:
        super().__init__(unet, base, terms)
        self.overlay = Overlay(SimpleNamespace(unet=unet), base)

    def add(self, term: Term) -> None:
        self.on.append(term)
        self.overlay.set(self.on)

    def remove(self, term: Term) -> None:
        self.on.remove(term)
        self.overlay.set(self.on)


class Peft(Way):
    """LoRAs that diffusers loads and PEFT fuses. Unfusing takes out all that is fused, so the others are fused again."""

    def __init__(self, unet: Any, base: Base, terms: Sequence[Term]) -> None:
        super().__init__(unet, base, terms)
        for term in terms:
            state = {}
            for name, up, down in self.factors(term):
                key = name.removesuffix(".weight")
                state |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            unet.load_lora_adapter(
                {key: t.to(unet.dtype) for key, t in state.items()}, prefix=None, adapter_name=term.id
            )
        renamed = dict(unet.named_parameters())
        self.live = {name: renamed[name.removesuffix("weight") + "base_layer.weight"] for name in self.live}

    def add(self, term: Term) -> None:
        self.on.append(term)
        self.unet.fuse_lora(adapter_names=[term.id])

    def remove(self, term: Term) -> None:
        self.on.remove(term)
        self.unet.unfuse_lora()
        if self.on:
            self.unet.fuse_lora(adapter_names=[each.id for each in self.on])


class Kohya(Way):
    """LoRAs merged into the weights, each rounded to the checkpoint's dtype; removed with the ratio turned round."""

    def merge(self, term: Term, ratio: float) -> None:
        """W + ratio * up @ down, computed in float32 and saved in the dtype of the weights."""
        for name, up, down in self.lora[term.id]:
            self.live[name].copy_(self.live[name].float() + ratio * (up @ down))

    def __init__(self, unet: Any, base: Base, terms: Sequence[Term]) -> None:
        super().__init__(unet, base, terms)
        self.lora = {term.id: list(self.factors(term)) for term in terms}

    def add(self, term: Term) -> None:
        self.on.append(term)
        self.merge(term, 1.0)

    def remove(self, term: Term) -> None:
        self.on.remove(term)
        self.merge(term, -1.0)


class Uce(Way):
    """Equation 7 of UCE for all that is erased, each time from the base; `sequential` edits what is there already."""

    RIDGE = 0.5
    begins_from_the_base = True

    def __init__(self, unet: Any, base: Base, terms: Sequence[Term]) -> None:
        super().__init__(unet, base, terms)
        encoder = TextEncoder.of(base)

        def last_token(name: str) -> Tensor:
            return encoder.hidden([name])[0, len(encoder.tokens(name))].double()

        self.keys, self.anchor = {term.id: last_token(term.id) for term in terms}, last_token("")

    def solve(self, erased: Sequence[Term], weights: Weights) -> None:
        """One dense edit of every projection, the other concepts preserved."""
        names = {term.id for term in erased}
        pairs = [(self.keys[name], self.anchor) for name in sorted(names)]
        kept = [key for name, key in self.keys.items() if name not in names]
        for name, weight in weights.items():
            self.live[name].copy_(published(weight.double(), pairs, kept, self.RIDGE) if pairs else weight)

    def add(self, term: Term) -> None:
        self.on.append(term)
        self.solve(self.on, originals(self))

    def remove(self, term: Term) -> None:
        self.on.remove(term)
        self.solve(self.on, originals(self))

    def sequential(self, terms: Iterable[Term]) -> None:
        """One after the other, each on what the last one left, as a script that edits the model does."""
        for term in terms:
            self.solve([term], {name: weight.clone() for name, weight in self.live.items()})


def originals(way: Way) -> dict[str, Tensor]:
    """The base's weights that a way changes."""
    return {name: way.base.tensor(f"unet/{name}").to(weight.dtype) for name, weight in way.live.items()}


def patches(base: Base) -> list[tuple[Term, int]]:
    """A separable patch of each concept as a term, by its name, and the bytes of its file."""
    universe, found = tuple(Concept(name) for name in CONCEPTS), []
    for concept in universe:
        solution = Separable(vocabulary=256).solve(EditProblem(base, concept, universe=universe))
        patch = make_patch(base, concept, solution.delta, {"name": "separable", "settings": {}, "seed": 0})
        found.append((Term(concept.name, solution.delta), patch.nbytes))
    return found


def fresh(base: Base, dtype: torch.dtype) -> Any:
    """The base's U-Net as diffusers loads it."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(base.path, subfolder="unet", torch_dtype=dtype)
    return unet.requires_grad_(False)


def off(way: Way, wanted: Weights) -> tuple[float, float]:
    """The share of values that are not what they should be, and the largest error against the tensor's own size (RMS)."""
    wrong = sum(int((weight != wanted[name]).sum()) for name, weight in way.live.items())
    errors = [
        ((w.float() - wanted[n].float()).abs().max() / wanted[n].float().square().mean().sqrt())
        for n, w in way.live.items()
    ]
    return wrong / sum(weight.numel() for weight in way.live.values()), float(max(errors))


def changed(way: Way, changes: int) -> tuple[float, float]:
    """How far a U-Net is from the base after so many random adds and removes of which nothing is left."""
    rng = random.Random(0)
    for _ in range(min(changes, 20) if way.begins_from_the_base else changes):
        if way.on and (len(way.on) == 4 or rng.random() < 0.5):
            way.remove(rng.choice(way.on))
        else:
            way.add(rng.choice([term for term in way.terms if term not in way.on]))
    for term in list(way.on):
        way.remove(term)
    return off(way, originals(way))


def by_order(make: Callable[[], Way]) -> float:
    """The share of values that differ between a set added in one order and in the other."""
    ends = []
    for turned in (False, True):
        way = make()
        terms = list(reversed(way.terms)) if turned else list(way.terms)
        if isinstance(way, Uce):
            way.sequential(terms)
        else:
            for term in terms:
                way.add(term)
        ends.append((way, {name: weight.clone() for name, weight in way.live.items()}))
    return off(ends[0][0], ends[1][1])[0]


def seconds(step: Callable[[], object], undo: Callable[[], object]) -> tuple[float, float]:
    """Medians, in seconds of the processor, of a step and of what takes it back."""
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for does, times in zip((step, undo), took, strict=True):
            start = time.process_time()
            does()
            times.append(time.process_time() - start)
    return statistics.median(took[0]), statistics.median(took[1])


def measured(name: str, kind: type[Way], base: Base, terms: Sequence[Term], nbytes: int, changes: int) -> Row:
    """All numbers of one way, in the dtype of the base and in float32."""
    numbers: dict[torch.dtype, tuple[float, float, float]] = {}
    for dtype in (torch.float16, torch.float32):

        def make(dtype: torch.dtype = dtype) -> Way:
            return kind(fresh(base, dtype), base, terms)

        numbers[dtype] = (*changed(make(), changes), by_order(make))
    way = kind(fresh(base, torch.float16), base, terms)
    for term in terms[:-1]:
        way.add(term)
    add, remove = seconds(lambda: way.add(terms[-1]), lambda: way.remove(terms[-1]))
    half, single = numbers[torch.float16], numbers[torch.float32]
    return Row(name, nbytes, add, remove, half[0], single[0], half[1], half[2], single[2])


def checkpoints(base: Base) -> Row:
    """One file of weights for every set of concepts; changing the set is loading another file."""
    unet, file = fresh(base, torch.float16), base.path / UNET
    load, _ = seconds(lambda: unet.load_state_dict(load_file(file)), lambda: None)
    return Row("a checkpoint for every set", file.stat().st_size, load, load, 0.0, 0.0, 0.0, None, None)


def measure(changes: int) -> list[Row]:
    """Every way, on the embedded base."""
    base = Base.open("emoji")
    found = patches(base)
    terms = [term for term, _ in found]
    patch = round(statistics.median(nbytes for _, nbytes in found))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        way = Way(fresh(base, torch.float16), base, terms)
        lora = Path(folder) / "lora.safetensors"
        factors = [
            (f"{n}.{end}", t.half()) for n, up, down in way.factors(terms[0]) for end, t in (("up", up), ("down", down))
        ]
        save_file(dict(factors), lora)
        dense = sum(weight.numel() * weight.element_size() for weight in way.live.values())
        ways: Sequence[tuple[str, type[Way], int]] = (
            ("Overpaint", Overpaint, patch),
            ("diffusers + PEFT, fuse and unfuse", Peft, lora.stat().st_size),
            ("kohya's merge, ratio 1 and -1", Kohya, lora.stat().st_size),
            ("UCE as published", Uce, dense),
        )
        rows = [measured(name, kind, base, terms, nbytes, changes) for name, kind, nbytes in ways]
        return [*rows, checkpoints(base)]


ABOUT = """# Beside other tools

Written by `python -m benchmarks.compare`, which measures what the first table shows; do not edit. Eight concepts of the embedded
base ({concepts}), erased by the same text maps in every way but UCE's own. Seconds are those of one processor core, medians of
{rounds} rounds, for the last of the eight concepts; compare them with each other. "Off" is the share of values of the changed tensors that
are not the base's after {changes:,} random adds and removes of which nothing is left, "order" the share that differs when the eight
are added the other way round.

"""  # noqa: E501
NOTES = """
After so many changes in float16 what fusing and unfusing leaves behind is no rounding any more: the worst value is off by {peft:.2g} of its
tensor's size (RMS), and by {kohya:.2g} where merges are taken back. In float32 nearly as many values are off. It grows with every
change, and a digest of such weights says nothing. UCE and checkpoints leave nothing behind, because both begin from the base or from a
file again. What that costs is in the first columns: all concepts solved again for every change, and a file for every set, of which
eight concepts have 256. Merging as kohya's script does is the quickest; it writes into the weights and looks at nothing.

Editing one concept after the other with UCE, each on what the last one left, gives weights that depend on the order. Solved for
all concepts at once, as above, they do not.

## What each cannot do

| | Overpaint | diffusers + PEFT | kohya's merge | UCE as published | checkpoints |
|---|---|---|---|---|---|
| take one of several out again | yes | all, then fuse the others | merge with ratio -1 | solve the others again | if that file was made |
| the base again, bit for bit | yes | reload it | keep the file | keep the file | yes |
| the same set, the same bits | yes | no | no | solved at once | yes |
| who changed what, when, why | yes | no | no | no | no |
| refuse another base | yes | where shapes differ | where shapes differ | no | it is its own base |
| exact for all concepts together | `separable` | no | no | solved at once | as it was made |
| give back what was only hidden | yes | while it is loaded | no | no | no |
| switch per picture, weights untouched | **no**: a change composes | yes, unfused | no | no | no |
| strengths that vary within one picture | **no** | yes | no | no | no |
| weights in 4 or 8 bits | where what reads the prompt stays in 16 | yes, unfused | no | no | yes |
| add a style or a person | **no**: it only erases | yes | yes | no | yes |
| programs that load it as it is | **few**: export or build | diffusers | all | diffusers | all |
| stand against somebody who holds the weights | **no** | no | no | no | no |

What Overpaint's patches become for other programs, and what is lost on the way: [using patches with other tools](using-with.md).
Which eraser, whatever carries it: [choosing a solver](choosing-a-solver.md).
"""  # noqa: E501


def page(found: Mapping[str, Any]) -> str:
    """The page, from what was kept of a run."""
    rows = [Row(**row) for row in found["rows"]]
    heads = (
        "",
        "bytes a concept",
        "s to add",
        "s to remove",
        "off, float16",
        "off, float32",
        "order, float16",
        "order, float32",
    )
    lines = [f"| {' | '.join(heads)} |", f"|---{'|--:' * (len(heads) - 1)}|"]
    for row in rows:
        shares = (row.off_float16, row.off_float32, row.order_float16, row.order_float32)
        times = (row.seconds_to_add, row.seconds_to_remove)
        cells = [row.way, f"{row.bytes_per_concept:,}", *map(_time, times), *map(_share, shares)]
        lines.append(f"| {' | '.join(cells)} |")
    about = ABOUT.format(concepts=", ".join(CONCEPTS), rounds=found["rounds"], changes=found["changes"])
    worst = {row.way.split()[0]: row.worst_float16 for row in rows}
    return about + "\n".join(lines) + "\n" + NOTES.format(peft=worst["diffusers"], kohya=worst["kohya's"])


def _time(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "do not combine" if value is None else "0" if value == 0 else f"{value:.1%}"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--changes", type=int, default=1000, help="random adds and removes before the restore")
    parser.add_argument("--page", action="store_true", help="only write the page from what was measured")
    chosen = parser.parse_args()
    if not chosen.page:
        torch.set_num_threads(1)
        rows = [asdict(row) for row in measure(chosen.changes)]
        show("Beside other tools", list(rows[0]), [list(row.values()) for row in rows])
        RESULT.write_text(
            json.dumps({"changes": chosen.changes, "rounds": ROUNDS, "rows": rows}, indent=1) + "\n", "utf-8"
        )
    PAGE.write_text(page(json.loads(RESULT.read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
