"""A base as large as Stable Diffusion XL, from end to end: `python -m benchmarks.sdxl [--vocabulary 12] [--json FILE]`.

A diffusers folder of Stable Diffusion XL's shapes in half precision (6.9 GB), with random weights, is added, patched by
`separable`, exported, built as a folder and built as a single file. Each step is a fresh program. What is shown is its time,
and its highest resident memory less that of an interpreter that imported torch and did nothing; what importing all the
libraries takes of it stands beside.

The tokenizer knows letters and `--vocabulary` words, where the published ones know some 40,000: hearing those on two cores
takes a day. A piece of the vocabulary, which is what decides about memory, is whole from 256 words on. `--scale` narrows the
U-Net and takes layers from the text encoders, which are no narrower then: with `--scale 0.1 --vocabulary 256` whole pieces
are heard in minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.build import GIB, resident
from benchmarks.checkpoints import write_single_file
from overpaint.workspace.workspace import Workspace

BAR_MEMORY = 1024.0
STEMS = {"text_encoder": "model", "text_encoder_2": "model"}
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
        sizes = write_base(Path(folder) / "base", chosen.scale, chosen.vocabulary)
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


def write_base(folder: Path, scale: float, words: int) -> dict[str, int]:
    """A diffusers folder of random weights; returns the bytes of each component."""
    from diffusers import DDIMScheduler

    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(1 << 24, generator=generator) / 50).half()

    def value(shapes: dict[str, tuple[int, ...]], key: str) -> Tensor:
        count = torch.Size(shapes[key]).numel()
        start = int(torch.randint(1 << 20, (1,), generator=generator))
        return torch.cat([values[start:]] * (count // (len(values) - start) + 1))[:count].reshape(shapes[key])

    sizes, index = {}, {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.42.0"}
    for name, model in list(models(scale)):
        shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
        file = folder / name / f"{STEMS.get(name, 'diffusion_pytorch_model')}.safetensors"
        file.parent.mkdir(parents=True)
        described = [(key, torch.float16, shape) for key, shape in shapes.items()]
        write_single_file(file, described, lambda key, shapes=shapes: value(shapes, key))  # type: ignore[misc]
        model.config.save_pretrained(file.parent) if name in STEMS else model.save_config(file.parent)
        sizes[name] = file.stat().st_size
        index[name] = ["transformers" if name in STEMS else "diffusers", type(model).__name__]  # type: ignore[assignment]
    for name in ("tokenizer", "tokenizer_2"):
        speller(words).save_pretrained(folder / name)
        index[name] = ["transformers", "CLIPTokenizer"]  # type: ignore[assignment]
    DDIMScheduler().save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "DDIMScheduler"]  # type: ignore[assignment]
    (folder / "model_index.json").write_text(json.dumps(index))
    return sizes


def models(scale: float) -> Iterator[tuple[str, Any]]:
    """The components, without storage."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width = max(32, round(320 * math.sqrt(scale) / 32) * 32)
    text_encoder = {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "pad_token_id": 53,
    }
    first = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    second = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
    layers = {name: max(2, round(count * scale)) for name, count in (("first", 12), ("second", 32))}
    with torch.device("meta"):
        yield "text_encoder", CLIPTextModel(CLIPTextConfig(num_hidden_layers=layers["first"], **first, **text_encoder))
        yield (
            "text_encoder_2",
            CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=layers["second"], **second, **text_encoder)),
        )
        yield (
            "unet",
            UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(width, 2 * width, 4 * width),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=2,
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
        )
        yield (
            "vae",
            AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
        )


def speller(words: int) -> Any:
    """A tokenizer that spells everything, but for so many words of three letters."""
    from transformers import CLIPTokenizer

    alphabet = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    known = ["".join(word) for word in itertools.islice(itertools.product(alphabet, repeat=3), words)]
    pairs = list(dict.fromkeys((word[0], word[1]) for word in known))
    merges = [*pairs, *((word[:2], f"{word[2]}</w>") for word in known)]
    tokens += ["".join(pair) for pair in merges]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)


if __name__ == "__main__":
    main()
