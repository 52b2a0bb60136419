"""What other processes do to a registry; kept apart from the tests, so that they need not import pytest for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NoReturn

from overpaint.core import atomic
from overpaint.registry import Registry, models
from overpaint.registry.schema import connect
from overpaint.registry.store import BlobStore

from .contents import add_patch, lay


def write_much(location: str | Path, writer: int, times: int) -> list[tuple[str, str]]:
    """Write in turn what nobody else writes, what everybody writes, and a line of one history; tell what was done."""
    registry, own = Registry.open(location, create=False), add_patch(Registry.open(location), f"of {writer}").id
    done = [("own patch", f"of {writer}")]
    for turn in range(1, times):
        if turn % 4 == 0:
            label = f"{turn} of {writer}"
            add_patch(registry, label)
            done.append(("own patch", label))
        elif turn % 4 == 1:
            add_patch(registry, f"shared {turn}")
            done.append(("shared patch", f"shared {turn}"))
        elif turn % 8 == 2:
            registry.create_recipe(f"recipe {turn}", "small", exist_ok=True)
            done.append(("recipe", f"recipe {turn}"))
        else:
            lies = own in dict(registry.recipe("r").patches)
            done.append(("revision", str(lay(registry, "r", own, None if lies else 1.0))))
    return done


def make(location: str | Path) -> int:
    """Open or make a registry; tell how many bases it has."""
    return len(Registry.open(location).bases())


def upgrade(location: str | Path) -> str:
    return Registry.upgrade(location)


def die_between_blob_and_row(folder: Path) -> None:
    registry = Registry.open(folder)
    put = BlobStore.put

    def put_and_die(store: BlobStore, *parts: bytes | memoryview) -> NoReturn:
        put(store, *parts)
        _die()

    setattr(BlobStore, "put", put_and_die)  # noqa: B010
    add_patch(registry, "one")


def die_before_commit(folder: Path) -> None:
    with connect(folder, create=False).writing() as session:
        session.add(models.BaseRow(name="ghost", source="", layout="", fingerprint=""))
        session.flush()
        _die()


def die_while_copying(folder: Path) -> None:
    """In an upgrade, when the copy is written but not yet durable."""
    vars(atomic)["sync"] = lambda path: _die()
    Registry.upgrade(folder)


def die_while_migrating(folder: Path) -> None:
    """In an upgrade, when some tables are copied and others are not."""
    from alembic import op

    def drop_and_die(*args: Any, **options: Any) -> NoReturn:
        drop(*args, **options)
        _die()

    drop, op.drop_table = op.drop_table, drop_and_die
    Registry.upgrade(folder)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")
