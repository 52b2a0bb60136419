"""Where a registry may be: a group's folder, a folder that can only be read, a full disk, a home folder, any system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overpaint.core.atomic import locked
from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.registry import Registry
from overpaint.registry.database import locate
from overpaint.registry.store import BlobStore, open_files

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can act as several users, or mount a disk"
)
OWNER, MEMBER, STRANGER = (20001, 20100), (20002, 20100), (20003, 20200)
"""User and group of three people; two are of one group."""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder of the group 20100, outside of pytest's own, which is closed to others."""
    parent = Path(tempfile.mkdtemp())
    parent.chmod(0o755)
    folder = parent / "shared"
    folder.mkdir()
    os.chown(folder, 0, OWNER[1])
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(parent)


def as_user(who: tuple[int, int], umask: int, act: Callable[[], object]) -> str:
    """What happens when a user does something: the error's text, or nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        message = ""
        try:
            os.setgroups([])
            os.setgid(who[1])
            os.setuid(who[0])
            os.umask(umask)
            act()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writing, message.encode()[:2000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        message = pipe.read()
    os.waitpid(child, 0)
    return message


def add(folder: Path, name: str) -> Callable[[], None]:
    def act() -> None:
        registry = Registry.open(folder)
        registry.blobs.put(name.encode())
        registry.add_concept(Concept(name))

    return act


def names(folder: Path) -> list[str]:
    return [concept.name for concept in Registry.open(folder, create=False).concepts()]


def expect(folder: Path, wanted: list[str]) -> Callable[[], None]:
    def act() -> None:
        assert names(folder) == wanted

    return act


@needs_root
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_a_group_shares_a_registry_in_its_folder(shared: Path, umask: int) -> None:
    folder = shared / "registry"
    assert as_user(OWNER, umask, add(folder, "cat")) == ""
    assert as_user(MEMBER, umask, add(folder, "dog")) == ""
    assert as_user(OWNER, umask, add(folder, "bird")) == ""
    assert as_user(MEMBER, umask, expect(folder, ["cat", "dog", "bird"])) == ""
    assert (folder / "registry.db").stat().st_mode & 0o060 == 0o060


@needs_root
def test_a_reader_without_write_permission_reads_and_leaves_nothing_behind(shared: Path) -> None:
    folder = shared / "registry"
    assert as_user(OWNER, 0o022, add(folder, "cat")) == ""
    folder.chmod(0o2777)  # a stranger can make files here, and may still not change the database
    for act in (expect(folder, ["cat"]), lambda: Registry.open(folder).recipes()):
        assert as_user(STRANGER, 0o022, act) == ""
    assert "is read-only for this user" in as_user(STRANGER, 0o022, add(folder, "dog"))
    assert not [path.name for path in folder.iterdir() if path.name.endswith(("-wal", "-shm"))]
    assert as_user(OWNER, 0o022, add(folder, "bird")) == ""
    folder.chmod(0o755)
    assert as_user(STRANGER, 0o022, expect(folder, ["cat", "bird"])) == ""


@needs_root
def test_a_reader_without_write_permission_sees_what_a_writer_has_just_committed(shared: Path) -> None:
    folder = shared / "registry"
    assert as_user(OWNER, 0o022, add(folder, "cat")) == ""
    registry = Registry.open(folder)
    with registry.reading() as session:  # keeps the write-ahead log from being folded in
        session.connection()
        add(folder, "dog")()
        assert (folder / "registry.db-wal").stat().st_size
        assert as_user(STRANGER, 0o022, expect(folder, ["cat", "dog"])) == ""


def test_a_reader_that_could_take_no_lock_notices_a_change(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    path = registry.folder / "registry.db"
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    def read_while_somebody_writes() -> None:
        with registry.reading() as session:
            session.connection()
            os.utime(path, (1, 1))

    with pytest.raises(OverpaintError, match="was changed while it was being read; run this again"):
        read_while_somebody_writes()


@needs_root
@pytest.mark.parametrize("left", [0, 4096, 12288])
def test_a_full_disk_can_be_read_and_says_so_when_written(registry: Registry, tmp_path: Path, left: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        folder = shutil.copytree(registry.folder, disk / "registry")
        free = os.statvfs(disk)
        (disk / "fill").write_bytes(bytes(free.f_bavail * free.f_frsize - left))
        full = Registry.open(folder, create=False)
        assert (full.bases(), full.concepts()) == (registry.bases(), registry.concepts())
        with pytest.raises(OverpaintError, match=r"the disk that holds .* is full.*; free some space"):
            full.add_concept(Concept("dog"))
        (disk / "fill").unlink()
        full.add_concept(Concept("dog"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert locate("~/registry") == locate(Path("~/registry")) == tmp_path / "registry" / "registry.db"
    assert locate("sqlite:///~/r.db") == tmp_path / "r.db"
    assert open_files("~/place").where == open_files("file://~/place").where == str(tmp_path / "place")
    with pytest.raises(OverpaintError, match="names a home folder that is not known"):
        locate("~nobody-of-that-name/registry")


def test_one_holder_of_a_lock_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked(lock, 0), pytest.raises(TimeoutError), locked(lock, 0):
        pass
    with locked(lock, 0):
        pass


def test_core_and_registry_run_without_the_modules_of_one_system(tmp_path: Path) -> None:
    program = """
import importlib, pkgutil, sys
from pathlib import Path
for name in ("fcntl", "pwd", "grp", "resource", "msvcrt", "termios"):
    sys.modules[name] = None
import overpaint.core, overpaint.registry
for room in (overpaint.core, overpaint.registry):
    for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        importlib.import_module(module.name)
from overpaint.core.concepts import Concept
from overpaint.registry import Registry
from overpaint.registry.store import open_files
from overpaint.workspace.recipe import current_user
registry = Registry.open(Path(sys.argv[1]) / "registry")
registry.add_concept(Concept("cat"))
digest = registry.blobs.put(b"paint")
assert registry.blobs.get(digest) == b"paint"
with open_files(Path(sys.argv[1]) / "place").exclusive() as exclusive:
    assert exclusive
assert current_user()
import overpaint.evaluation.suites.cost
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_writers_of_one_place_wait_for_each_other(tmp_path: Path) -> None:
    store = BlobStore(open_files(tmp_path))
    with store.files.exclusive() as exclusive:
        assert exclusive
        with pytest.raises(TimeoutError), locked(tmp_path / ".lock", 0):
            pass
