"""Hostile files offered as bases: `python -m benchmarks.hostile [--json FILE]`.

Each file is opened as `overpaint base add` opens it, in a fresh program that has imported everything. It must be refused;
measured are the seconds until it is, of the clock and of the processor (on a busy machine only the latter say anything), and
by how many MiB the program's resident memory rose at most. The first row is an honest file of as many tensors as Stable
Diffusion XL has, for comparison.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import pickletools
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.build import resident
from overpaint.bases.base import Base
from overpaint.core.errors import OverpaintError

BAR_SECONDS, BAR_MEMORY = 1.0, 256.0
TENSORS = 2516
"""Of a single file of Stable Diffusion XL."""


class Runs:
    """Unpickled by a careless program, this would run another."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("a pickle was run",)


def packed(header: bytes, size: int = 0) -> bytes:
    return struct.pack("<Q", len(header)) + header + b"\0" * size


def keys(count: int, key: str = "model.diffusion_model.k{:07}") -> bytes:
    """A sound header of so many tensors without values."""
    one = '"' + key + '":{{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}'
    return ("{" + ",".join(one.format(number) for number in range(count)) + "}").encode()


def saved(value: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def archive(parts: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of these parts."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as writer:
        for name, content in parts.items():
            writer.writestr(name, content)
    return buffer.getvalue()


def with_pickle(content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save writes, with another pickle in it."""
    return archive({"x/data.pkl": content, "x/byteorder": b"little", "x/version": b"3\n"}, method)


def built_again(times: int) -> bytes:
    """What torch.save writes of a list of one tensor, whose pickle builds it so many times more from what it remembers."""
    written, parts = zipfile.ZipFile(io.BytesIO(saved([BIG]))), {}
    for name in written.namelist():
        content = written.read(name)
        if name.endswith(".pkl"):
            steps: list[tuple[str, Any]] = [
                (operation.name, argument) for operation, argument, _ in pickletools.genops(content)
            ]
            build = next(i for i, step in enumerate(steps) if step == ("GLOBAL", "torch._utils _rebuild_tensor_v2"))
            values = max(i for i, step in enumerate(steps) if step[0] == "TUPLE")
            (_, first), (_, second) = steps[build + 1], steps[values + 1]  # where each is remembered
            content = content[:-1] + bytes([ord("h"), first, ord("h"), second, *b"Ra"]) * times + b"."
        parts[name] = content
    return archive(parts)


BIG = torch.zeros(1 << 20)
FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "honest, as many tensors as SDXL": (".safetensors", lambda: packed(keys(TENSORS))),
    "header said to be 2^60 bytes long": (".safetensors", lambda: struct.pack("<Q", 1 << 60) + b"{}"),
    "header of 10^6 keys": (".safetensors", lambda: packed(keys(1_000_000))),
    "header of as many keys as are read": (
        ".safetensors",
        lambda: packed(keys(29_990, "model.diffusion_model.input_blocks.1.1.{:x}")),
    ),
    "header as long as is read, of short keys": (".safetensors", lambda: packed(keys(290_000, "{:x}"))),
    "header of nested lists": (".safetensors", lambda: packed(b"[" * (8 << 20))),
    "one name of 15 MB": (".safetensors", lambda: packed(keys(1, "k" * (15 << 20)))),
    "shape of 2^60 values": (
        ".safetensors",
        lambda: packed(b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}'),
    ),
    "pickle that runs a program": (".ckpt", lambda: with_pickle(pickle.dumps({"state_dict": Runs()}, protocol=2))),
    "pickle of 10^6 names": (".ckpt", lambda: saved({f"model.diffusion_model.{i}": 0 for i in range(1_000_000)})),
    "pickle that inflates to 1 GiB": (".ckpt", lambda: with_pickle(bytes(1 << 30), zipfile.ZIP_DEFLATED)),
    "archive of 300 parts with long names": (".ckpt", lambda: archive({f"{i:065000}": b"" for i in range(300)})),
    "one number, expanded to 1 TiB": (".ckpt", lambda: saved({"a": torch.zeros(1).expand(1 << 38)})),
    "archive of 10^5 parts": (".ckpt", lambda: archive({f"{i:x}": b"" for i in range(100_000)})),
    "archive of as many parts as are read": (".ckpt", lambda: archive({f"{i:x}": b"" for i in range(20_000)})),
    "10^4 views of one tensor": (".ckpt", lambda: saved({f"k{i}": BIG.view(-1) for i in range(10_000)})),
    "as many views as are read": (".ckpt", lambda: saved({f"k{i}": BIG.view(-1) for i in range(4_900)})),
    "one tensor, built as often as is read": (".ckpt", lambda: built_again(14_990)),
    "pickle of 3 million steps": (".ckpt", lambda: with_pickle(b"\x80\x02](" + b"N" * 3_000_000 + b"e.")),
    "pickle of as many steps as are read": (".ckpt", lambda: with_pickle(b"\x80\x02](" + b"N" * 159_990 + b"e.")),
}


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(chosen.one)))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="overpaint-benchmark-") as folder:
        for number, (name, (suffix, make)) in enumerate(FILES.items()):
            file = Path(folder) / f"{number}{suffix}"
            file.write_bytes(make())
            rows.append([name, file.stat().st_size / (1 << 20), *apart(file)])
            file.unlink()
    columns = [
        "file",
        "MiB",
        f"seconds (bar {BAR_SECONDS:.0f})",
        "of the processor",
        f"memory, MiB (bar {BAR_MEMORY:.0f})",
        "refused because",
    ]
    tables.save(chosen.json, tables.show("Hostile files", columns, rows))


def apart(file: Path) -> tuple[float, float, float, str]:
    """`one` in a program of its own."""
    words = [sys.executable, "-m", "benchmarks.hostile", "--one", str(file)]
    ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    clock, processor, memory, said = json.loads(ran.stdout)
    return clock, processor, memory, said


def one(file: Path) -> tuple[float, float, float, str]:
    """Seconds of the clock and of the processor, MiB, and the middle of the refusal. Raises when a file is taken."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    idle, started, used = resident("VmRSS"), time.perf_counter(), time.process_time()
    try:
        Base.open(file)
    except OverpaintError as error:
        clock, processor = time.perf_counter() - started, time.process_time() - used
        said = str(error).replace(str(file), "FILE")
        return clock, processor, resident("VmHWM") - idle, said[:90]
    raise SystemExit(f"{file} was opened")


if __name__ == "__main__":
    main()
