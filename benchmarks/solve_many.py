"""`overpaint solve --from` on the embedded base: where the time of many concepts goes, and what going on costs.

Concepts are words of the tokenizer. Every stage is measured once, in seconds of the processor and of the clock; the ratio is
to carrying the whole plan out. Then what compression costs and saves: the same concepts by `uce` with all its directions,
truncated to a rank.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import overpaint
from benchmarks.tables import arguments, save, show
from overpaint.bases.text_encoder import TextEncoder
from overpaint.workspace.solving import Solved
from overpaint.workspace.workspace import Workspace

T = TypeVar("T")


class Stages:
    """What was measured, in order."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        processor, clock = time.process_time(), time.perf_counter()
        found = work()
        self.rows.append([name, time.process_time() - processor, time.perf_counter() - clock])
        return found

    def table(self, whole: str) -> list[list[Any]]:
        """With the ratio of processor time to that of one of the stages."""
        (of,) = (row[1] for row in self.rows if row[0] == whole)
        return [[*row, row[1] / of] for row in self.rows]


def measured(workspace: Workspace, file: Path) -> Stages:
    """Every stage of a first run, and of a second that finds everything solved."""
    stage = Stages()
    stage("encode the vocabulary, once per base", lambda: workspace.prepare("emoji", device="cpu"))
    plan = stage("read the file and plan", lambda: workspace.plan(file=file, base="emoji"))
    first: list[float] = []
    began = time.process_time()
    stage(
        "carry out",
        lambda: workspace.carry_out(plan, device="cpu", on_result=lambda o: first.append(time.process_time())),
    )
    stage.rows.append(["of that, the first concept, with all embeddings", first[0] - began, None])
    again = stage("plan once more", lambda: workspace.plan(file=file, base="emoji"))
    stage("carry out once more: nothing is open", lambda: workspace.carry_out(again, device="cpu"))
    return stage


def compressed(workspace: Workspace, patches: list[Solved], keep: str) -> list[Any]:
    """Bytes of a patch before and after, and the largest relative error of a tensor, at most over some patches."""
    before, after, error, seconds = 0, 0, 0.0, 0.0
    for whole in patches:
        began = time.process_time()
        record, found = workspace.compress(whole.id, keep)
        seconds = max(seconds, time.process_time() - began)
        before, after = max(before, whole.nbytes), max(after, record.nbytes)
        error = max(error, max(found.errors.values()))
    return [keep, before, after, before / after, error, seconds]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--count", type=int, default=50, help="how many concepts")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        workspace, few = (overpaint.open(folder / name) for name in ("many", "few"))
        for each in (workspace, few):
            each.add_base("emoji", "emoji")
        words = [word for word in TextEncoder.of(workspace.base("emoji")).words() if len(word) > 3]
        names = random.Random(0).sample(words, asked.count)
        file = folder / "concepts.yaml"
        file.write_text("\n".join(f"- {name!r}" for name in names))
        stages = measured(workspace, file)
        first = show(f"{asked.count} concepts", ["stage", "processor s", "s", "ratio"], stages.table("carry out"))
        for name in names[:4]:
            few.add_concept(name)
        whole = {"positions": "all", "spoken": "true"}
        solved = [few.solve(name, base="emoji", solver="uce", settings=whole, device="cpu") for name in names[:4]]
        rows = [compressed(few, solved, keep) for keep in ("0.99", "8", "4", "1")]
        columns = ["keep", "bytes before", "bytes", "ratio", "largest error", "processor s"]
        second = show("Compressing text maps of uce, the worst of 4 concepts", columns, rows)
    save(asked.json, first, second)


if __name__ == "__main__":
    main()
