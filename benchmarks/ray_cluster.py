"""Many concepts on a Ray cluster beside one process: `python -m benchmarks.ray_cluster [--concepts 24] [--json FILE]`.

A cluster of two nodes with one core each is started on this machine. The same concepts are solved in this process, on the
cluster, and on the cluster while one of its nodes is removed; then empty pieces tell what handing one out costs. Two free
cores are needed for the ratio to mean anything; every process computes on one thread.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import overpaint
from benchmarks import tables
from overpaint.core.executors import Piece, Resources, open_executor
from overpaint.core.reporting import Progress
from overpaint.evaluation.prompts import catalogue

EMPTY = 200


def nothing(shared: Any, progress: Progress) -> None:
    """An empty piece."""


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--concepts", type=int, default=24)
    parser.add_argument("--solver", default="esd")
    parser.add_argument("--steps", type=int, default=40, help="gradient steps for each concept")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    second = cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    names = list(catalogue().objects[: chosen.concepts])
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        here = solve(Path(folder) / "here", names, chosen.solver, chosen.steps, "")
        there = solve(Path(folder) / "there", names, chosen.solver, chosen.steps, "ray")
        rows.append(["one process", here[0], 1.0, None, here[1]])
        rows.append(["two nodes", there[0], here[0] / there[0], 1.7, there[1]])
        rows.append(["empty piece, ms", 1e3 * empty_piece(), None, 20.0, None])
        lost = solve(
            Path(folder) / "lost", names, chosen.solver, chosen.steps, "ray", lambda: cluster.remove_node(second)
        )
        rows.append(["two nodes, one removed after three patches", lost[0], here[0] / lost[0], None, lost[1]])
        same = {tuple(sorted(found[2])) for found in (here, there, lost)}
        print("the same patches, each once" if len(same) == 1 else "THE PATCHES DIFFER")
    ray.shutdown()
    cluster.shutdown()
    title = f"{chosen.concepts} concepts by {chosen.solver}, {chosen.steps} steps, embedded base"
    tables.save(chosen.json, tables.show(title, ["where", "seconds", "times faster", "bar", "patches stored"], rows))


def solve(
    folder: Path, names: list[str], solver: str, steps: int, on: str, after_three: Any = None
) -> tuple[float, int, list[str]]:
    """Seconds, how many patches were stored, and their ids."""
    workspace = overpaint.open(folder)
    workspace.add_base("emoji", "emoji")
    done: list[Any] = []

    def note(outcome: Any) -> None:
        done.append(outcome)
        if len(done) == 3 and after_three is not None:
            after_three()

    started = time.perf_counter()
    workspace.solve_many(
        names, base="emoji", solver=solver, settings={"preset": "emoji", "steps": steps}, on=on, on_result=note
    )
    seconds = time.perf_counter() - started
    patches = workspace.patches()
    return seconds, len(patches), [patch.id for patch in patches]


def empty_piece() -> float:
    """Seconds that a piece takes which does nothing, workers being there."""
    executor = open_executor("ray")
    try:
        list(executor.results([Piece("empty", nothing)] * 8, None, Resources()))
        started = time.perf_counter()
        list(executor.results([Piece("empty", nothing)] * EMPTY, None, Resources()))
        return (time.perf_counter() - started) / EMPTY
    finally:
        executor.close()


if __name__ == "__main__":
    main()
