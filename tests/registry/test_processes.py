"""Several processes on one registry, some of which are killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select

from overpaint.registry import Registry, models
from overpaint.registry.database import database_at

from .contents import add_patch, digest_of, stock
from .processes import CLEAN, THOROUGH, run_until_killed
from .workers import die_before_commit, die_between_blob_and_row, make, write_much

WRITERS, WRITES = 8, 64 * THOROUGH


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(WRITERS, mp_context=CLEAN) as processes:
        yield processes


def test_eight_writers_lose_nothing_duplicate_nothing_and_never_find_the_database_locked(
    pool: ProcessPoolExecutor, anywhere: str | Path
) -> None:
    registry = Registry.open(anywhere)
    registry.create_recipe("r", "small")
    done = [
        each
        for writer in pool.map(write_much, [anywhere] * WRITERS, range(WRITERS), [WRITES] * WRITERS)
        for each in writer
    ]
    assert len(done) == WRITERS * WRITES
    counted = Counter(what for what, _ in done)

    own = {digest_of(label) for what, label in done if what == "own patch"}
    shared = {digest_of(label) for what, label in done if what == "shared patch"}
    assert Counter(patch.id for patch in registry.patches()) == Counter(own | shared)
    assert len(own) == counted["own patch"]
    assert counted["shared patch"] == WRITERS * len(shared)

    revisions = sorted(int(label) for what, label in done if what == "revision")
    assert revisions == list(range(1, counted["revision"] + 1))
    log = registry.log("r")
    assert [line.revision for line in log] == revisions
    lying = Counter({line.patch: 0 for line in log})
    for line in log:  # each line begins where the one before it ended
        lying[line.patch] += 1 if line.action == "add" else -1
        assert lying[line.patch] in (0, 1)
    assert registry.recipe("r").patches == tuple(
        sorted((patch, 1.0) for patch, lies in lying.items() if patch and lies)
    )

    assert Counter(recipe.name for recipe in registry.recipes()) == Counter(
        {"r", *(n for w, n in done if w == "recipe")}
    )
    with database_at(anywhere).reading() as session:
        texts = Counter(session.scalars(select(models.PatchTextRow.patch_id)))
    assert texts == Counter(own | shared)


def test_many_processes_may_make_one_registry_at_once(pool: ProcessPoolExecutor, location: str | Path) -> None:
    assert list(pool.map(make, [location] * 6)) == [0] * 6
    assert stock(Registry.open(location, create=False)).bases()


def test_a_writer_killed_between_blob_and_row_leaves_an_openable_registry(registry: Registry, folder: Path) -> None:
    run_until_killed(die_between_blob_and_row, folder)
    again = Registry.open(folder, create=False)
    assert again.patches() == []
    assert len(list(again.blobs.digests())) == 1
    assert again.blob(add_patch(again, "one")) == b"one"


def test_a_writer_killed_before_its_commit_leaves_no_trace(registry: Registry, folder: Path) -> None:
    run_until_killed(die_before_commit, folder)
    again = Registry.open(folder, create=False)
    assert [base.name for base in again.bases()] == ["small"]
    again.add_base("ghost", Path("/models/ghost"), "sd1", "0")
