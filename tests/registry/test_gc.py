"""Garbage is collected: never what a patch needs, never what a writer is about to need."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from overpaint.registry import Registry, upkeep
from overpaint.registry.store import PatchFiles
from overpaint.registry.upkeep import DAY, CannotTell, Collected, collect, plan_collection, verify

from .contents import add_patch
from .patch_maker import id_of, keep, numbers, patch_file
from .store_contract import name_of


def age(registry: Registry, digest: str, days: float) -> None:
    moment = time.time() - days * DAY
    os.utime(registry.folder / name_of(digest), (moment, moment))


def old_blob(registry: Registry, data: bytes, days: float = 30) -> str:
    digest = registry.blobs.put(data)
    age(registry, digest, days)
    return digest


def age_everything(registry: Registry) -> None:
    for digest in registry.blobs.digests():
        age(registry, digest, 30)


def test_what_no_patch_needs_is_removed_and_the_rest_is_not(registry: Registry) -> None:
    shared = numbers("shared", 8)
    files = [patch_file(str(n), {"unet/shared": shared, "unet/own": numbers(n, 4)}) for n in range(3)]
    registry.blobs.put(files[0])
    for file in files:
        keep(registry, file)
    add_patch(registry, "whole")
    garbage = old_blob(registry, b"garbage")
    age_everything(registry)
    before = set(registry.blobs.digests())
    planned = plan_collection(registry)
    assert [blob.digest for blob in planned.unneeded] == [garbage]
    assert (planned.needed, planned.young, planned.nbytes) == (len(before) - 1, 0, len(b"garbage"))
    done = collect(registry, planned)
    assert (done.removed, done.nbytes, done.spared) == (1, len(b"garbage"), 0)
    assert set(registry.blobs.digests()) == before - {garbage}
    assert [registry.blob(record) for record in registry.patches()[:3]] == files


def test_a_plan_that_was_stopped_goes_on_and_spares_what_came_meanwhile(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        keep(registry, patch_file(str(number), {"unet/own": numbers(number, 4)}))
    garbage = old_blob(registry, b"garbage")
    seen: list[str] = []

    def stop(step: int, of: int, text: str) -> None:
        seen.append(text)
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_collection(registry, progress=stop)
    for number in range(8, 16):  # some of their ids are among those that were passed already
        keep(registry, patch_file(str(number), {"unet/own": numbers(number, 4)}))
    age_everything(registry)
    read: list[str] = []
    monkeypatch.setattr(PatchFiles, "manifest", counted(PatchFiles.manifest, read))
    planned = plan_collection(registry, resume=True)
    assert not set(read) & {text.split()[1] for text in seen[:5]}
    assert collect(registry, planned).removed == 1
    assert not registry.blobs.exists(garbage)
    assert verify(registry).problems == ()


def counted(method: Any, into: list[str]) -> Any:
    """The method, which also notes the beginning of the id that it is asked for."""

    def asked(files: PatchFiles, id: str) -> Any:
        into.append(id[:12])
        return method(files, id)

    return asked


def test_a_plan_removes_nothing(registry: Registry) -> None:
    garbage = old_blob(registry, b"garbage")
    plan_collection(registry)
    assert registry.blobs.exists(garbage)


def test_the_young_are_left_alone_for_as_long_as_one_says(registry: Registry) -> None:
    for days in (1, 5, 20):
        old_blob(registry, str(days).encode(), days)
    assert [len(plan_collection(registry, grace=grace * DAY).unneeded) for grace in (0, 3, 14, 30)] == [3, 2, 1, 0]
    assert plan_collection(registry, grace=3 * DAY).young == 1


def test_what_was_put_again_since_the_plan_is_spared(registry: Registry) -> None:
    again, gone = old_blob(registry, b"again"), old_blob(registry, b"gone")
    planned = plan_collection(registry)
    registry.blobs.put(b"again")
    done = collect(registry, planned)
    assert (done.removed, done.spared) == (1, 1)
    assert registry.blobs.exists(again)
    assert not registry.blobs.exists(gone)


def test_what_a_new_patch_needs_is_spared_though_it_looks_old(registry: Registry) -> None:
    file = patch_file("one")
    PatchFiles(registry.blobs).put(id_of(file), file)
    age_everything(registry)
    planned = plan_collection(registry)
    assert len(planned.unneeded) == 3
    keep(registry, file)
    age_everything(registry)  # as in a store that does not know when a blob was put again
    done = collect(registry, planned)
    assert (done.removed, done.spared) == (0, 3)
    assert registry.blob(registry.patch("apple")) == file


def test_a_writer_between_blob_and_row_puts_again_what_was_collected(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no grace at all: the collector runs just when the blobs are durable and the row is not written."""
    put, runs = PatchFiles.put, list[Collected]()

    def put_and_collect(files: PatchFiles, id: str, file: bytes) -> None:
        put(files, id, file)
        if not runs:
            age_everything(registry)
            runs.append(collect(registry, plan_collection(registry, grace=0)))

    monkeypatch.setattr(PatchFiles, "put", put_and_collect)
    record = keep(registry, patch_file("one"))
    assert runs[0].removed == 3
    assert registry.blob(record) == patch_file("one")
    assert verify(registry).problems == ()


def test_a_writer_that_waits_for_the_collector_finds_out(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's blobs are durable and it waits for the lock while the collector, which has it, removes them."""
    file = patch_file("one")
    PatchFiles(registry.blobs).put(id_of(file), file)
    age_everything(registry)
    planned = plan_collection(registry, grace=0)
    waiting, writer = threading.Event(), threading.Thread(target=keep, args=(registry, file))
    writing = registry._database.writing

    @contextmanager
    def announced() -> Iterator[Any]:
        if threading.current_thread() is writer:
            waiting.set()
        with writing() as session:
            yield session

    still_old = upkeep._still_old

    def wait_first(*args: Any) -> bool:
        if not writer.is_alive() and not waiting.is_set():
            writer.start()
            assert waiting.wait(20)
            age_everything(registry)
        return still_old(*args)

    monkeypatch.setattr(registry._database, "writing", announced)
    monkeypatch.setattr(upkeep, "_still_old", wait_first)
    assert collect(registry, planned).removed == 3
    writer.join(20)
    assert registry.blob(registry.patch("apple")) == file
    assert verify(registry).problems == ()


def test_many_blobs_are_removed_a_little_at_a_time(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        old_blob(registry, str(number).encode())
    planned = plan_collection(registry)
    monkeypatch.setattr(upkeep, "HOLD", 0.0)
    said: list[int] = []
    assert collect(registry, planned, progress=lambda step, of, text: said.append(step)).removed == 5
    assert said == [0, 1, 2, 3, 4]


def test_old_temporary_files_go_and_young_ones_stay(registry: Registry) -> None:
    folder = registry.folder / "blobs" / "sha256" / "ab"
    folder.mkdir(parents=True)
    for name, days in ((".tmp-old", 2.0), (".tmp-young", 0.5)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - days * DAY,) * 2)
    planned = plan_collection(registry, grace=0)
    assert planned.nbytes == 4
    assert collect(registry, planned).removed == 1
    assert [path.name for path in folder.iterdir()] == [".tmp-young"]


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_nothing_is_removed_while_a_manifest_cannot_be_read(registry: Registry, how: str) -> None:
    record = keep(registry, patch_file("one"))
    old_blob(registry, b"garbage")
    if how == "missing":
        registry.blobs.discard(record.id)
    else:
        path: Path = registry.folder / name_of(record.id)
        path.chmod(0o644)
        path.write_bytes(b"{}")
    with pytest.raises(CannotTell, match=f"{record.id} .apple. is {how}.*overpaint verify"):
        plan_collection(registry)
    keep(registry, patch_file("one"))
    assert len(plan_collection(registry).unneeded) == 1


def test_what_is_in_quarantine_is_never_removed(registry: Registry) -> None:
    digest = registry.blobs.put(b"paint")
    path = registry.folder / name_of(digest)
    path.chmod(0o644)
    path.write_bytes(b"pain")
    registry.blobs.put(b"paint")
    age(registry, digest, 30)
    collect(registry, plan_collection(registry, grace=0))
    assert [file.read_bytes() for file in (registry.folder / "quarantine").rglob("*") if file.is_file()] == [b"pain"]
