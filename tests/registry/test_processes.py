"""Several processes on one registry, some of which are killed."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from overpaint.registry import Registry

from .shelf import add_patch, stock
from .workers import die_before_commit, die_between_blob_and_row, make, toggle

# Forked from a clean process that has imported what they need: a fork of the test run would carry whatever threads and
# locks other tests left, and starting afresh takes a second each.
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["pytest", "alembic.command", "tests.registry.workers"])


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(4, mp_context=CLEAN) as processes:
        yield processes


def test_four_writers_lose_nothing_and_never_find_the_database_locked(
    pool: ProcessPoolExecutor, registry: Registry, folder: Path
) -> None:
    registry.create_recipe("r", "small")
    labels = ["one", "two", "three", "four"]
    for label in labels:
        add_patch(registry, label)
    revisions = list(pool.map(toggle, [folder] * 4, labels, [20] * 4))
    assert sorted(itertools.chain(*revisions)) == list(range(1, 81))
    assert [line.revision for line in registry.log("r")] == list(range(1, 81))
    assert registry.recipe("r").patches == ()


def test_four_processes_may_make_one_registry_at_once(pool: ProcessPoolExecutor, folder: Path) -> None:
    assert list(pool.map(make, [folder] * 4)) == [str(folder)] * 4
    assert stock(Registry.open(folder, create=False)).bases()


def test_a_writer_killed_between_blob_and_row_leaves_an_openable_registry(registry: Registry, folder: Path) -> None:
    _run_until_killed(die_between_blob_and_row, folder)
    again = Registry.open(folder, create=False)
    assert again.patches() == []
    assert len(list(again.blobs.digests())) == 1
    assert again.blob(add_patch(again, "one")) == b"one"


def test_a_writer_killed_before_its_commit_leaves_no_trace(registry: Registry, folder: Path) -> None:
    _run_until_killed(die_before_commit, folder)
    again = Registry.open(folder, create=False)
    assert [base.name for base in again.bases()] == ["small"]
    again.add_base("ghost", Path("/models/ghost"), "sd1", "0")


def _run_until_killed(target: Callable[[Path], None], folder: Path) -> None:
    process = CLEAN.Process(target=target, args=(folder,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
