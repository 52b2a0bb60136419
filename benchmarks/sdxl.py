"""A base as large as Stable Diffusion XL, from end to end: `python -m benchmarks.sdxl [--scale 1] [--json FILE]`.

A diffusers folder of Stable Diffusion XL's shapes in half precision (6.9 GB), with random weights, is added, patched by
`separable`, built as a folder and built as a single file. Each step is a fresh program that has imported everything; what
is shown is its time, and by how many MiB its resident memory rose at most. A solve holds the text encoders in single
precision, whose size is shown beside it. `--scale` narrows the U-Net and shortens the text encoders. The tokenizer has
letters alone, so a solve hears fewer words than it would.
"""

from __future__ import annotations

import argparse
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
from overpaint.patches import build as _imported_before_measuring  # noqa: F401
from overpaint.workshop import Workshop

BAR_MEMORY = 1024.0
STEMS = {"text_encoder": "model", "text_encoder_2": "model"}
STEPS: dict[str, Callable[[Workshop, Path], object]] = {
    "add, with the fingerprint": lambda shop, folder: shop.add_base("xl", folder / "base"),
    "solve separable, one concept": lambda shop, folder: shop.solve("cat", base="xl"),
    "add the patch to a recipe": lambda shop, folder: shop.recipe("r", base="xl").add(shop.patches()[0].id),
    "build a folder": lambda shop, folder: shop.build("r", folder / "built"),
    "build a single file": lambda shop, folder: shop.build("r", folder / "built.safetensors", form="single-file"),
}


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--scale", type=float, default=1.0, help="of the U-Net's values and the text encoders' layers")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.step:
        print(json.dumps(one(chosen.step[0], Path(chosen.step[1]))))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="overpaint-benchmark-") as folder:
        sizes = write_base(Path(folder) / "base", chosen.scale)
        rows: list[list[Any]] = [["base, GiB", sum(sizes.values()) / GIB, None, None]]
        encoders = sum(2 * size for name, size in sizes.items() if name.startswith("text_encoder")) / (1 << 20)
        for step in STEPS:
            seconds, memory = apart(step, Path(folder))
            print(f"{step}: {seconds:.1f} s, {memory:.0f} MiB", file=sys.stderr)
            rows.append([step, seconds, memory, f"text encoders: {encoders:.0f}" if "solve" in step else None])
            shutil.rmtree(Path(folder) / "built", ignore_errors=True)
    columns = ["what", "seconds", f"memory, MiB (bar {BAR_MEMORY:.0f} over torch's own)", "of it, MiB"]
    tables.save(chosen.json, tables.show("Stable Diffusion XL", columns, rows))


def apart(step: str, folder: Path) -> tuple[float, float]:
    """`one` in a program of its own."""
    words = [sys.executable, "-m", "benchmarks.sdxl", "--step", step, str(folder)]
    ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    seconds, memory = json.loads(ran.stdout.splitlines()[-1])
    return seconds, memory


def one(step: str, folder: Path) -> tuple[float, float]:
    """Seconds of a step, and by how many MiB it raised this program's resident memory."""
    from diffusers import StableDiffusionXLPipeline  # noqa: F401
    from transformers import CLIPTextModelWithProjection  # noqa: F401

    shop = Workshop.open(folder / "registry")
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    idle, started = resident("VmRSS"), time.perf_counter()
    STEPS[step](shop, folder)
    return time.perf_counter() - started, resident("VmHWM") - idle


def write_base(folder: Path, scale: float) -> dict[str, int]:
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
        letters().save_pretrained(folder / name)
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
    tower = {
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
        yield "text_encoder", CLIPTextModel(CLIPTextConfig(num_hidden_layers=layers["first"], **first, **tower))
        yield (
            "text_encoder_2",
            CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=layers["second"], **second, **tower)),
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


def letters() -> Any:
    """A tokenizer that spells everything."""
    from transformers import CLIPTokenizer

    alphabet = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
