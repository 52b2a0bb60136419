"""The registry's patches: rows that name blobs."""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from overpaint.errors import OverpaintError
from overpaint.registry import models, texts
from overpaint.registry.names import checked_id, checked_json, checked_name, checked_number, checked_tag
from overpaint.registry.queries import added, find, find_patch
from overpaint.registry.records import PatchRecord
from overpaint.registry.shelf import Shelf
from overpaint.registry.store import PatchFiles

TRIES = 100
"""How often the bytes of a patch are put again when a collector of garbage keeps being faster."""


class Patches(Shelf):
    """Stored deltas with their provenance."""

    def add_patch(
        self,
        *,
        id: str,
        blob: bytes,
        concept: str,
        base: str,
        solver: str,
        kind: str,
        settings: dict[str, Any],
        seed: int,
        seconds: float,
    ) -> PatchRecord:
        """Keep a patch: first its bytes, then the row that names them.

        An id that is there already is returned as it was (and its bytes put back should they have been lost). Raises
        NotFound for an unknown concept or base, OverpaintError for values that cannot be kept.
        """
        row = models.Patch(
            id=checked_id(id),
            solver=checked_name(solver, "solver"),
            kind=checked_name(kind, "kind of patch"),
            settings=checked_json(settings, "the settings of a patch"),
            seed=_checked_seed(seed),
            nbytes=len(blob),
            blob=hashlib.sha256(blob).hexdigest(),
            seconds=checked_number(seconds, "the seconds a solver took"),
        )
        with self._database.reading() as session:
            row.concept_id = find(session, models.Concept, concept).id
            row.base_id = find(session, models.Base, base).id
            known = session.get(models.Patch, id)
            if known is not None and known.blob != row.blob:
                return PatchRecord.of(known)
        files = PatchFiles(self.blobs)
        for _ in range(TRIES):
            files.put(id, blob)  # outside the transaction, so that nobody waits for the disk
            with self._database.writing() as session:
                # Garbage is collected under this very lock, so what is here now stays once the row names it.
                if files.holds(id, row.blob):
                    return PatchRecord.of(session.get(models.Patch, id) or _shelved(session, row))
        raise OverpaintError(
            f"the bytes of patch {id} vanish from {self.blobs.files.where} as soon as they are put there"
        )

    def patches(
        self,
        *,
        concept: str | None = None,
        base: str | None = None,
        solver: str | None = None,
        tag: str | None = None,
        limit: int | None = None,
        offset: int = 0,
        newest_first: bool = False,
    ) -> list[PatchRecord]:
        """All patches, or those of one concept, base, solver or tag; oldest first, unless told otherwise.

        With `limit`, at most so many of them after the first `offset`. Raises NotFound for an unknown concept or base.
        """
        order = (models.Patch.solved_at, models.Patch.id)
        with self._database.reading() as session:
            query = _of(session, select(models.Patch), concept, base, solver, tag)
            query = query.order_by(*(each.desc() for each in order) if newest_first else order)
            return [PatchRecord.of(row) for row in session.scalars(query.limit(limit).offset(offset))]

    def count_patches(
        self,
        *,
        concept: str | None = None,
        base: str | None = None,
        solver: str | None = None,
        tag: str | None = None,
    ) -> int:
        """How many there are. Raises NotFound for an unknown concept or base."""
        with self._database.reading() as session:
            query = _of(session, select(func.count()).select_from(models.Patch), concept, base, solver, tag)
            return session.scalar(query) or 0

    def patch(self, key: str) -> PatchRecord:
        """The patch that `key` means: its id, four or more digits that only its id begins with, or its concept's name.

        A name means the newest patch of that concept. Raises NotFound, or OverpaintError if several ids begin so.
        """
        with self._database.reading() as session:
            return PatchRecord.of(find_patch(session, key))

    def blob(self, record: PatchRecord) -> bytes:
        """The bytes of a patch, checked. Raises BlobMissing or BlobCorrupt."""
        return PatchFiles(self.blobs).get(record.id, record.blob)


def _of(
    session: Session, query: Select[Any], concept: str | None, base: str | None, solver: str | None, tag: str | None
) -> Select[Any]:
    if concept is not None:
        query = query.where(models.Patch.concept_id == find(session, models.Concept, concept).id)
    if base is not None:
        query = query.where(models.Patch.base_id == find(session, models.Base, base).id)
    if solver is not None:
        query = query.where(models.Patch.solver == checked_name(solver, "solver"))
    if tag is not None:
        tagged = select(models.PatchTag.patch_id).where(models.PatchTag.tag == checked_tag(tag))
        query = query.where(models.Patch.id.in_(tagged))
    return query


def _shelved(session: Session, row: models.Patch) -> models.Patch:
    added(session, row)
    texts.keep_patch(session, row)
    return row


def _checked_seed(seed: int) -> int:
    if not -(2**63) <= seed < 2**63:
        raise OverpaintError(f"a seed has at most 63 bits, which is what the database can hold; got {seed}")
    return seed
