"""Writers are killed at random moments, some seventy times: what they had committed is there, whole.

After each kill the registry opens, `verify` finds nothing wrong, and everything the dead process had reported as done is
there. A killed process leaves at most blobs that nothing names, and temporary files. `OVERPAINT_THOROUGH=3` kills three times as
often.
"""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from overpaint.registry import Registry, models, upkeep
from overpaint.registry.sharing.ingest import PullRequest, import_file, pull
from overpaint.registry.sharing.sending import export, push
from overpaint.registry.upkeep import verify

from . import crash_workers as workers
from .contents import lay, stock
from .crash_workers import Tell
from .freeze import LABELS
from .old import thaw
from .patch_maker import FINGERPRINT, keep
from .processes import CLEAN, THOROUGH

Work = Callable[[Path, int, Tell], None]


class Victim:
    """A process that is to be killed, and what it told before."""

    def __init__(self, work: Work, folder: Path, seed: int) -> None:
        self._ear, mouth = CLEAN.Pipe(duplex=False)
        self._process = CLEAN.Process(target=_run, args=(work, folder, seed, mouth))
        self._process.start()
        mouth.close()
        self.told: list[str] = []

    def hear(self) -> float:
        """Wait until it tells something; how long it took, in seconds."""
        began = time.monotonic()
        assert self._ear.poll(120), "it never told anything"
        self.told.append(self._ear.recv_bytes().decode())
        return time.monotonic() - began

    def kill(self) -> list[str]:
        """End it without warning; return what it had told. Raises if it had ended by itself."""
        self._process.kill()
        self._process.join()
        assert self._process.exitcode == -signal.SIGKILL, "it failed before it was killed"
        try:
            while self._ear.poll():
                self.told.append(self._ear.recv_bytes().decode())
        except EOFError:
            pass
        self._ear.close()
        return self.told


def _run(work: Work, folder: Path, seed: int, mouth: Connection) -> None:
    work(folder, seed, mouth.send_bytes)


def killed(work: Work, folder: Path, seed: int, seconds: float | None = None) -> list[str]:
    """Let a process work on a registry, kill it at a random moment, and return what it had told.

    The moment is within about two rounds of its work: after it told of the first one, which shows how fast this machine is
    just now, or within `seconds` of its beginning.
    """
    victim = Victim(work, folder, seed)
    first = victim.hear()
    time.sleep(random.Random(seed).uniform(0, seconds or min(first, 1.0)))
    return victim.kill()


def duration(work: Work, folder: Path) -> float:
    """How long a process takes, just now, from its beginning until it tells something more."""
    victim = Victim(work, folder, 0)
    victim.hear()
    seconds = victim.hear()
    victim.kill()
    return seconds


def opened_and_sound(folder: Path) -> Registry:
    registry = Registry.open(folder, create=False)
    assert verify(registry).problems == ()
    assert not (folder / "quarantine").exists()
    return registry


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a base, a concept and six patches."""
    folder = tmp_path_factory.mktemp("template")
    registry = stock(Registry.open(folder))
    for number in range(6):
        keep(registry, workers.make_patch_file(f"template {number}"))
    return folder


@pytest.fixture
def fresh(template: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of the template in the place of the one before."""

    def make() -> Path:
        shutil.rmtree(tmp_path / "registry", ignore_errors=True)
        return Path(shutil.copytree(template, tmp_path / "registry"))

    return make


def test_a_killed_writer_of_patches_loses_nothing_it_had_stored(fresh: Callable[[], Path]) -> None:
    between = 0
    for seed in range(THOROUGH * 60):
        if seed >= THOROUGH * 20 and between:
            break
        if seed % 12 == 0:
            folder, stored = fresh(), set[str]()
        stored.update(killed(workers.solve_and_store, folder, seed))
        registry = opened_and_sound(folder)
        assert stored <= {record.id for record in registry.patches()}
        between += bool(upkeep.plan_collection(registry, grace=-60).unneeded) or workers.leftovers(registry.blobs) > 0
    assert between > 0, "no kill fell between a blob and its row, so this has shown little"


def test_a_killed_changer_of_recipes_loses_no_revision(fresh: Callable[[], Path]) -> None:
    for seed in range(THOROUGH * 16):
        if seed % 8 == 0:
            folder, last = fresh(), 0
        told = [int(number) for number in killed(workers.change_recipes, folder, seed)]
        registry = opened_and_sound(folder)
        revision = registry.recipe("r").revision
        assert last <= max([last, *told]) <= revision <= max([last, *told]) + 1
        assert {line.revision for line in registry.log("r")} == set(range(1, revision + 1))
        last = revision


def test_a_killed_collector_and_a_killed_writer_beside_it_lose_nothing(fresh: Callable[[], Path]) -> None:
    for seed in range(THOROUGH * 9):
        if seed % 5 == 0:
            folder, stored = fresh(), set[str]()
        victims = [Victim(work, folder, seed) for work in (workers.collect_garbage, workers.solve_and_store)]
        pace = min([1.0, *(victim.hear() for victim in victims)])
        for victim in random.Random(seed).sample(victims, 2):
            time.sleep(random.Random(seed).uniform(0, pace))
            stored.update(word for word in victim.kill() if word != "collected")
        assert stored <= {record.id for record in opened_and_sound(folder).patches()}


@pytest.fixture
def shared(template: Path, tmp_path: Path) -> Registry:
    """A registry whose patches and recipe lie beside it, pushed to a folder and exported to a file."""
    shutil.copytree(template, tmp_path / "source")
    registry = Registry.open(tmp_path / "source", create=False)
    registry.create_recipe("r", "small")
    for record in registry.patches():
        lay(registry, "r", record.id, 1.0)
    push(registry, tmp_path / "shared")
    export(registry, tmp_path / "shared.overpaint")
    return registry


@pytest.mark.parametrize("work", [workers.pull_everything, workers.import_everything])
def test_a_killed_pull_is_finished_by_the_next(shared: Registry, stocked: Path, tmp_path: Path, work: Work) -> None:
    folder = tmp_path / "registry"
    seconds = duration(work, Path(shutil.copytree(stocked, folder)))
    for seed in range(THOROUGH * 6):
        shutil.rmtree(folder)
        shutil.copytree(stocked, folder)
        done = killed(work, folder, seed, seconds)
        registry = opened_and_sound(folder)
        assert set(done) - {"begun"} <= {record.id for record in registry.patches()}
        assert bool(registry.recipes()) <= (len(registry.patches()) == 6), "a recipe comes last"
        if seed % 4 == 0:
            pull(registry, tmp_path / "shared", PullRequest())
            assert opened_and_sound(folder).log("r") == shared.log("r")
            assert len(registry.patches()) == 6


def test_a_killed_push_or_export_leaves_nothing_half_done_under_its_name(
    fresh: Callable[[], Path], stocked: Path, tmp_path: Path
) -> None:
    seconds = 1.5 * duration(workers.push_and_export, fresh())
    for seed in range(1, THOROUGH * 7 + 1):
        folder = fresh()
        told = killed(workers.push_and_export, folder, seed, seconds)[1:]
        pushed = [path for path in tmp_path.glob("pushed *") if (path / "index.json").exists()]
        exported = [path for path in tmp_path.glob("exported *") if path.suffix != ".partial"]
        assert set(told) <= {path.name for path in (*pushed, *exported)}
        for path in (*pushed[-1:], *exported[-1:]):
            with _copy(stocked, tmp_path / "other") as other:
                take = pull if path.is_dir() else import_file
                assert len(take(other, path, PullRequest()).new) == 6
        for path in tmp_path.glob("*ed *"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _copy(template: Path, folder: Path) -> Iterator[Registry]:
    shutil.copytree(template, folder)
    yield Registry.open(folder, create=False)
    shutil.rmtree(folder)


def test_a_killed_upgrade_is_finished_by_the_next(tmp_path: Path) -> None:
    thaw(tmp_path / "old", "0001")
    folder = tmp_path / "registry"
    seconds = duration(workers.upgrade, Path(shutil.copytree(tmp_path / "old", folder)))
    for seed in range(THOROUGH * 6):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)
        told = killed(workers.upgrade, folder, seed, seconds)[1:]
        with closing(sqlite3.connect(folder / "registry.db")) as connection:
            ((revision,),) = connection.execute("SELECT version_num FROM alembic_version")
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert revision in ("0001", models.HEAD)
        assert revision == models.HEAD or told == []
        assert Registry.upgrade(folder) == revision
        registry = Registry.open(folder, create=False)
        assert {registry.blob(record).decode() for record in registry.patches()} == set(LABELS)


def test_the_victims_make_patches_for_the_base_of_the_template() -> None:
    assert FINGERPRINT.encode() in workers.make_patch_file("any")
