"""A base of a published size, from nothing to a checkpoint: `python -m benchmarks.first_patch [--family XL] [--merges FILE]`.

A diffusers folder of the true shapes of Stable Diffusion 1.5 or XL in half precision, with random weights, is added, patched by
`separable`, exported and built. Each step is a fresh program. What is shown is its time, and its highest resident memory less
that of an interpreter that imported torch and did nothing; what importing all the libraries takes of it stands beside. How long
a step takes does not depend on the weights; how large a sample of the vocabulary has to be, and a patch's rank, do.

`--merges` names the merges of CLIP's tokenizer as its authors published them (`bpe_simple_vocab_16e6.txt.gz`; the wheel of
`open_clip_torch` carries them), and then the vocabulary is the published one. Without them the tokenizer knows letters and
`--vocabulary` words. `--many 50,200` solves so many concepts at once, and erases as many by UCE as published: one prompt of 77
tokens for each concept, one dense edit with an inverse for each projection, in float32. `--whole` encodes the whole vocabulary.
`--scale` narrows the U-Net and takes layers from the text encoders, which are no narrower then.

`--family FLUX.1` is for memory: its T5 reads a prompt of 512 tokens in half a minute, so ask for few with
`--only add --only first --set vocabulary=4 --set target=nothing`.
"""

from __future__ import annotations

import argparse
import gzip
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

import torch

from benchmarks import tables
from benchmarks.build import GIB, resident
from benchmarks.full_size import write_base
from overpaint.workspace.workspace import Workspace

BAR_MEMORY = {"1.5": 1024.0, "XL": 1024.0, "FLUX.1": 2048.0}
BARS = {
    "1.5": {"first": 90.0, "further": 1.5, "whole": 900.0},
    "XL": {"first": 480.0, "further": 8.0},
    "FLUX.1": {},
}
"""Seconds: adding the base and the first patch, one concept more, the whole vocabulary."""
SETTINGS = "settings.json"
"""The file beside the base with the settings that `--set` has, for the first patch alone."""
OTHERS = 5
"""Further concepts, one after the other, of which the mean counts."""
UCE_RIDGE = 0.5
LONG = 200
"""Concepts from which on a fifth of UCE's time is asked."""
# fmt: off
THINGS = (
    "cat", "dog", "car", "sun", "rose", "pistol", "bomb", "robot", "boat", "skull", "pizza", "horse", "bird", "tree",
    "house", "chair", "table", "lamp", "clock", "phone", "camera", "guitar", "piano", "drum", "ball", "bicycle",
    "train", "plane", "ship", "bridge", "castle", "church", "tower", "river", "mountain", "beach", "desert", "forest",
    "garden", "flower", "apple", "banana", "orange", "lemon", "cherry", "bread", "cheese", "egg", "fish", "crab",
)
# fmt: on


def first(workspace: Workspace, folder: Path) -> str:
    """The first patch: its bytes, and how much of the vocabulary it took."""
    settings = json.loads((folder / SETTINGS).read_text())
    solved = workspace.solve("cat", base="base", settings=settings)
    return f"{solved.nbytes:,} bytes {said_of_vocabulary(workspace, solved.id)}"


def said_of_vocabulary(workspace: Workspace, patch: str) -> str:
    """How large a sample of the vocabulary a patch was solved with, and its error."""
    found = workspace.patch(patch).manifest["solver"].get("vocabulary", {})
    return ", ".join(f"{name} {value}" for name, value in found.items())


def further(workspace: Workspace, folder: Path) -> float:
    """Seconds for each further concept in one program, after two that warm it up; with the defaults of `separable`."""
    for name in THINGS[1:3]:
        workspace.solve(name, base="base")
    started = time.perf_counter()
    for name in THINGS[3 : 3 + OTHERS]:
        workspace.solve(name, base="base")
    return (time.perf_counter() - started) / OTHERS


def many(workspace: Workspace, folder: Path, count: int) -> None:
    """So many concepts at once."""
    outcomes = workspace.solve_many(names(count), base="base")
    failed = [outcome.error for outcome in outcomes if outcome.error]
    if failed or len(outcomes) != count:
        raise RuntimeError(f"{len(failed)} of {len(outcomes)} were not solved: {failed[:1]}")


def names(count: int) -> list[str]:
    """The first names of a list that has one for every pair of things."""
    return [*THINGS, *(f"{one} {other}" for one in THINGS for other in THINGS if one != other)][:count]


@torch.no_grad()
def uce(workspace: Workspace, folder: Path, count: int) -> None:
    """UCE's equation 7 as its code has it: each concept's last token, every projection by itself, in float32."""
    from transformers import CLIPTextModel, CLIPTokenizer

    base = workspace.base("base")
    tokenizer = CLIPTokenizer.from_pretrained(base.path / "tokenizer")
    model = CLIPTextModel.from_pretrained(base.path / "text_encoder", dtype=torch.float32)

    def last(text: str) -> torch.Tensor:
        ids = tokenizer(text, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        token = len(tokenizer(text, add_special_tokens=False).input_ids)
        return model(ids).last_hidden_state[0, token]

    value, keys = last(""), [last(name) for name in names(count)]
    eye = torch.eye(len(value))
    for name in base.projections():
        weight = base.tensor(name).float()
        left, right = UCE_RIDGE * weight, UCE_RIDGE * eye
        for key in keys:
            left = left + torch.outer(weight @ value, key)
            right = right + torch.outer(key, key)
        left @ torch.linalg.inv(right)


ADD, FIRST, FURTHER = "add, with the fingerprint", "solve separable, one concept", "further concepts, each"
SHORT = {"add": ADD, "first": FIRST, "further": FURTHER}
"""Steps by the words that `--only` has for them."""
STEPS: dict[str, Callable[[Workspace, Path], object]] = {
    ADD: lambda workspace, folder: workspace.add_base("base", folder / "base"),
    FIRST: first,
    "a further concept, alone": lambda workspace, folder: workspace.solve("dog", base="base"),
    FURTHER: further,
    "add the patch to a recipe": lambda workspace, folder: workspace.create_recipe("r", base="base", exist_ok=True).add(
        workspace.patches()[0].id
    ),
    "export a LoRA": lambda workspace, folder: workspace.recipe("r").export(folder / "built.safetensors"),
    "build a folder": lambda workspace, folder: workspace.recipe("r").build(folder / "built"),
    "build a single file": lambda workspace, folder: workspace.recipe("r").build(folder / "built.safetensors"),
}
BUILDING = tuple(name for name in STEPS if name.startswith(("export", "build")))
WHOLE = "the whole vocabulary"


def step_named(name: str) -> Callable[[Workspace, Path], object]:
    """A step of the table, or one of those that are asked for."""
    if name == WHOLE:
        return lambda workspace, folder: workspace.prepare("base")
    solver, _, count = name.partition(" of ")
    if count:
        work = {"separable": many, "UCE as published": uce}[solver]
        return lambda workspace, folder: work(workspace, folder, int(count))
    return STEPS[name]


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--family", choices=list(BARS), default="1.5")
    parser.add_argument("--scale", type=float, default=1.0, help="of the U-Net's values and the text encoders' layers")
    parser.add_argument("--merges", type=Path, help="the merges of CLIP's tokenizer, as published")
    parser.add_argument("--vocabulary", type=int, default=12, help="words that the tokenizer knows without --merges")
    parser.add_argument("--many", default="", help="numbers of concepts that are solved at once, with commas between")
    parser.add_argument("--whole", action="store_true", help="encode the whole vocabulary")
    parser.add_argument("--only", action="append", choices=list(SHORT), help="one step; can be repeated")
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE of separable, for the first patch")
    parser.add_argument("--no-build", action="store_true", help="leave out exporting and building")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.step:
        print(json.dumps(one(chosen.step[0], Path(chosen.step[1]))))
        return
    counts = [int(count) for count in chosen.many.split(",") if count]
    steps = [step for step in STEPS if not (chosen.no_build and step in BUILDING)]
    steps = [SHORT[word] for word in chosen.only] if chosen.only else steps
    for count in counts:
        steps += [f"separable of {count}", *([f"UCE as published of {count}"] if chosen.family == "1.5" else [])]
    steps += [WHOLE] if chosen.whole else []
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="overpaint-benchmark-") as folder:
        tokenizer = published_tokenizer(chosen.merges) if chosen.merges else None
        sizes = write_base(Path(folder) / "base", chosen.family, chosen.scale, chosen.vocabulary, tokenizer=tokenizer)
        (Path(folder) / SETTINGS).write_text(json.dumps(dict(each.split("=", 1) for each in chosen.set)))
        bare = idle_torch()
        rows: list[list[Any]] = [["base, GiB", sum(sizes.values()) / GIB, None, None, None, ""]]
        taken: dict[str, float] = {}
        for step in steps:
            print(step, file=sys.stderr)
            seconds, imported, highest, said = apart(step, Path(folder))
            taken[step] = said if isinstance(said, float) else seconds
            print(f"{step}: {taken[step]:.2f} s, {highest - bare:.0f} MiB {said}", file=sys.stderr)
            said = "" if said is None or isinstance(said, float) else str(said)
            rows.append([step, taken[step], None, highest - bare, imported - bare, said])
            clear(Path(folder))
        rows += summary(taken, BARS[chosen.family], counts)
    columns = [
        "what",
        "seconds",
        "bar",
        f"memory over torch's own, MiB (bar {BAR_MEMORY[chosen.family]:.0f})",
        "of it imports, MiB",
        "",
    ]
    words = "the published vocabulary" if chosen.merges else f"{chosen.vocabulary} words"
    named = "FLUX.1" if chosen.family == "FLUX.1" else f"Stable Diffusion {chosen.family}"
    title = f"{named}, scale {chosen.scale:g}, {words}, {torch.get_num_threads()} threads"
    tables.save(chosen.json, tables.show(title, columns, rows))


def summary(taken: dict[str, float], bars: dict[str, float], counts: list[int]) -> list[list[Any]]:
    """The seconds that have a bar, and the ratios to UCE's: at most its time, a fifth of it from `LONG` concepts on."""
    found = {
        "first": ("adding and the first patch", taken[ADD] + taken[FIRST] if {ADD, FIRST} <= taken.keys() else None),
        "further": ("a further concept", taken.get(FURTHER)),
        "whole": (WHOLE, taken.get(WHOLE)),
    }
    rows = [[*found[name], bar, None, None, ""] for name, bar in bars.items() if found[name][1] is not None]
    for count in counts:
        if (published := taken.get(f"UCE as published of {count}")) is not None:
            ratio = taken[f"separable of {count}"] / published
            rows.append([f"separable / UCE, {count} concepts", ratio, 1.0 if count < LONG else 0.2, None, None, ""])
    return rows


def published_tokenizer(merges: Path) -> Any:
    """CLIP's tokenizer from the merges that its authors published: 49,408 tokens."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    opened = gzip.open if merges.suffix == ".gz" else open
    with opened(merges, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    pairs = [(pair[0], pair[1]) for pair in (line.split() for line in lines)]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs, model_max_length=77)


def clear(folder: Path) -> None:
    """Take away what a step wrote beside the base and the registry."""
    shutil.rmtree(folder / "built", ignore_errors=True)
    (folder / "built.safetensors").unlink(missing_ok=True)


def idle_torch() -> float:
    """MiB that an interpreter has which imported torch."""
    program = "import torch; from benchmarks.build import resident; print(resident('VmRSS'))"
    return float(subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout)


def apart(step: str, folder: Path) -> tuple[float, float, float, Any]:
    """`one` in a program of its own."""
    words = [sys.executable, "-m", "benchmarks.first_patch", "--step", step, str(folder)]
    ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    seconds, imported, highest, said = json.loads(ran.stdout.splitlines()[-1])
    return seconds, imported, highest, said


def one(step: str, folder: Path) -> tuple[float, float, float, Any]:
    """Seconds of a step, the MiB that this program had when everything was imported, and at most during the step, and what it
    says."""
    from diffusers import StableDiffusionXLPipeline  # noqa: F401
    from transformers import CLIPTextModelWithProjection  # noqa: F401

    from overpaint.patches import build  # noqa: F401

    workspace = Workspace.open(folder / "registry")
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    imported, started = resident("VmRSS"), time.perf_counter()
    said = step_named(step)(workspace, folder)
    return time.perf_counter() - started, imported, resident("VmHWM"), said if isinstance(said, str | float) else None


if __name__ == "__main__":
    main()
