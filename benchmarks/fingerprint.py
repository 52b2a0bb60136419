"""Fingerprinting a base against the bare hash function: `python -m benchmarks.fingerprint [--gib 4] [--json FILE]`.

A single-file checkpoint of random weights, with Stable Diffusion 1.5's tensors, is fingerprinted and, in turns, hashed as
one memory map by `hashlib.sha256`, both on one core; then both on two, where the map is hashed in two halves by two
threads. Each has the file in the system's cache. Seconds of the processor are shown beside those of the clock: on a busy
machine only the former compare.
"""

from __future__ import annotations

import hashlib
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.build import GIB, resident, write_random
from overpaint.bases.base import Base
from overpaint.bases.checkpoint import digests_of

BAR, BAR_TWO = 0.9, 1.7


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--gib", type=float, default=4.0, help="size; less than 4, down to 0.8, narrows the U-Net")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is done")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="overpaint-benchmark-") as folder:
        file = Path(folder) / "base.safetensors"
        write_random(file, chosen.gib)
        rows = measure(file, chosen.rounds)
    tables.save(chosen.json, tables.show("Fingerprinting", ["what", "clock", "processor", "bar"], rows))


def measure(file: Path, rounds: int) -> list[list[Any]]:
    """The rows of the table."""
    base, size = Base.open(file), file.stat().st_size / GIB
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    idle = resident("VmRSS")
    ways: dict[str, Callable[[], object]] = {
        "fingerprint, one core": lambda: digests_of(base.places, base.containers, 1),
        "fingerprint, two cores": lambda: digests_of(base.places, base.containers, 2),
    }
    for way in ways.values():
        way()
    peak = resident("VmHWM") - idle
    ways["sha256 of the map, one core"] = lambda: hashed(file, 1)
    ways["sha256 of the map, two cores"] = lambda: hashed(file, 2)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(timed(way))
    clock, processor = ({n: statistics.median(t[i] for t in times) for n, times in taken.items()} for i in (0, 1))
    one, two, plain, halves = ways
    return [
        ["size, GiB; tensors", size, len(base.names), None],
        *([f"{name}, GiB/s", size / clock[name], size / processor[name], None] for name in ways),
        ["rate / sha256's, one core", clock[plain] / clock[one], processor[plain] / processor[one], f">= {BAR}"],
        ["rate / sha256's, two cores", clock[halves] / clock[two], processor[halves] / processor[two], f">= {BAR}"],
        ["two cores / one core", clock[one] / clock[two], None, f">= {BAR_TWO}"],
        ["two halves of the map / one", clock[plain] / clock[halves], None, None],
        ["peak memory over idle, MiB", None, peak, None],
    ]


def hashed(file: Path, threads: int) -> list[str]:
    """The digest of each of so many equal pieces of a file, a thread for each."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        part = -(-len(whole) // threads)

        def piece(number: int) -> str:
            with memoryview(whole) as view, view[number * part : (number + 1) * part] as bytes_of_it:
                return hashlib.sha256(bytes_of_it).hexdigest()

        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(piece, range(threads)))


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processor


if __name__ == "__main__":
    main()
