"""What other processes do to a registry; kept apart from the tests, so that they need not import pytest for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NoReturn

from overpaint.registry import Registry, models
from overpaint.registry.database import connect
from overpaint.registry.store import BlobStore

from .shelf import add_patch, digest_of, lay


def toggle(folder: Path, label: str, times: int) -> list[int]:
    """Add and remove one patch in turn; return the revisions."""
    registry = Registry.open(folder, create=False)
    return [lay(registry, "r", digest_of(label), None if turn % 2 else 1.0) for turn in range(times)]


def make(folder: Path) -> str:
    return str(Registry.open(folder).folder)


def die_between_blob_and_row(folder: Path) -> None:
    registry = Registry.open(folder)
    put = BlobStore.put

    def put_and_die(store: BlobStore, data: bytes) -> NoReturn:
        put(store, data)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive")

    BlobStore.put = put_and_die  # type: ignore[assignment, method-assign]
    add_patch(registry, "one")


def die_before_commit(folder: Path) -> None:
    with connect(folder, create=False).writing() as session:
        session.add(models.Base(name="ghost", source="", layout="", fingerprint=""))
        session.flush()
        os.kill(os.getpid(), signal.SIGKILL)
