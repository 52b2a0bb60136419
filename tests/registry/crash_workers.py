"""What processes do that are killed at random moments. They import no PyTorch, and tell what they have finished."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from overpaint.registry import Registry
from overpaint.registry.sharing.ingest import PullRequest, import_file, pull
from overpaint.registry.sharing.sending import export, push
from overpaint.registry.store import BlobStore
from overpaint.registry.upkeep import collect, plan_collection

from .contents import lay
from .patch_maker import FINGERPRINT, keep, numbers, patch_file

Tell = Callable[[bytes], None]

SHARED = numbers("shared", 16, 4)


def make_patch_file(label: str) -> bytes:
    """A patch file with an array of its own and one that all have."""
    return patch_file(label, {"unet/own": numbers(label, 8, 2), "unet/shared": SHARED}, fingerprint=FINGERPRINT)


def solve_and_store(folder: Path, seed: int, tell: Tell) -> None:
    """Store one new patch after the other; tell each id once its row is written."""
    registry = Registry.open(folder, create=False)
    for number in itertools.count():
        tell(keep(registry, make_patch_file(f"{seed} {number}")).id.encode())


def change_recipes(folder: Path, seed: int, tell: Tell) -> None:
    """Lay patches on a recipe, change their strength and take them off; tell each revision."""
    registry, source = Registry.open(folder, create=False), random.Random(seed)
    registry.create_recipe("r", "small", exist_ok=True)
    ids = [record.id for record in registry.patches()]
    for number in itertools.count():
        patch_id = source.choice(ids)
        lies = patch_id in dict(registry.recipe("r").patches)
        strength = None if lies and source.random() < 0.4 else 1 + seed + number / 1000
        tell(str(lay(registry, "r", patch_id, strength)).encode())


def collect_garbage(folder: Path, seed: int, tell: Tell) -> None:
    """Leave garbage and collect it, with no grace at all, again and again."""
    registry = Registry.open(folder, create=False)
    for number in itertools.count():
        garbage = registry.blobs.put(f"garbage {seed} {number}".encode())
        os.utime(registry.folder / "blobs" / "sha256" / garbage[:2] / garbage, (0, 0))
        collect(registry, plan_collection(registry, grace=0))
        tell(b"collected")


def pull_everything(folder: Path, seed: int, tell: Tell) -> None:
    """Pull from the folder beside the registry; tell the ids of all patches in the end."""
    registry = Registry.open(folder, create=False)
    tell(b"begun")
    for id in pull(registry, folder.parent / "shared", PullRequest()).new:
        tell(id.encode())
    time.sleep(600)


def import_everything(folder: Path, seed: int, tell: Tell) -> None:
    """The same from a file."""
    registry = Registry.open(folder, create=False)
    tell(b"begun")
    for id in import_file(registry, folder.parent / "shared.overpaint", PullRequest()).new:
        tell(id.encode())
    time.sleep(600)


def push_and_export(folder: Path, seed: int, tell: Tell) -> None:
    """Push to a folder and write an archive, both beside the registry."""
    registry = Registry.open(folder, create=False)
    tell(b"begun")
    for number in itertools.count():
        push(registry, folder.parent / f"pushed {seed} {number}")
        tell(f"pushed {seed} {number}".encode())
        export(registry, folder.parent / f"exported {seed} {number}")
        tell(f"exported {seed} {number}".encode())


def upgrade(folder: Path, seed: int, tell: Tell) -> None:
    """Bring an older registry to this program's schema."""
    tell(b"begun")
    Registry.upgrade(folder)
    tell(b"upgraded")
    time.sleep(600)


def leftovers(store: BlobStore) -> int:
    """How many temporary files killed writers have left."""
    return len(list(store.leftovers()))
