"""Garbage: blobs that no patch needs, left by writers that were killed. First a plan, then the plan is carried out.

A writer makes its blobs durable before it writes the row that names them, so a blob that nothing names may be one whose
row is still to come. Two things keep it safe. Blobs younger than a grace period are left alone. And blobs are removed only
while the database's write lock is held, under which a writer looks once more whether its blobs are there before it
commits its row; if they are gone, it puts them again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import Progress, silent
from overpaint.registry.integrity import PAGE, StoredPatch, patch_rows
from overpaint.registry.ledger import ledger
from overpaint.registry.registry import Registry
from overpaint.registry.store import Blob, BlobCorrupt, BlobMissing, FileInfo, PatchFiles

LEDGER = "gc.partial"
"""The file in a registry's folder by which a plan goes on where it was."""
DAY = 86_400.0
GRACE = 14 * DAY
"""Seconds that a blob may lie unneeded: longer than anybody's import takes."""
TEMPORARY_GRACE = DAY
"""Seconds that a temporary file is left alone whatever the grace period: its writer may be at work."""
HOLD = 0.5
"""Seconds for which other writers are kept waiting at a time."""


class CannotTell(OverpaintError):
    """A registry in which it cannot be known what is needed."""


@dataclass(frozen=True)
class GarbagePlan:
    """What would be removed, and what there is beside it; `cutoff` is in seconds since 1970."""

    cutoff: float
    patches: frozenset[str]
    needed: int
    young: int
    unneeded: tuple[Blob, ...]
    leftovers: tuple[FileInfo, ...]

    @property
    def nbytes(self) -> int:
        """Size of all that would be removed, in bytes."""
        return sum(blob.nbytes for blob in self.unneeded) + sum(file.nbytes for file in self.leftovers)


@dataclass(frozen=True)
class Collected:
    """What was removed; `spared` blobs were in the plan, but somebody has put or needed them since."""

    removed: int
    nbytes: int
    spared: int


def plan(registry: Registry, *, grace: float = GRACE, resume: bool = False, progress: Progress = silent) -> GarbagePlan:
    """Find every blob that no patch needs and that was last put more than `grace` seconds ago. Nothing is removed.

    With `resume`, manifests that a plan which was stopped has read are not read again. Raises CannotTell when the manifest
    of a patch is missing or damaged, because then nobody knows its arrays.
    """
    cutoff, files = time.time() - grace, PatchFiles(registry.blobs)
    with ledger(registry.folder / LEDGER, resume=resume) as book:
        done, of = book.totals()[0], registry.count_patches()
        for step, row in enumerate(patch_rows(registry, book.last), done + 1):
            progress(step, max(step, of), f"patch {row.id[:12]} ({row.concept})")
            for digest in needed_by(files, [row]):
                book.blob(digest)
            book.patch(row.id)
            if step % PAGE == 0:
                book.save()
        needed, young, unneeded = 0, 0, list[Blob]()
        for blob in registry.blobs.blobs():
            if book.has(blob.digest):
                needed += 1
            elif blob.modified >= cutoff:  # put since the plan was begun, at the latest
                young += 1
            else:
                unneeded.append(blob)
        leftovers = [each for each in registry.blobs.leftovers() if each.modified < time.time() - TEMPORARY_GRACE]
        return GarbagePlan(cutoff, frozenset(book.patches()), needed, young, tuple(unneeded), tuple(leftovers))


def needed_by(files: PatchFiles, rows: Iterable[StoredPatch]) -> Iterator[str]:
    """The digests of every blob that these patches consist of. Raises CannotTell."""
    for row in rows:
        yield row.blob
        if row.id == row.blob or not files.blobs.exists(row.id):
            if not files.blobs.exists(row.blob):
                raise _cannot_tell(row, "missing")
            continue
        yield row.id
        try:
            yield from (array.digest for array in files.manifest(row.id).arrays)
        except (BlobCorrupt, BlobMissing) as error:
            raise _cannot_tell(row, "damaged") from error


def collect(registry: Registry, planned: GarbagePlan, *, progress: Progress = silent) -> Collected:
    """Remove what a plan names, except for what was put again or came to be needed since. May be killed at any moment."""
    for each in planned.leftovers:
        registry.blobs.files.remove(each.name)
    removed, nbytes, spared = len(planned.leftovers), sum(file.nbytes for file in planned.leftovers), 0
    waiting = list(reversed(planned.unneeded))
    while waiting:
        progress(len(planned.unneeded) - len(waiting), len(planned.unneeded), "collecting")
        with registry.without_writers():
            new = [row for row in patch_rows(registry) if row.id not in planned.patches]
            needed = set(needed_by(PatchFiles(registry.blobs), new))
            for blob in _for_a_moment(waiting):
                if blob.digest in needed or not _still_old(registry, blob, planned.cutoff):
                    spared += 1
                else:
                    registry.blobs.discard(blob.digest)
                    removed, nbytes = removed + 1, nbytes + blob.nbytes
    return Collected(removed, nbytes, spared)


def _for_a_moment(waiting: list[Blob]) -> Iterator[Blob]:
    """Take blobs from the end of a list until other writers have waited long enough, at least one."""
    until = time.monotonic() + HOLD
    while waiting:
        yield waiting.pop()
        if time.monotonic() >= until:
            return


def _still_old(registry: Registry, blob: Blob, cutoff: float) -> bool:
    """Whether nobody has put the blob again since the plan was made."""
    info = registry.blobs.find(blob.digest)
    return info is not None and info.modified < cutoff


def _cannot_tell(row: StoredPatch, how: str) -> CannotTell:
    return CannotTell(
        f"the manifest of patch {row.id} ({row.concept}) is {how}, so nobody knows which blobs it needs; nothing was "
        "removed. Run `overpaint verify`, then import or solve that patch again, and collect after that"
    )
