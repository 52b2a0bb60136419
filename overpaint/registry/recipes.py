"""The registry's recipes: what lies on which base, changed only together with a line of history."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from overpaint.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import models, texts
from overpaint.registry.changes import Note, change, exchange, refuse_if_moved, revise
from overpaint.registry.names import checked_id, checked_name, checked_number
from overpaint.registry.past import differences, find_revision, laid_at, laid_now, record_at, records_now
from overpaint.registry.queries import added, find, lookup, patches_by_id
from overpaint.registry.records import Difference, Due, HistoryRecord, Laid, PatchRecord, RecipeRecord
from overpaint.registry.shelf import Shelf


class Recipes(Shelf):
    """Sets of patches on bases. Where a method reads, NAME@NUMBER and NAME@TAG mean an earlier revision."""

    def create_recipe(self, name: str, base: str) -> RecipeRecord:
        """Make an empty recipe. Raises AlreadyExists if the name is taken, NotFound for an unknown base."""
        with self._database.writing() as session:
            return record_at(session, _created(session, name, find(session, models.Base, base)), 0)

    def ensure_recipe(self, name: str, base: str) -> RecipeRecord:
        """The recipe of that name, made if needed. Raises AlreadyExists if it lies on another base."""
        with self._database.writing() as session:
            wanted = find(session, models.Base, base)
            row = lookup(session, models.Recipe, name) or _created(session, name, wanted)
            if row.base_id != wanted.id:
                raise AlreadyExists(
                    f"recipe {row.name!r} is there already, on base {row.base.name!r} and not on {wanted.name!r}"
                )
            return record_at(session, row, row.revision)

    def has_recipe(self, name: str) -> bool:
        """Whether there is a recipe of that name."""
        with self._database.reading() as session:
            return lookup(session, models.Recipe, name) is not None

    def recipes(self, *, deleted: bool = False) -> list[RecipeRecord]:
        """All recipes in the order they were made, or those that were deleted."""
        gone = models.Recipe.deleted_at
        query = select(models.Recipe).where(gone.is_not(None) if deleted else gone.is_(None))
        together = (selectinload(models.Recipe.patches), selectinload(models.Recipe.tags))
        with self._database.reading() as session:
            rows = session.scalars(query.options(*together).order_by(models.Recipe.id)).all()
            return records_now(session, rows)

    def recipe(self, key: str) -> RecipeRecord:
        """The recipe NAME as it is, or as it was at NAME@NUMBER or NAME@TAG. Raises NotFound."""
        with self._database.reading() as session:
            return record_at(session, *find_revision(session, key))

    def patches_on(self, key: str) -> list[tuple[PatchRecord, Laid]]:
        """What lies on a recipe (or lay, at a revision), sorted by patch id. Raises NotFound."""
        with self._database.reading() as session:
            recipe, number = find_revision(session, key)
            laid = laid_now(recipe) if number == recipe.revision else laid_at(session, recipe, number)
            rows = patches_by_id(session, laid)
            return [(PatchRecord.of(rows[each]), laid[each]) for each in sorted(laid)]

    def recipes_with(self, patch_id: str) -> list[tuple[str, Laid]]:
        """The names of the recipes on which a patch lies, and how."""
        living = (models.RecipePatch.patch_id == patch_id) & models.Recipe.deleted_at.is_(None)
        query = select(models.Recipe.name, models.RecipePatch).join(models.RecipePatch.recipe).where(living)
        with self._database.reading() as session:
            rows = session.execute(query.order_by(models.Recipe.id))
            return [(name, Laid(row.patch_id, row.strength, row.until)) for name, row in rows]

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
        until: date | None = None,
        expected: int | None = None,
    ) -> int:
        """Set one patch to `strength` in a recipe, or take it out if None, and return the revision that this made.

        The change and its line of history are one transaction. `until` is the day on which the patch lapses, None for
        never. `expected` is the revision that the digests were worked out for; RecipeMoved if somebody else was faster.
        Raises NotFound for an unknown recipe or patch or when taking out what is not there, AlreadyExists when the patch
        lies there like this, and OverpaintError for a strength that is not finite or a patch of another base.
        """
        after = None if strength is None else Laid(patch_id, checked_number(strength, "a strength"), until)
        with self._database.writing() as session:
            recipe = find(session, models.Recipe, name)
            refuse_if_moved(recipe, expected)
            patch = session.get(models.Patch, checked_id(patch_id))
            if patch is None:
                raise NotFound(f"no patch has the id {patch_id}; give the full id, as `Registry.patch` returns it")
            return change(session, recipe, patch, after, Note(why, who, digest_before, digest_after))

    def exchange_patches(self, name: str, new: Mapping[str, str], note: Note, *, expected: int | None = None) -> int:
        """Lay patches in the place of others, as those lay, and return the revision that this made.

        `new` has their ids by the others'. Raises NotFound, AlreadyExists for a patch that would lie there twice,
        OverpaintError for one of another base, RecipeMoved as `change_recipe` does.
        """
        with self._database.writing() as session:
            recipe = find(session, models.Recipe, name)
            refuse_if_moved(recipe, expected)
            return exchange(session, recipe, new, note)

    def checkout_recipe(self, name: str, number: int, note: Note, *, expected: int | None = None) -> int:
        """Lay on a recipe exactly what lay on it at revision `number`, and return the revision that this made.

        Raises NotFound for an unknown recipe or revision, AlreadyExists when the same lies there now, RecipeMoved as
        `change_recipe` does.
        """
        with self._database.writing() as session:
            recipe = find(session, models.Recipe, name)
            refuse_if_moved(recipe, expected)
            _, number = find_revision(session, f"{recipe.name}@{number}")
            now, then = laid_now(recipe), laid_at(session, recipe, number)
            wanted = {each: then.get(each) for each in {**now, **then} if now.get(each) != then.get(each)}
            if not wanted:
                raise AlreadyExists(f"recipe {recipe.name!r} holds what it held at revision {number}; nothing to do")
            return revise(session, recipe, wanted, "checkout", note, f"{recipe.name}@{number}")

    def copy_recipe(self, key: str, name: str, *, why: str, who: str) -> RecipeRecord:
        """Make the recipe `name` with what lies on another, or lay at a revision.

        Raises NotFound for an unknown recipe or revision, AlreadyExists if the name is taken.
        """
        with self._database.writing() as session:
            source, number = find_revision(session, key)
            record = record_at(session, source, number)
            copy = _created(session, name, source.base)
            note = Note(why, who, source.base.fingerprint, record.digest)
            revise(session, copy, {each.patch: each for each in record.laid}, "copy", note, f"{source.name}@{number}")
            session.refresh(copy)
            return record_at(session, copy, copy.revision)

    def delete_recipe(self, name: str, *, why: str, who: str) -> None:
        """Take a recipe off the lists; its name is free again, its history stays. Raises NotFound."""
        with self._database.writing() as session:
            recipe = find(session, models.Recipe, name)
            digest = record_at(session, recipe, recipe.revision).digest
            revise(session, recipe, {}, "delete", Note(why, who, digest, digest))
            recipe.deleted_at = models.now()

    def undelete_recipe(self, name: str, *, why: str, who: str) -> RecipeRecord:
        """Bring back the recipe of that name that was deleted last. Raises NotFound, AlreadyExists if the name is taken."""
        with self._database.writing() as session:
            _refuse_taken(session, name)
            gone = _deleted(session, name)
            if not gone:
                raise NotFound(f"no deleted recipe was called {name!r}; see `overpaint recipe list --deleted`")
            recipe = gone[-1]
            recipe.deleted_at = None
            digest = record_at(session, recipe, recipe.revision).digest
            revise(session, recipe, {}, "undelete", Note(why, who, digest, digest))
            return record_at(session, recipe, recipe.revision)

    def log(self, name: str, *, revision: int | None = None, deleted: bool = False) -> list[HistoryRecord]:
        """Every change of a recipe, oldest first, or those of one revision. Raises NotFound.

        With `deleted`, those of the recipes that were deleted under that name, one recipe after the other.
        """
        with self._database.reading() as session:
            recipes = _deleted(session, name) if deleted else [find(session, models.Recipe, name)]
            if not recipes:
                raise NotFound(f"no deleted recipe was called {name!r}; see `overpaint recipe list --deleted`")
            return [line for recipe in recipes for line in _lines(session, recipe, revision)]

    def diff(self, before: str, after: str) -> list[Difference]:
        """Every patch that does not lie on both recipes (or revisions) alike, by concept. Raises NotFound."""
        with self._database.reading() as session:
            records = [record_at(session, *find_revision(session, key)) for key in (before, after)]
            return differences(session, *records)

    def due(self, on: date, *, recipe: str | None = None) -> list[Due]:
        """What lies on recipes (or one) though its day had come by `on`; the longest overdue first. Raises NotFound."""
        query = (
            select(models.Recipe.name, models.Concept.name, models.RecipePatch.patch_id, models.RecipePatch.until)
            .join(models.RecipePatch.recipe)
            .join(models.RecipePatch.patch)
            .join(models.Patch.concept)
            .where(models.RecipePatch.until <= on, models.Recipe.deleted_at.is_(None))
            .order_by(models.RecipePatch.until, models.Recipe.name, models.Concept.name, models.RecipePatch.patch_id)
        )
        with self._database.reading() as session:
            if recipe is not None:
                query = query.where(models.Recipe.id == find(session, models.Recipe, recipe).id)
            return [Due(name, concept, patch_id, day) for name, concept, patch_id, day in session.execute(query) if day]


def _created(session: Session, name: str, base: models.Base) -> models.Recipe:
    _refuse_taken(session, name)
    _refuse_revision(session, name)
    row = added(session, models.Recipe(name=checked_name(name, "recipe"), base=base))
    texts.keep_recipe(session, row)
    return row


def _refuse_taken(session: Session, name: str) -> None:
    known = lookup(session, models.Recipe, name)
    if known is not None:
        raise AlreadyExists(f"recipe {known.name!r} is there already, on base {known.base.name!r}")


def _refuse_revision(session: Session, name: str) -> None:
    """A new recipe called safe@3 would be taken for revision 3 of the recipe safe."""
    other, at, mark = name.rpartition("@")
    if at and other.strip() and lookup(session, models.Recipe, other) is not None:
        raise OverpaintError(
            f"{name!r} means the recipe {other!r} at revision {mark!r}, which cannot be changed; change {other!r} itself, "
            "or give a new recipe another name"
        )


def _deleted(session: Session, name: str) -> list[models.Recipe]:
    """The deleted recipes of that name, in the order they were deleted."""
    gone = models.Recipe.deleted_at
    query = select(models.Recipe).where(models.Recipe.name == checked_name(name, "recipe"), gone.is_not(None))
    return list(session.scalars(query.order_by(gone, models.Recipe.id)))


def _lines(session: Session, recipe: models.Recipe, number: int | None) -> list[HistoryRecord]:
    query = select(models.Revision).where(models.Revision.recipe_id == recipe.id).order_by(models.Revision.number)
    if number is not None:
        query = query.where(models.Revision.number == number)
    changes = selectinload(models.Revision.changes).joinedload(models.RevisionPatch.patch)
    found = session.scalars(query.options(changes))
    return [HistoryRecord.of(row, each) for row in found for each in row.changes or (None,)]
