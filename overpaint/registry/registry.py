"""The registry: the one object through which bases, concepts, patches and recipes are remembered and found again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from overpaint.concepts import Concept
from overpaint.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import models, schema
from overpaint.registry.changes import RecipeMoved, change
from overpaint.registry.database import Database, connect, locate
from overpaint.registry.names import checked_json, checked_name, checked_note, checked_number
from overpaint.registry.queries import find, find_patch, lookup
from overpaint.registry.records import BaseRecord, HistoryRecord, PatchRecord, RecipeRecord
from overpaint.registry.store import DIGEST, BlobStore

RowT = TypeVar("RowT", bound=models.Row)


class Registry:
    """A folder with `registry.db`, `blobs/` and, once something went bad, `quarantine/`.

    Every method is one transaction. Names are free text; where one is unknown, NotFound names the nearest. A full or
    read-only disk, a damaged database and a writer that does not finish raise OverpaintError.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.folder = database.path.parent
        self.blobs = BlobStore(self.folder)

    @classmethod
    def open(cls, location: str | Path, *, create: bool = True) -> Registry:
        """The registry at `location`, a folder or an sqlite:/// URL; made if nothing is there and `create` allows.

        Raises NotFound if there is none, RegistryVersionError if its schema is older or newer than this program's, and
        OverpaintError if no registry can be there.
        """
        return cls(connect(location, create=create))

    @staticmethod
    def upgrade(location: str | Path) -> str:
        """Bring the registry at `location` to this program's schema, keep a copy, and return the revision it had."""
        return schema.upgrade(Database(locate(location)))

    # Bases

    def add_base(self, name: str, source: Path, layout: str, fingerprint: str) -> BaseRecord:
        """Remember a base under `name`; `source` is kept as it is given. Raises AlreadyExists if the name is taken."""
        with self._database.writing() as session:
            known = lookup(session, models.Base, name)
            if known is not None:
                raise AlreadyExists(f"base {known.name!r} is there already ({known.source}); choose another name")
            row = models.Base(
                name=checked_name(name, "base"),
                source=checked_note(str(source), "the source of a base"),
                layout=checked_name(layout, "layout"),
                fingerprint=checked_name(fingerprint, "fingerprint"),
            )
            return BaseRecord.of(_added(session, row))

    def bases(self) -> list[BaseRecord]:
        """All bases, in the order they came."""
        with self._database.reading() as session:
            return [BaseRecord.of(row) for row in session.scalars(select(models.Base).order_by(models.Base.id))]

    def base(self, name: str) -> BaseRecord:
        """The base of that name. Raises NotFound."""
        with self._database.reading() as session:
            return BaseRecord.of(find(session, models.Base, name))

    # Concepts

    def add_concept(self, concept: Concept) -> None:
        """Remember a concept. Raises AlreadyExists if its name is taken, be it by an equal one."""
        self._keep_concept(concept, equal_is_fine=False)

    def ensure_concept(self, concept: Concept) -> None:
        """Remember a concept unless an equal one is there. Raises AlreadyExists if the name means something else."""
        self._keep_concept(concept, equal_is_fine=True)

    def _keep_concept(self, concept: Concept, *, equal_is_fine: bool) -> None:
        with self._database.writing() as session:
            known = lookup(session, models.Concept, concept.name)
            if known is None:
                name = checked_name(concept.name, "concept")
                definition = checked_json(concept.as_json(), f"the concept {name!r}")
                session.add(models.Concept(name=name, kind=concept.kind, definition=definition))
            elif not (equal_is_fine and _concept(known) == concept):
                raise AlreadyExists(
                    f"concept {known.name!r} is there already, as {known.definition}; choose another name"
                )

    def concepts(self) -> list[Concept]:
        """All concepts, in the order they came."""
        with self._database.reading() as session:
            return [_concept(row) for row in session.scalars(select(models.Concept).order_by(models.Concept.id))]

    def concept(self, name: str) -> Concept:
        """The concept of that name. Raises NotFound."""
        with self._database.reading() as session:
            return _concept(find(session, models.Concept, name))

    # Patches

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
            id=_checked_id(id),
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
        self.blobs.put(blob)  # outside the transaction, so that nobody waits for the disk
        with self._database.writing() as session:
            return PatchRecord.of(session.get(models.Patch, id) or _added(session, row))

    def patches(self, *, concept: str | None = None, base: str | None = None) -> list[PatchRecord]:
        """All patches, or those of one concept or base; oldest first. Raises NotFound for an unknown name."""
        query = select(models.Patch).order_by(models.Patch.solved_at, models.Patch.id)
        with self._database.reading() as session:
            if concept is not None:
                query = query.where(models.Patch.concept_id == find(session, models.Concept, concept).id)
            if base is not None:
                query = query.where(models.Patch.base_id == find(session, models.Base, base).id)
            return [PatchRecord.of(row) for row in session.scalars(query)]

    def patch(self, key: str) -> PatchRecord:
        """The patch that `key` means: its id, four or more digits that only its id begins with, or its concept's name.

        A name means the newest patch of that concept. Raises NotFound, or OverpaintError if several ids begin so.
        """
        with self._database.reading() as session:
            return PatchRecord.of(find_patch(session, key))

    def blob(self, record: PatchRecord) -> bytes:
        """The bytes of a patch, checked. Raises BlobMissing or BlobCorrupt."""
        return self.blobs.get(record.blob)

    # Recipes

    def create_recipe(self, name: str, base: str) -> RecipeRecord:
        """Make an empty recipe. Raises AlreadyExists if the name is taken, NotFound for an unknown base."""
        with self._database.writing() as session:
            known = lookup(session, models.Recipe, name)
            if known is not None:
                raise AlreadyExists(f"recipe {known.name!r} is there already, on base {known.base.name!r}")
            row = models.Recipe(name=checked_name(name, "recipe"), base=find(session, models.Base, base))
            return RecipeRecord.of(_added(session, row))

    def ensure_recipe(self, name: str, base: str) -> RecipeRecord:
        """The recipe of that name, made if needed. Raises AlreadyExists if it lies on another base."""
        with self._database.writing() as session:
            wanted = find(session, models.Base, base)
            row = lookup(session, models.Recipe, name)
            if row is None:
                row = _added(session, models.Recipe(name=checked_name(name, "recipe"), base=wanted))
            elif row.base_id != wanted.id:
                raise AlreadyExists(
                    f"recipe {row.name!r} is there already, on base {row.base.name!r} and not on {wanted.name!r}"
                )
            return RecipeRecord.of(row)

    def recipes(self) -> list[RecipeRecord]:
        """All recipes, in the order they were made."""
        with self._database.reading() as session:
            return [RecipeRecord.of(row) for row in session.scalars(select(models.Recipe).order_by(models.Recipe.id))]

    def recipe(self, name: str) -> RecipeRecord:
        """The recipe of that name. Raises NotFound."""
        with self._database.reading() as session:
            return RecipeRecord.of(find(session, models.Recipe, name))

    def change_recipe(
        self,
        name: str,
        patch_id: str,
        strength: float | None,
        *,
        why: str,
        who: str,
        digest_before: str | None,
        digest_after: str | None,
        expected: tuple[tuple[str, float], ...] | None = None,
    ) -> int:
        """Set one patch to `strength` in a recipe, or take it out if None, and return the revision that this made.

        The change and its line of history are one transaction. `expected` is what the recipe must hold before it, so
        that the digests are those of this very change; RecipeMoved if somebody else was faster. Raises NotFound for an
        unknown recipe or patch or when taking out what is not there, AlreadyExists when the patch is there at this
        strength, and OverpaintError for a strength that is not finite or a patch of another base.
        """
        after = None if strength is None else checked_number(strength, "a strength")
        with self._database.writing() as session:
            recipe = find(session, models.Recipe, name)
            if expected is not None and RecipeRecord.of(recipe).patches != expected:
                raise RecipeMoved(f"recipe {name!r} was changed by somebody else at the same moment; try again")
            patch = session.get(models.Patch, patch_id)
            if patch is None:
                raise NotFound(f"no patch has the id {patch_id}; give the full id, as `Registry.patch` returns it")
            line = change(session, recipe, patch, after)
            line.why, line.who = checked_note(why, "a reason"), checked_note(who, "the name of who did it")
            line.digest_before, line.digest_after = digest_before, digest_after
            return _added(session, line).revision

    def log(self, name: str) -> list[HistoryRecord]:
        """Every change of a recipe, oldest first. Raises NotFound."""
        with self._database.reading() as session:
            recipe = find(session, models.Recipe, name)
            query = select(models.History).where(models.History.recipe_id == recipe.id)
            return [HistoryRecord.of(row) for row in session.scalars(query.order_by(models.History.revision))]


def _added(session: Session, row: RowT) -> RowT:
    session.add(row)
    session.flush()
    return row


def _concept(row: models.Concept) -> Concept:
    return Concept.from_json(json.loads(row.definition))


def _checked_id(id: str) -> str:
    if not DIGEST.fullmatch(id):
        raise OverpaintError(f"the id of a patch is 64 lower-case hexadecimal digits; got {id!r}")
    return id


def _checked_seed(seed: int) -> int:
    if not -(2**63) <= seed < 2**63:
        raise OverpaintError(f"a seed has at most 63 bits, which is what the database can hold; got {seed}")
    return seed
