"""Work on a Ray cluster of two nodes on this machine, one of which is lost; solving and drawing on it too, since a cluster
takes long to start."""

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
from overpaint.bases.base import Base, BaseReference
from overpaint.core.errors import OverpaintError
from overpaint.core.executors import Executor, Piece, Resources, open_executor
from overpaint.evaluation.images import ImageCache, ImageGenerator, Sampler
from overpaint.evaluation.prompts import EvalPrompt
from overpaint.testing.contract import tiny_pipeline

from .executor_pieces import die, die_once, double, fail, hungry, marked, opens, refuse, worker_id

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


def test_a_larger_share_waits_until_it_is_free_and_the_others_are_done(executor: Executor, tmp_path: Path) -> None:
    pieces = [Piece("hungry", hungry), *(Piece("marks", marked) for _ in range(6))]
    assert done(executor, pieces, str(tmp_path / "mark")) == [("done", "")] + [("marked", "")] * 6


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


def test_pictures_drawn_on_a_cluster_are_those_of_this_process(cluster: Any, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    base = Base.open(tmp_path / "base")
    questions = [EvalPrompt("a cat", seed, {}) for seed in range(4)]
    sampler = Sampler(steps=1, batch=2)
    executor = open_executor("ray")
    here, there = (
        ImageGenerator(base, sampler, ImageCache(None), torch.device("cpu"), executor=each).draw([], questions)
        for each in (None, executor)
    )
    executor.close()
    assert np.array_equal(here, there)


def test_no_cluster_at_an_address_is_one_sentence(cluster: Any) -> None:
    ray.shutdown()
    try:
        with pytest.raises(OverpaintError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 "):
            open_executor("127.0.0.1:1")
    finally:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
