"""`overpaint solve --from FILE --dry-run` for more and more concepts: seconds of the processor, and whether they grow linearly.

Every concept has synonyms and a prompt of its own; none is in the registry yet. The last column is the time of a concept
relative to that in the shortest file, and 1 or less where growth is linear.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import overpaint
from benchmarks.tables import arguments, save, show

SIZES = (1_000, 2_000, 4_000, 10_000)
BAR = 10.0
"""Seconds for the longest file."""


def concepts(count: int) -> str:
    """A file of `count` concepts, as YAML."""
    entries = (
        f"- {{name: thing {i}, synonyms: [item {i}, object {i}], prompts: ['a thing {i} on a table']}}\n"
        for i in range(count)
    )
    return "".join(entries)


def seconds(registry: Path, file: Path) -> float:
    """Processor seconds of the command, which prints its plan as JSON into nothing."""
    command = ["solve", "--from", file, "--base", "emoji", "--dry-run"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "overpaint", "--registry", registry, *command], check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sizes", type=json.loads, default=SIZES, help="how many concepts, as a JSON list")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        registry, file = Path(scratch) / "registry", Path(scratch) / "concepts.yaml"
        overpaint.open(registry).add_base("emoji", "emoji")
        rows: list[list[object]] = []
        each: list[float] = []
        for size in asked.sizes:
            file.write_text(concepts(size))
            taken = seconds(registry, file)
            each.append(taken / size)
            rows.append([size, taken, 1000 * each[-1], each[-1] / each[0]])
    table = show("A dry run", ["concepts", "processor s", "ms per concept", "of the shortest"], rows)
    save(asked.json, table)


if __name__ == "__main__":
    main()
