"""Work on a Ray cluster of two nodes on this machine, one of which is lost; solving, drawing, encoding and measuring on it too,
since a cluster takes long to start."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import overpaint
from benchmarks.cells import Cells
from benchmarks.protocol import Counts
from benchmarks.solvers import Bench
from benchmarks.solvers import run as measure
from overpaint.bases.base import Base, BaseReference
from overpaint.core.errors import OverpaintError
from overpaint.core.executors import Executor, Piece, Resources, open_executor
from overpaint.evaluation.images import ImageCache, ImageGenerator, Sampler
from overpaint.evaluation.prompts import EvalPrompt
from overpaint.solvers import vocabulary
from overpaint.testing.contract import tiny_pipeline

from .executor_pieces import die, die_once, double, fail, hungry, marked, opens, refuse, slow_first, worker_id

ray = pytest.importorskip("ray", reason="the package ray is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # what Ray warns of is not ours
]
LIGHT = Resources(cpus=1)


def patiently(start: Callable[[], Any]) -> Any:
    """What starts a node. Ray gives it half a minute, which beside other tests is not always enough."""
    for _ in range(2):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


def add_node(cluster: Any) -> Any:
    """A node of one core more."""
    return patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=100 << 20))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes, of two cores and of one."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    add_node(cluster)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray does not wait for the processes that it has ended
        del cluster
        gc.collect()


@pytest.fixture(scope="module")
def executor(cluster: Any) -> Iterator[Executor]:
    """One for all tests: what dies in one of them is started again in the next, and a start takes seconds."""
    executor = open_executor("ray")
    yield executor
    executor.close()


def done(executor: Executor, pieces: list[Piece], shared: Any, needs: Resources = LIGHT) -> list[tuple[Any, str]]:
    """Values and errors, in the order of the pieces."""
    results = sorted(executor.results(pieces, shared, needs), key=lambda result: result.index)
    return [(result.value, result.error) for result in results]


def test_every_piece_is_done_once_and_values_are_its_own(executor: Executor) -> None:
    pieces = [Piece(f"piece {i}", double, (i,)) for i in range(40)]
    assert done(executor, pieces, 3) == [(3 * i, "") for i in range(40)]


def test_pieces_are_spread_over_the_nodes(executor: Executor) -> None:
    found = done(executor, [Piece("wait", worker_id)] * 6, 0.2)
    assert len({value[0] for value, _ in found}) == 3
    assert len({value[1] for value, _ in found}) == 2


def test_refusals_and_faults_are_results_with_their_reason(executor: Executor) -> None:
    refused, failed, fine = done(executor, [Piece("a", refuse), Piece("b", fail), Piece("c", double, (1,))], 1)
    assert refused == (None, "this piece is refused")
    assert failed[1].startswith("KeyError: 'a fault of the piece' (in fail, on ")
    assert fine == (1, "")


def test_a_killed_worker_loses_nothing(executor: Executor, tmp_path: Path) -> None:
    assert done(executor, [Piece("dies once", die_once)], str(tmp_path / "mark")) == [("done", "")]


def test_a_piece_that_kills_its_workers_is_reported(executor: Executor) -> None:
    [(value, error)] = done(executor, [Piece("dies", die)], None)
    assert value is None
    assert error.startswith("lost its worker 3 times: ")


def test_a_piece_without_memory_gets_twice_the_share(executor: Executor, tmp_path: Path) -> None:
    assert done(executor, [Piece("hungry", hungry)], str(tmp_path / "mark")) == [("done", "")]


def test_no_piece_is_begun_too_far_ahead_of_the_first_that_is_missing(executor: Executor) -> None:
    pieces = [Piece(f"piece {i}", slow_first, (i,)) for i in range(9)]
    order = [result.index for result in executor.results(pieces, 2.0, LIGHT, ahead=4)]
    assert sorted(order) == list(range(9))
    assert set(order[: order.index(0)]) <= {1, 2, 3}


def test_a_first_piece_that_needs_more_is_not_waited_for_in_vain(executor: Executor, tmp_path: Path) -> None:
    pieces = [Piece("hungry", hungry), *(Piece("marks", marked) for _ in range(6))]
    values = [result.value for result in executor.results(pieces, str(tmp_path / "mark"), LIGHT, ahead=2)]
    assert sorted(values) == ["done"] + ["marked"] * 6


def test_a_larger_share_waits_until_it_is_free_and_the_others_are_done(executor: Executor, tmp_path: Path) -> None:
    pieces = [Piece("hungry", hungry), *(Piece("marks", marked) for _ in range(6))]
    assert done(executor, pieces, str(tmp_path / "mark")) == [("done", "")] + [("marked", "")] * 6


def test_cores_that_others_hold_are_left_to_them(cluster: Any) -> None:
    holding, other = open_executor("ray"), open_executor("ray")
    done(holding, [Piece("wait", worker_id)] * 2, 0.5)  # two of the three cores stay with this one
    found = done(other, [Piece("wait", worker_id)] * 4, 0.2)
    holding.close()
    other.close()
    assert not any(error for _, error in found)
    assert len({value[0] for value, _ in found}) == 1


def test_more_than_any_node_has_is_refused(executor: Executor) -> None:
    with pytest.raises(OverpaintError, match="no node of the cluster can do this: a piece needs 64 CPU"):
        done(executor, [Piece("large", double, (1,))], 1, Resources(cpus=64))


def test_another_version_on_a_worker_is_refused_by_name(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overpaint.core.executors.__version__", "9.9")
    with pytest.raises(OverpaintError, match=r"the worker on .+ has Overpaint .+ and this program 9\.9"):
        done(executor, [Piece("any", double, (1,))], 1)


def test_a_node_that_is_removed_in_the_middle_loses_nothing(cluster: Any) -> None:
    node = add_node(cluster)
    cluster.wait_for_nodes()
    executor = open_executor("ray")
    values = []
    for result in executor.results([Piece(f"piece {i}", worker_id) for i in range(12)], 0.3, LIGHT):
        values.append(result)
        if len(values) == 3:
            cluster.remove_node(node, allow_graceful=False)
    executor.close()
    assert sorted(result.index for result in values) == list(range(12))
    assert not any(result.error for result in values)


def test_patches_solved_on_a_cluster_are_those_of_this_process(cluster: Any, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    ids = []
    for place, on in (("here", ""), ("there", "ray")):
        workspace = overpaint.open(tmp_path / place)
        workspace.add_base("tiny", tmp_path / "base")
        outcomes = workspace.solve_many(
            ["cat", "dog"], base="tiny", solver="esd", steps=1, sampling_steps=1, batch=1, on=on
        )
        assert [outcome.error for outcome in outcomes] == ["", ""]
        ids.append([outcome.record.id for outcome in outcomes if outcome.record])
        assert sorted(patch.concept for patch in workspace.patches()) == ["cat", "dog"]
    assert ids[0] == ids[1]


def test_a_worker_without_the_base_says_which_machine_lacks_it(executor: Executor, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    base = BaseReference(Base.open(tmp_path / "base"))
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    [(_, error)] = done(executor, [Piece("any", opens)], base)
    assert error.startswith("the worker on ")
    assert "has not the base: " in error


def test_pictures_drawn_on_a_cluster_are_those_of_this_process(executor: Executor, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    base = Base.open(tmp_path / "base")
    questions = [EvalPrompt("a cat", seed, {}) for seed in range(4)]
    sampler = Sampler(steps=1, batch=2)
    here, there = (
        ImageGenerator(base, sampler, ImageCache(None), torch.device("cpu"), executor=each).draw([], questions)
        for each in (None, executor)
    )
    assert np.array_equal(here, there)


def test_a_vocabulary_encoded_on_a_cluster_has_the_bits_of_one_process_also_after_an_interruption(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", 4)
    monkeypatch.setattr(vocabulary, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(vocabulary, "AHEAD_BYTES", 0)
    tiny_pipeline().save_pretrained(tmp_path / "base")
    stored, steps = [], dict[str, list[int]]()

    def stop(step: int, of: int, text: str) -> None:
        # Pieces are stored in order, so a first one that is late on a busy machine leaves nothing to go on with.
        if any(vocabulary.read_vocabulary(part).done for part in (tmp_path / "interrupted").rglob("*.partial")):
            raise KeyboardInterrupt

    for place, on in (("here", ""), ("there", "ray"), ("interrupted", "ray")):
        workspace = overpaint.open(tmp_path / place)
        workspace.add_base("tiny", tmp_path / "base")
        seen = steps[place] = []
        done = 0
        if place == "interrupted":
            with pytest.raises(KeyboardInterrupt):
                workspace.prepare("tiny", on=on, progress=stop)
            (part,) = (tmp_path / place).rglob("*.partial")
            done = vocabulary.read_vocabulary(part).done
            assert done >= 1
        workspace.prepare("tiny", on=on, progress=lambda step, of, text, seen=seen: seen.append(step))  # type: ignore[misc]
        assert seen == list(range(done + 1, seen[-1] + 1)), "what was stored is not encoded again"
        (file,) = (tmp_path / place / "cache" / "vocabulary").glob("*.safetensors")
        stored.append((file.name, file.read_bytes()))
    assert stored[0] == stored[1] == stored[2]


def test_cells_measured_on_a_cluster_are_those_of_this_process(executor: Executor, tmp_path: Path) -> None:
    found = []
    for place, on in (("here", None), ("there", executor)):
        bench, cells = Bench(tmp_path / place, "cpu", steps=1), Cells(tmp_path / place / "cells")
        bench.work = tmp_path / "of workers"  # as on a machine that does not share the folder
        measure(bench, cells, [("uce", "cat"), ("uce+decoupled", "cat")], Counts(1, 1, 1), executor=on)
        kept = [cells.find(solver, "cat") for solver in ("uce", "uce+decoupled")]
        found.append([(cell.settings, cell.verdicts, cell.made["patch"]) for cell in kept if cell])
        assert len(list((tmp_path / place / "patches").iterdir())) == 4
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_no_cluster_at_an_address_is_one_sentence(cluster: Any) -> None:
    ray.shutdown()
    try:
        with pytest.raises(OverpaintError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 "):
            open_executor("127.0.0.1:1")
    finally:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
