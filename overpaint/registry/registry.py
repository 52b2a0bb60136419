"""The registry: the one object through which bases, concepts, patches and recipes are remembered and found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Select, delete, func, select
from sqlalchemy.orm import Session, selectinload

from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.core.names import (
    checked_id,
    checked_json,
    checked_name,
    checked_note,
    checked_number,
    checked_page,
    checked_seed,
    checked_tag,
    checked_texts,
    quoted,
    shown,
    sought_name,
)
from overpaint.registry import models, queries, schema
from overpaint.registry.database import Database, database_at
from overpaint.registry.history import (
    MergeOutcome,
    Note,
    append_revisions,
    change,
    check_changes,
    compare_histories,
    differences,
    entries_at,
    entries_now,
    exchange,
    find_revision,
    record_at,
    records_now,
    refuse_stale,
    revise,
    revisions_of,
)
from overpaint.registry.queries import (
    KIND,
    SOLVER,
    TAG,
    added,
    find,
    find_patch,
    lookup,
    mentions,
    patches_by_id,
    same_bases,
)
from overpaint.registry.records import (
    BaseRecord,
    Difference,
    EvaluationRecord,
    ExpiredEntry,
    HistoryRecord,
    PatchRecord,
    PreservedPromptRecord,
    RecipeEntry,
    RecipeHistory,
    RecipeRecord,
    ResultRecord,
    Revision,
    SearchResult,
    TagRecord,
)
from overpaint.registry.store import PatchFiles, bytes_of_patch, open_store


class ConceptDiffers(AlreadyExists):
    """A concept that is known by another description."""


def refusals(pairs: Iterable[tuple[Concept, Concept]]) -> str:
    """For each pair (stored, asked) of descriptions of one concept, the sentence that refuses the second."""
    lines = [
        f"  {known.name}\n    kept here: {_described(known)}\n    asked for: {_described(wanted)}"
        for known, wanted in pairs
    ]
    return "\n".join(["some concepts are known here by another description; --update takes the new one:", *lines])


def _described(concept: Concept) -> str:
    described = {key: value for key, value in concept.as_json().items() if value and key != "name"}
    return json.dumps(described, ensure_ascii=False)


def _row(concept: Concept) -> models.ConceptRow:
    """The row of a concept that may be known. Raises OverpaintError for what the database cannot hold."""
    named = replace(concept, name=sought_name(concept.name, "concept"))
    for prompt in named.prompts:
        checked_note(prompt, f"a prompt of {named.name!r}")
    definition = checked_json(named.as_json(), f"the concept {named.name!r}")
    return models.ConceptRow(name=named.name, kind=named.kind, definition=definition)


def _add_new(session: Session, row: models.ConceptRow) -> None:
    """Names that an older version let pass stay; new ones are checked."""
    checked_name(row.name, "concept")
    _check_words(row.concept)
    session.add(row)


def _check_words(concept: Concept) -> None:
    # An anchor may be nothing; an empty synonym would have the empty prompt erased.
    for word in (*concept.synonyms, *filter(None, [concept.anchor])):
        checked_name(word, f"synonym or anchor of {concept.name!r}")


PAGE = 1000
"""How many patches are looked at while other writers wait."""
TRIES = 100
"""How often the bytes of a patch are put again when a collector of garbage keeps being faster."""


def _filtered(
    session: Session, query: Select[Any], concept: str | None, base: str | None, solver: str | None, tag: str | None
) -> Select[Any]:
    if concept is not None:
        query = query.where(models.PatchRow.concept_id == find(session, models.ConceptRow, concept).id)
    if base is not None:
        query = query.where(models.PatchRow.base_id.in_(same_bases(session, base)))
    if solver is not None:
        query = query.where(models.PatchRow.solver == sought_name(solver, "solver"))
    if tag is not None:
        tagged = select(models.PatchTagRow.patch_id).where(models.PatchTagRow.tag == checked_tag(tag))
        query = query.where(models.PatchRow.id.in_(tagged))
    return query


def _inserted(session: Session, row: models.PatchRow) -> models.PatchRow:
    added(session, row)
    queries.index_patch(session, row)
    return row


def _refuse_needed_base(session: Session, base: models.BaseRow) -> None:
    counts = [
        session.scalar(select(func.count()).select_from(table).where(table.base_id == base.id))
        for table in (models.PatchRow, models.RecipeRow)
    ]
    if any(counts):
        raise OverpaintError(
            f"the base {base.name!r} is needed by {counts[0]} patches and {counts[1]} recipes (deleted ones too); if its "
            f"files are elsewhere now, run `overpaint base move {base.name} FOLDER`"
        )


def _inherit(session: Session, base: models.BaseRow, heir: models.BaseRow) -> None:
    """Give `heir`, the same base by another name, all that `base` has."""
    known = {each.prompt for each in _preserved_of(session, heir)}
    for prompt in _preserved_of(session, base):
        if prompt.prompt not in known:
            session.add(models.PreservedPromptRow(base_id=heir.id, prompt=prompt.prompt, who=prompt.who, at=prompt.at))
    for patch in session.scalars(select(models.PatchRow).where(models.PatchRow.base_id == base.id)).all():
        patch.base = heir
        queries.index_patch(session, patch)
    for recipe in session.scalars(select(models.RecipeRow).where(models.RecipeRow.base_id == base.id)).all():
        recipe.base = heir
        queries.index_recipe(session, recipe)
    session.flush()


def _refuse_needed_patch(session: Session, patch: models.PatchRow) -> None:
    """Every change of a recipe is in its history, so what has no line there is on no recipe."""
    lines = select(models.RevisionPatchRow.revision_id).where(models.RevisionPatchRow.patch_id == patch.id)
    needing = select(models.RecipeRow.name).join(
        models.RevisionRow, models.RevisionRow.recipe_id == models.RecipeRow.id
    )
    names = session.scalars(needing.where(models.RevisionRow.id.in_(lines)).distinct().limit(9)).all()
    if names:
        listed = ", ".join(repr(name) for name in sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
        raise OverpaintError(
            f"patch {patch.id[:12]} ({patch.concept.name}) stays: the history of {listed} needs it, so that every revision "
            "can be restored"
        )


def _checked_time(moment: datetime | None) -> datetime:
    if moment is not None and moment.tzinfo is None:
        raise OverpaintError(f"the time of solving needs a time zone; got {moment.isoformat()}, add +00:00 for UTC")
    return moment or models.now()


def _created(session: Session, name: str, base: models.BaseRow) -> models.RecipeRow:
    row = added(session, models.RecipeRow(name=_new_name(session, name), base=base))
    queries.index_recipe(session, row)
    return row


def _new_name(session: Session, name: str) -> str:
    _refuse_taken(session, name)
    _refuse_revision(session, name)
    return checked_name(name, "recipe")


def _refuse_taken(session: Session, name: str) -> None:
    known = lookup(session, models.RecipeRow, name)
    if known is not None:
        raise AlreadyExists(f"recipe {known.name!r} is there already, on base {known.base.name!r}")


def _refuse_revision(session: Session, name: str) -> None:
    """A new recipe called safe@3 would be taken for revision 3 of the recipe safe."""
    other, at, mark = name.rpartition("@")
    if at and other.strip() and lookup(session, models.RecipeRow, other) is not None:
        raise OverpaintError(
            f"{name!r} means the recipe {other!r} at revision {mark!r}, which cannot be changed; change {other!r} itself, "
            "or give a new recipe another name"
        )


def _deleted(session: Session, name: str) -> list[models.RecipeRow]:
    """The deleted recipes of that name, in the order they were deleted."""
    gone = models.RecipeRow.deleted_at
    query = select(models.RecipeRow).where(models.RecipeRow.name == sought_name(name, "recipe"), gone.is_not(None))
    return list(session.scalars(query.order_by(gone, models.RecipeRow.id)))


def _lines(session: Session, recipe: models.RecipeRow, number: int | None) -> list[HistoryRecord]:
    query = (
        select(models.RevisionRow).where(models.RevisionRow.recipe_id == recipe.id).order_by(models.RevisionRow.number)
    )
    if number is not None:
        query = query.where(models.RevisionRow.number == number)
    changes = selectinload(models.RevisionRow.changes).joinedload(models.RevisionPatchRow.patch)
    rows = session.scalars(query.options(changes))
    return [HistoryRecord.of(row, each) for row in rows for each in row.changes or (None,)]


def _require_any(tags: list[TagRecord]) -> list[TagRecord]:
    if not tags:
        raise OverpaintError("a tag is tied to something; name a patch or a recipe")
    return tags


def _tag_patch(session: Session, key: str, tag: str, who: str) -> TagRecord:
    patch = find_patch(session, key)
    if session.get(models.PatchTagRow, (patch.id, tag)) is not None:
        raise AlreadyExists(f"patch {patch.id[:12]} ({patch.concept.name}) has the tag {tag!r} already")
    row = models.PatchTagRow(patch_id=patch.id, tag=tag, who=who)
    session.add(row)
    _reindex_patch(session, patch)
    return _on_patch(row)


def _tag_recipe(session: Session, key: str, tag: str, who: str) -> TagRecord:
    recipe, number = find_revision(session, key)
    known = session.get(models.RecipeTagRow, (recipe.id, tag))
    if known is not None:
        raise AlreadyExists(
            f"recipe {recipe.name!r} has the tag {tag!r} already, at revision {known.revision}; remove it there first"
        )
    row = models.RecipeTagRow(recipe_id=recipe.id, tag=tag, revision=number, who=who)
    session.add(row)
    _reindex_recipe(session, recipe)
    return _on_recipe(row)


def _untag_patch(session: Session, key: str, tag: str) -> TagRecord:
    patch = find_patch(session, key)
    row = session.get(models.PatchTagRow, (patch.id, tag))
    if row is None:
        raise NotFound(f"patch {patch.id[:12]} ({patch.concept.name}) does not have the tag {tag!r}")
    record = _on_patch(row)
    session.delete(row)
    _reindex_patch(session, patch)
    return record


def _untag_recipe(session: Session, name: str, tag: str) -> TagRecord:
    recipe = find(session, models.RecipeRow, name)
    row = session.get(models.RecipeTagRow, (recipe.id, tag))
    if row is None:
        raise NotFound(f"recipe {recipe.name!r} does not have the tag {tag!r}")
    record = _on_recipe(row)
    session.delete(row)
    _reindex_recipe(session, recipe)
    return record


def _reindex_patch(session: Session, patch: models.PatchRow) -> None:
    session.flush()
    session.refresh(patch, ["tags"])
    queries.index_patch(session, patch)


def _reindex_recipe(session: Session, recipe: models.RecipeRow) -> None:
    session.flush()
    session.refresh(recipe, ["tags"])
    queries.index_recipe(session, recipe)


def _on_patch(row: models.PatchTagRow) -> TagRecord:
    return TagRecord(row.tag, "patch", row.patch_id, None, row.who, row.at)


def _on_recipe(row: models.RecipeTagRow) -> TagRecord:
    return TagRecord(row.tag, "recipe", row.recipe.name, row.revision, row.who, row.at)


def _recipes(
    session: Session, words: Sequence[str], tag: str | None, base_ids: Sequence[int], limit: int | None, offset: int
) -> list[RecipeRecord]:
    query = select(models.RecipeRow).where(models.RecipeRow.deleted_at.is_(None))
    if words:
        mentioned = select(models.RecipeTextRow.recipe_id).where(*mentions(models.RecipeTextRow.text, words))
        query = query.where(models.RecipeRow.id.in_(mentioned))
    if tag is not None:
        tagged = select(models.RecipeTagRow.recipe_id).where(models.RecipeTagRow.tag == checked_tag(tag))
        query = query.where(models.RecipeRow.id.in_(tagged))
    if base_ids:
        query = query.where(models.RecipeRow.base_id.in_(base_ids))
    page = query.options(selectinload(models.RecipeRow.tags)).order_by(models.RecipeRow.id.desc())
    return records_now(session, session.scalars(page.limit(limit).offset(offset)).all())


def _of_subject(session: Session, query: Select[Any], patch: str | None, recipe: str | None) -> Select[Any]:
    if patch is not None:
        query = query.where(models.EvaluationRow.patch_id == find_patch(session, patch).id)
    if recipe is not None:
        row, number = find_revision(session, recipe)
        query = query.where(models.EvaluationRow.recipe_id == row.id, models.EvaluationRow.revision == number)
    return query


def _result(number: int, result: ResultRecord) -> models.EvaluationResultRow:
    what = f"{result.metric} of {result.subject}"
    bounds = (
        None if each is None else checked_number(each, f"a bound of the {what}") for each in (result.low, result.high)
    )
    low, high = bounds
    return models.EvaluationResultRow(
        number=number,
        subject=checked_name(result.subject, "subject of a result"),
        metric=checked_name(result.metric, "metric"),
        value=checked_number(result.value, f"the {what}"),
        low=low,
        high=high,
        n=result.n,
    )


LONGEST_PROMPT = 1000


def _preserved_of(session: Session, base: models.BaseRow) -> list[models.PreservedPromptRow]:
    rows = session.scalars(select(models.PreservedPromptRow).where(models.PreservedPromptRow.base_id == base.id))
    # By code point, which databases do not agree on.
    return sorted(rows, key=lambda row: row.prompt)


def _checked_prompt(prompt: str) -> str:
    text = checked_note(prompt, "a prompt").strip()
    if not text or "\n" in text:
        raise OverpaintError(f"a prompt to preserve is one line with something in it; got {quoted(prompt)}")
    if len(text) > LONGEST_PROMPT:
        raise OverpaintError(
            f"a prompt to preserve has at most {LONGEST_PROMPT} characters; {quoted(text)} has {len(text)}"
        )
    return text


class Registry:
    """A folder with `registry.db`, `blobs/` and, once something went bad, `quarantine/`; or the same with PostgreSQL.

    Every method is one transaction. Names are free text; where one is unknown, NotFound names the nearest. A full or
    read-only disk, a damaged database and a writer that does not finish raise OverpaintError.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.folder = database.folder
        self.blobs = open_store(self.folder)

    @classmethod
    def open(cls, location: str | Path, *, create: bool = True) -> Registry:
        """The registry at `location`: a folder, an sqlite:/// URL, or postgresql://HOST/DATABASE?blobs=FOLDER.

        Made if nothing is there and `create` allows. Raises NotFound if there is none, RegistryVersionError if its schema
        is older or newer than this program's, and OverpaintError if no registry can be there.
        """
        return cls(schema.connect(location, create=create))

    @staticmethod
    def upgrade(location: str | Path) -> str:
        """Bring the registry at `location` to this program's schema and return the revision it had.

        A copy of an SQLite file is kept beside it; of a PostgreSQL database, take one with pg_dump before.
        """
        return schema.upgrade(database_at(location))

    def reading(self) -> AbstractContextManager[Session]:
        """A session for upkeep and statistics: it sees one moment of the database and cannot change it."""
        return self._database.reading()

    def refuse_if_upgraded(self) -> None:
        """Raise RegistryVersionError if another program has upgraded the registry since it was opened."""
        self._database.refuse_if_upgraded()

    @contextmanager
    def without_writers(self) -> Iterator[None]:
        """Within the block nobody else changes a row; what the collector of garbage needs."""
        with self._database.writing():
            yield

    # Bases

    def add_base(self, name: str, source: Path, layout: str, fingerprint: str) -> BaseRecord:
        """Remember a base under `name`; `source` is stored as given. Raises AlreadyExists if the name is taken."""
        with self._database.writing() as session:
            known = lookup(session, models.BaseRow, name)
            if known is not None:
                raise AlreadyExists(f"base {known.name!r} is there already ({known.source}); choose another name")
            row = models.BaseRow(
                name=checked_name(name, "base"),
                source=checked_note(str(source), "the source of a base"),
                layout=checked_name(layout, "layout"),
                fingerprint=checked_name(fingerprint, "fingerprint"),
            )
            return BaseRecord.of(added(session, row))

    def bases(self) -> list[BaseRecord]:
        """All bases, in the order they were added."""
        with self._database.reading() as session:
            return [BaseRecord.of(row) for row in session.scalars(select(models.BaseRow).order_by(models.BaseRow.id))]

    def base(self, name: str) -> BaseRecord:
        """The base of that name. Raises NotFound."""
        with self._database.reading() as session:
            return BaseRecord.of(find(session, models.BaseRow, name))

    def move_base(self, name: str, source: Path, fingerprint: str) -> BaseRecord:
        """Record that a base is at `source` now, where its fingerprint was found to be `fingerprint`.

        Raises NotFound, OverpaintError when it is another base that was found there.
        """
        with self._database.writing() as session:
            row = find(session, models.BaseRow, name)
            if row.fingerprint != fingerprint:
                raise OverpaintError(
                    f"what is at {source} is not the base {row.name!r}: its fingerprint is {fingerprint}, and "
                    f"{row.fingerprint} is needed; name the folder or file that was moved, or add this one as another base"
                )
            row.source = checked_note(str(source), "the source of a base")
            return BaseRecord.of(row)

    def remove_base(self, name: str) -> None:
        """Forget a base and the prompts preserved on it; its files are left alone.

        Where another name has the same fingerprint, patches, recipes and preserved prompts go over to it. Raises NotFound,
        OverpaintError when there is no other name and patches or recipes (deleted ones too) need the base.
        """
        with self._database.writing() as session:
            row = find(session, models.BaseRow, name)
            others = [each for each in same_bases(session, row.name) if each != row.id]
            heir = session.get(models.BaseRow, others[0]) if others else None
            if heir is None:
                _refuse_needed_base(session, row)
            else:
                _inherit(session, row, heir)
            session.execute(delete(models.PreservedPromptRow).where(models.PreservedPromptRow.base_id == row.id))
            session.delete(row)

    # Concepts

    def add_concept(self, concept: Concept, *, exist_ok: bool = False) -> None:
        """Remember a concept. Raises AlreadyExists if its name is taken (with `exist_ok`, only by another description)."""
        row = _row(concept)
        with self._database.writing() as session:
            known = lookup(session, models.ConceptRow, row.name)
            if known is None:
                _add_new(session, row)
            elif not (exist_ok and known.concept == row.concept):
                raise AlreadyExists(
                    f"concept {known.name!r} is there already, as {known.definition}; choose another name"
                )

    def learn_concepts(self, concepts: Iterable[Concept], *, update: bool = False) -> None:
        """Remember many concepts: all of them, or none. One that is there and equal is left alone.

        With `update`, one that is there by another description gets the new one. Raises ConceptDiffers, which shows both
        descriptions of each, without.
        """
        rows = [_row(concept) for concept in concepts]
        with self._database.writing() as session:
            known = {row.name: lookup(session, models.ConceptRow, row.name) for row in rows}
            pairs = [(there, row) for row in rows if (there := known[row.name]) and there.concept != row.concept]
            if pairs and not update:
                raise ConceptDiffers(refusals([(there.concept, row.concept) for there, row in pairs]))
            for there, row in pairs:
                _check_words(row.concept)
                there.kind, there.definition = row.kind, row.definition
                for patch in session.scalars(select(models.PatchRow).where(models.PatchRow.concept_id == there.id)):
                    queries.index_patch(session, patch)
            for row in rows:
                if known[row.name] is None:
                    _add_new(session, row)

    def remove_concept(self, name: str) -> None:
        """Forget a concept. Raises NotFound, OverpaintError while there are patches for it."""
        with self._database.writing() as session:
            row = find(session, models.ConceptRow, name)
            count = session.scalar(
                select(func.count()).select_from(models.PatchRow).where(models.PatchRow.concept_id == row.id)
            )
            if count:
                raise OverpaintError(
                    f"the concept {row.name!r} stays: there {'is 1 patch' if count == 1 else f'are {count} patches'} for it; "
                    "forget those that no recipe needs first (`overpaint patch forget`)"
                )
            session.delete(row)

    def concepts(self, *, limit: int | None = None, offset: int = 0) -> list[Concept]:
        """All concepts, in the order they were added, or `limit` of them after the first `offset`."""
        limit, offset = checked_page(limit, offset)
        query = select(models.ConceptRow).order_by(models.ConceptRow.id).limit(limit).offset(offset)
        with self._database.reading() as session:
            return [row.concept for row in session.scalars(query)]

    def count_concepts(self) -> int:
        """How many there are."""
        with self._database.reading() as session:
            return session.scalar(select(func.count()).select_from(models.ConceptRow)) or 0

    def concept(self, name: str) -> Concept:
        """The concept of that name. Raises NotFound."""
        with self._database.reading() as session:
            return find(session, models.ConceptRow, name).concept

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
        solved_at: datetime | None = None,
    ) -> PatchRecord:
        """Store a patch: first its bytes, then the row that names them.

        `solved_at` is when it was solved, now if None: of a concept's patches the one solved last is the newest, wherever
        that was. An id that is there already is returned as it was (and its bytes put back should they have been lost).
        Raises NotFound for an unknown concept or base, OverpaintError for values that cannot be kept.
        """
        row = models.PatchRow(
            id=checked_id(id),
            solver=checked_name(solver, "solver"),
            kind=checked_name(kind, "kind of patch"),
            settings=checked_json(settings, "the settings of a patch"),
            seed=checked_seed(seed),
            nbytes=len(blob),
            blob=hashlib.sha256(blob).hexdigest(),
            seconds=checked_number(seconds, "the seconds a solver took"),
            solved_at=_checked_time(solved_at),
        )
        with self._database.reading() as session:
            row.concept_id = find(session, models.ConceptRow, concept).id
            row.base_id = find(session, models.BaseRow, base).id
            known = session.get(models.PatchRow, id)
            if known is not None and known.blob != row.blob:
                return PatchRecord.of(known)
        files = PatchFiles(self.blobs)
        for _ in range(TRIES):
            files.put(id, blob)  # outside the transaction, so that nobody waits for the disk
            with self._database.writing() as session:
                # Garbage is collected under this very lock, so what is here now stays once the row names it.
                if files.holds(id, row.blob):
                    return PatchRecord.of(session.get(models.PatchRow, id) or _inserted(session, row))
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
        """All patches, or those of one concept, base, solver or tag; oldest first by default.

        With `limit`, at most so many of them after the first `offset`. Raises NotFound for an unknown concept or base.
        """
        limit, offset = checked_page(limit, offset)
        order = [each.desc() if newest_first else each for each in (models.PatchRow.solved_at, models.PatchRow.id)]
        with self._database.reading() as session:
            # Which patches: an index alone tells, however many are passed over. What is in them: of the page alone.
            page = _filtered(session, select(models.PatchRow.id), concept, base, solver, tag)
            page = page.order_by(*order).limit(limit).offset(offset)
            query = select(models.PatchRow).where(models.PatchRow.id.in_(page)).order_by(*order)
            return [PatchRecord.of(row) for row in session.scalars(query)]

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
            query = _filtered(session, select(func.count()).select_from(models.PatchRow), concept, base, solver, tag)
            return session.scalar(query) or 0

    def patch(self, key: str, *, base: str | None = None) -> PatchRecord:
        """The patch that `key` means: its id, four or more digits that only its id begins with, or its concept's name.

        A name means the newest patch of that concept; with `base`, the newest that was solved for that base. Raises
        NotFound, or OverpaintError if several ids begin so.
        """
        with self._database.reading() as session:
            return PatchRecord.of(find_patch(session, key, base=base))

    def remove_patch(self, key: str, *, dry_run: bool = False) -> PatchRecord:
        """Forget a patch (see `patch` for `key`) with its tags and evaluations; its bytes go when garbage is collected.

        Raises NotFound, OverpaintError when a recipe has it, or had it at a revision (deleted recipes too). With `dry_run`
        that is all it does.
        """
        with self._database.reading() if dry_run else self._database.writing() as session:
            row = find_patch(session, key)
            record = PatchRecord.of(row)
            _refuse_needed_patch(session, row)
            if dry_run:
                return record
            runs = select(models.EvaluationRow.id).where(models.EvaluationRow.patch_id == row.id)
            session.execute(
                delete(models.EvaluationResultRow).where(models.EvaluationResultRow.evaluation_id.in_(runs))
            )
            for table in (models.EvaluationRow, models.PatchTagRow, models.PatchTextRow):
                session.execute(delete(table).where(table.patch_id == row.id))
            session.execute(delete(models.PatchRow).where(models.PatchRow.id == row.id))
            return record

    def whole_patches(self, ids: Iterable[str]) -> set[str]:
        """Which of these patches have their row and all their bytes."""
        with self._database.reading() as session:
            rows = {id: row.blob for id, row in patches_by_id(session, ids).items()}
        files = PatchFiles(self.blobs)
        return {id for id, blob in rows.items() if files.holds(id, blob)}

    def blob(self, record: PatchRecord) -> bytes:
        """The bytes of a patch, checked. Raises BlobMissing or BlobCorrupt."""
        with bytes_of_patch(record.id, record.concept):
            return PatchFiles(self.blobs).get(record.id, record.blob)

    # Recipes and their history

    def create_recipe(self, name: str, base: str, *, exist_ok: bool = False) -> RecipeRecord:
        """Make an empty recipe. Raises AlreadyExists if the name is taken, NotFound for an unknown base.

        With `exist_ok`, the recipe that has the name is returned, and AlreadyExists raised where it is on another base.
        """
        with self._database.writing() as session:
            wanted = find(session, models.BaseRow, base)
            row = (lookup(session, models.RecipeRow, name) if exist_ok else None) or _created(session, name, wanted)
            if row.base.fingerprint != wanted.fingerprint:
                raise AlreadyExists(
                    f"recipe {row.name!r} is there already, on base {row.base.name!r} and not on {wanted.name!r}"
                )
            return record_at(session, row, row.revision)

    def has_recipe(self, name: str) -> bool:
        """Whether there is a recipe of that name."""
        with self._database.reading() as session:
            return lookup(session, models.RecipeRow, name) is not None

    def recipes(self, *, deleted: bool = False, limit: int | None = None, offset: int = 0) -> list[RecipeRecord]:
        """All recipes in the order they were made, or those that were deleted; `limit` and `offset` give a page."""
        limit, offset = checked_page(limit, offset)
        gone = models.RecipeRow.deleted_at
        query = select(models.RecipeRow).where(gone.is_not(None) if deleted else gone.is_(None))
        query = (
            query.options(selectinload(models.RecipeRow.tags)).order_by(models.RecipeRow.id).limit(limit).offset(offset)
        )
        with self._database.reading() as session:
            return records_now(session, session.scalars(query).all())

    def recipe_names(self) -> list[str]:
        """The names of all recipes in the order they were made, without reading what is in them."""
        living = select(models.RecipeRow.name).where(models.RecipeRow.deleted_at.is_(None))
        with self._database.reading() as session:
            return list(session.scalars(living.order_by(models.RecipeRow.id)))

    def recipe(self, key: str) -> RecipeRecord:
        """The recipe NAME as it is, or as it was at NAME@NUMBER or NAME@TAG. Raises NotFound."""
        with self._database.reading() as session:
            return record_at(session, *find_revision(session, key))

    def history(self, name: str) -> RecipeHistory:
        """A recipe with its base, all its revisions and its tags, of one moment. Raises NotFound."""
        with self._database.reading() as session:
            recipe = find(session, models.RecipeRow, name)
            base, tags = BaseRecord.of(recipe.base), tuple(map(_on_recipe, recipe.tags))
            return RecipeHistory(recipe.name, base, recipe.created_at, revisions_of(session, recipe), tags)

    def merge_history(
        self, name: str, base: str, revisions: Sequence[Revision], tags: Iterable[TagRecord], created_at: datetime
    ) -> MergeOutcome:
        """Make the recipe `name` with the history it has elsewhere, or let the one that is here catch up.

        `revisions` are all of its revisions and their patches must be here; tags that are here stay on their revisions.
        Raises HistoriesDiverged when neither history continues the other, NotFound for an unknown base.
        """
        with self._database.writing() as session:
            wanted = find(session, models.BaseRow, base)
            recipe = lookup(session, models.RecipeRow, name)
            outcome: MergeOutcome = "new"
            if recipe is None:
                row = models.RecipeRow(name=checked_name(name, "recipe"), base=wanted, created_at=created_at)
                recipe = added(session, row)
            else:
                ours = revisions_of(session, recipe)
                outcome = compare_histories(recipe.name, ours, recipe.base.fingerprint, revisions, wanted.fingerprint)
            if outcome == "newer here":
                return outcome
            append_revisions(session, recipe, revisions[recipe.revision :])
            for tag in tags:
                if session.get(models.RecipeTagRow, (recipe.id, tag.tag)) is None:
                    key = {"recipe_id": recipe.id, "revision": tag.revision}
                    session.add(models.RecipeTagRow(tag=tag.tag, who=tag.who, at=tag.at, **key))
            _reindex_recipe(session, recipe)
            return outcome

    def patches_on(self, key: str) -> list[tuple[PatchRecord, RecipeEntry]]:
        """The patches of a recipe (now, or at a revision), sorted by id. Raises NotFound."""
        with self._database.reading() as session:
            recipe, number = find_revision(session, key)
            entries = entries_now(recipe) if number == recipe.revision else entries_at(session, recipe, number)
            rows = patches_by_id(session, entries)
            return [(PatchRecord.of(rows[each]), entries[each]) for each in sorted(entries)]

    def recipes_with(self, patch_id: str) -> list[tuple[str, RecipeEntry]]:
        """The names of the recipes with a patch, and its entry in each."""
        living = (models.RecipePatchRow.patch_id == patch_id) & models.RecipeRow.deleted_at.is_(None)
        query = select(models.RecipeRow.name, models.RecipePatchRow).join(models.RecipePatchRow.recipe).where(living)
        with self._database.reading() as session:
            rows = session.execute(query.order_by(models.RecipeRow.id))
            return [(name, RecipeEntry(row.patch_id, row.strength, row.until)) for name, row in rows]

    def change_patches(
        self,
        name: str,
        wanted: Mapping[str, RecipeEntry | None],
        note: Note,
        *,
        expected: int | RecipeRecord | None = None,
    ) -> int:
        """Set patches of a recipe (by full id) as in `wanted`, or remove those that are None, in one revision.

        The change and its lines of history are one transaction; returns the number of the revision. `expected` is the
        revision that the note's digests were computed for: raises StaleRevision if somebody else was faster. Raises NotFound for
        an unknown recipe or patch or when removing what is not there, AlreadyExists when a patch is there like this, and
        OverpaintError for a strength that is not finite or far too large, an expiry that is past, or a patch of another base.
        """
        for patch_id in wanted:
            checked_id(patch_id)
        with self._database.writing() as session:
            recipe = find(session, models.RecipeRow, name)
            refuse_stale(recipe, expected)
            return change(session, recipe, wanted, note)

    def check_entries(self, name: str, base: str, entries: Iterable[RecipeEntry]) -> None:
        """Raise what making a recipe hold these entries would raise, or making a new one of that name on `base`."""
        with self._database.reading() as session:
            recipe = lookup(session, models.RecipeRow, name)
            before = {} if recipe is None else entries_now(recipe)
            if recipe is None:
                _new_name(session, name)
            wanted = {each.patch: each for each in entries if before.get(each.patch) != each}
            check_changes(session, name, find(session, models.BaseRow, base), before, wanted)

    def exchange_patches(
        self, name: str, new: Mapping[str, str], note: Note, *, expected: int | RecipeRecord | None = None
    ) -> int:
        """Replace patches, keeping strength and expiry, and return the revision that this made.

        `new` maps old id to new id. Raises NotFound, AlreadyExists for a patch that would be there twice,
        OverpaintError for one of another base, StaleRevision as `change_patches` does.
        """
        with self._database.writing() as session:
            recipe = find(session, models.RecipeRow, name)
            refuse_stale(recipe, expected)
            return exchange(session, recipe, new, note)

    def checkout_recipe(self, name: str, number: int, note: Note, *, expected: int | RecipeRecord | None = None) -> int:
        """Give a recipe exactly the patches that it had at revision `number`, and return the revision that this made.

        Raises NotFound for an unknown recipe or revision, AlreadyExists when it has the same now, StaleRevision as
        `change_patches` does.
        """
        with self._database.writing() as session:
            recipe = find(session, models.RecipeRow, name)
            refuse_stale(recipe, expected)
            _, number = find_revision(session, f"{recipe.name}@{number}")
            now, then = entries_now(recipe), entries_at(session, recipe, number)
            wanted = {each: then.get(each) for each in {**now, **then} if now.get(each) != then.get(each)}
            if not wanted:
                raise AlreadyExists(f"recipe {recipe.name!r} holds what it held at revision {number}; nothing to do")
            return revise(session, recipe, wanted, "checkout", note, f"{recipe.name}@{number}")

    def copy_recipe(self, key: str, name: str, *, why: str, who: str) -> RecipeRecord:
        """Make the recipe `name` with the patches of another, now or at a revision.

        Raises NotFound for an unknown recipe or revision, AlreadyExists if the name is taken.
        """
        with self._database.writing() as session:
            source, number = find_revision(session, key)
            record = record_at(session, source, number)
            copy = _created(session, name, source.base)
            note = Note(why, who, source.base.fingerprint, record.digest)
            revise(
                session, copy, {each.patch: each for each in record.entries}, "copy", note, f"{source.name}@{number}"
            )
            session.refresh(copy)
            return record_at(session, copy, copy.revision)

    def delete_recipe(self, name: str, *, why: str, who: str) -> None:
        """Take a recipe off the lists; its name is free again, its history stays. Raises NotFound."""
        with self._database.writing() as session:
            recipe = find(session, models.RecipeRow, name)
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
            recipes = _deleted(session, name) if deleted else [find(session, models.RecipeRow, name)]
            if not recipes:
                raise NotFound(f"no deleted recipe was called {name!r}; see `overpaint recipe list --deleted`")
            return [line for recipe in recipes for line in _lines(session, recipe, revision)]

    def diff(self, before: str, after: str) -> list[Difference]:
        """Every patch that differs between two recipes (or revisions), by concept. Raises NotFound."""
        with self._database.reading() as session:
            records = [record_at(session, *find_revision(session, key)) for key in (before, after)]
            return differences(session, *records)

    def due(self, on: date, *, recipe: str | None = None) -> list[ExpiredEntry]:
        """The patches of recipes (or of one) that have expired by `on`; the longest expired first. Raises NotFound."""
        if not isinstance(on, date):
            raise OverpaintError(f"a day is a datetime.date; got {shown(on)}")
        query = (
            select(
                models.RecipeRow.name,
                models.ConceptRow.name,
                models.RecipePatchRow.patch_id,
                models.RecipePatchRow.until,
            )
            .join(models.RecipePatchRow.recipe)
            .join(models.RecipePatchRow.patch)
            .join(models.PatchRow.concept)
            .where(models.RecipePatchRow.until <= on, models.RecipeRow.deleted_at.is_(None))
            .order_by(
                models.RecipePatchRow.until,
                models.RecipeRow.name,
                models.ConceptRow.name,
                models.RecipePatchRow.patch_id,
            )
        )
        with self._database.reading() as session:
            if recipe is not None:
                query = query.where(models.RecipeRow.id == find(session, models.RecipeRow, recipe).id)
            return [
                ExpiredEntry(name, concept, patch_id, day)
                for name, concept, patch_id, day in session.execute(query)
                if day
            ]

    # Tags

    def tag(self, tag: str, *, patches: Iterable[str] = (), recipes: Iterable[str] = (), who: str) -> list[TagRecord]:
        """Tie `tag` to patches and recipes: to all of them, or to none.

        A recipe is tagged as it is now, or as it was at NAME@NUMBER; NAME@TAG means that revision from then on. Raises
        NotFound, and AlreadyExists for what has the tag.
        """
        tag, who = checked_tag(tag, new=True), checked_note(who, "the name of who did it")
        recipes, patches = (
            checked_texts(recipes, "the names of recipes"),
            checked_texts(patches, "the names of patches"),
        )
        with self._database.writing() as session:
            tags = [_tag_recipe(session, key, tag, who) for key in recipes]
            tags += [_tag_patch(session, key, tag, who) for key in patches]
        return _require_any(tags)

    def untag(self, tag: str, *, patches: Iterable[str] = (), recipes: Iterable[str] = ()) -> list[TagRecord]:
        """Untie `tag` from patches and recipes: from all of them, or from none. Raises NotFound."""
        tag = checked_tag(tag)
        recipes, patches = (
            checked_texts(recipes, "the names of recipes"),
            checked_texts(patches, "the names of patches"),
        )
        with self._database.writing() as session:
            removed = [_untag_recipe(session, name, tag) for name in recipes]
            removed += [_untag_patch(session, key, tag) for key in patches]
        return _require_any(removed)

    def tags(self, tag: str | None = None) -> list[TagRecord]:
        """Every tag and what it is on, or one tag; by tag, recipes before patches. Deleted recipes are left out."""
        of_patches = select(models.PatchTagRow).order_by(models.PatchTagRow.at)
        of_recipes = (
            select(models.RecipeTagRow).join(models.RecipeTagRow.recipe).where(models.RecipeRow.deleted_at.is_(None))
        )
        of_recipes = of_recipes.order_by(models.RecipeTagRow.at)
        if tag is not None:
            of_patches = of_patches.where(models.PatchTagRow.tag == checked_tag(tag))
            of_recipes = of_recipes.where(models.RecipeTagRow.tag == checked_tag(tag))
        with self._database.reading() as session:
            records = [_on_recipe(row) for row in session.scalars(of_recipes)]
            records += [_on_patch(row) for row in session.scalars(of_patches)]
        return sorted(records, key=lambda each: each.tag)

    # Search

    def search(
        self,
        text: str = "",
        *,
        kind: str | None = None,
        solver: str | None = None,
        tag: str | None = None,
        base: str | None = None,
        limit: int | None = 50,
        offset: int = 0,
    ) -> SearchResult:
        """What mentions every word of `text` and is of the kind of concept, solver, tag and base asked for.

        Words are looked for also inside longer ones, and capitals do not matter. A patch is found by its concept's name,
        synonyms, anchor and kind, by its own kind, its solver, its base and its tags. A recipe is found by its name, base
        and tags, or by one of the reasons in its history; it has no kind and no solver, so asking for one leaves recipes
        out. Each list is newest first, `limit` long at most, after the first `offset`. Raises OverpaintError when nothing
        is asked for, NotFound for an unknown base.
        """
        limit, offset = checked_page(limit, offset)
        words = sought_name(text, "search").split() if not isinstance(text, str) or text.strip() else []
        if not words and {kind, solver, tag, base} == {None}:
            raise OverpaintError("say what to search for: words, or a kind, a solver, a tag or a base")
        with self._database.reading() as session:
            base_ids = [] if base is None else same_bases(session, base)
            marks = [(KIND, kind), (SOLVER, solver), (TAG, tag and checked_tag(tag))]
            given = [(mark, sought_name(value, "search")) for mark, value in marks if value is not None]
            recipes: list[RecipeRecord] = []
            if kind is None and solver is None:
                recipes = _recipes(session, words, tag, base_ids, limit, offset)
            ids = queries.patches_mentioning(session, words, given, base_ids, limit, offset)
            by_id = patches_by_id(session, ids)
            return SearchResult(tuple(PatchRecord.of(by_id[each]) for each in ids), tuple(recipes))

    def reindex(self) -> int:
        """Bring the search texts up to date, and make their index again; returns how many texts were wrong or missing.

        Other writers take turns with the pages of patches. A text that was lost is found first from then on, as if it were new.
        """
        written, after = 0, None
        while True:
            with self._database.writing() as session:
                some, after = queries.reindex_patches(session, after, PAGE)
                written += some
            if after is None:
                break
        with self._database.writing() as session:
            return written + queries.reindex_recipes(session) + queries.rebuild_pieces(session)

    # Evaluations

    def add_evaluation(
        self,
        *,
        patch: str | None = None,
        recipe: str | None = None,
        digest: str,
        suite: str,
        judge: str,
        seed: int,
        settings: dict[str, Any],
        versions: dict[str, Any],
        seconds: float,
        who: str,
        results: Iterable[ResultRecord],
    ) -> EvaluationRecord:
        """Keep one run on a patch, or on a recipe as it is now or was at NAME@NUMBER.

        Raises NotFound for a patch or recipe that is not there, OverpaintError unless exactly one of them is given and
        every number is finite.
        """
        if (patch is None) == (recipe is None):
            raise OverpaintError("an evaluation is of one patch or of one recipe; name exactly one of them")
        row = models.EvaluationRow(
            digest=checked_name(digest, "digest"),
            suite=checked_name(suite, "suite"),
            judge=checked_name(judge, "judge"),
            seed=seed,
            settings=checked_json(settings, "the settings of an evaluation"),
            versions=checked_json(versions, "the versions of an evaluation"),
            seconds=checked_number(seconds, "the seconds of an evaluation"),
            who=checked_note(who, "the name of who did it"),
        )
        row.results = [_result(number, each) for number, each in enumerate(results)]
        with self._database.writing() as session:
            if patch is not None:
                row.patch_id = find_patch(session, patch).id
            else:
                row_of_recipe, row.revision = find_revision(session, recipe or "")
                row.recipe_id = row_of_recipe.id
            return EvaluationRecord.of(added(session, row))

    def evaluations(
        self, *, patch: str | None = None, recipe: str | None = None, latest: bool = False
    ) -> list[EvaluationRecord]:
        """The runs on a patch or on a recipe (as it is, or at NAME@NUMBER), oldest first; all of them without either.

        With `latest`, of each suite and judge the last one. Raises NotFound.
        """
        query = select(models.EvaluationRow).options(selectinload(models.EvaluationRow.results))
        query = query.order_by(models.EvaluationRow.at, models.EvaluationRow.id)
        with self._database.reading() as session:
            rows = session.scalars(_of_subject(session, query, patch, recipe)).all()
            records = [EvaluationRecord.of(row) for row in rows]
        return list({(each.suite, each.judge): each for each in records}.values()) if latest else records

    # Prompts to preserve

    def preserve_prompts(self, base: str, prompts: Iterable[str], *, who: str) -> int:
        """Preserve prompts on a base: all of them, or none; returns how many are new.

        Raises NotFound for an unknown base, OverpaintError for a prompt that is empty, too long, or does not print.
        """
        wanted = list(
            dict.fromkeys(_checked_prompt(prompt) for prompt in checked_texts(prompts, "the prompts to preserve"))
        )
        checked_note(who, "the name of who did it")
        with self._database.writing() as session:
            row = find(session, models.BaseRow, base)
            known = {kept.prompt for kept in _preserved_of(session, row)}
            new = [prompt for prompt in wanted if prompt not in known]
            session.add_all(models.PreservedPromptRow(base_id=row.id, prompt=prompt, who=who) for prompt in new)
        return len(new)

    def forget_prompts(self, base: str, prompts: Iterable[str] | None = None) -> int:
        """No longer preserve some prompts, or any (None): all of them, or none; returns how many there were.

        Raises NotFound for an unknown base or a prompt that is not preserved.
        """
        with self._database.writing() as session:
            row = find(session, models.BaseRow, base)
            kept = {each.prompt: each for each in _preserved_of(session, row)}
            leaving = (
                list(kept)
                if prompts is None
                else list(dict.fromkeys(prompt.strip() for prompt in checked_texts(prompts, "the prompts to preserve")))
            )
            for prompt in leaving:
                if prompt not in kept:
                    raise NotFound(
                        f"the prompt {quoted(prompt)} is not preserved on {row.name!r}; see `overpaint base preserve {row.name}`"
                    )
                session.delete(kept[prompt])
        return len(leaving)

    def preserved_prompts(self, base: str) -> list[PreservedPromptRecord]:
        """The prompts that are preserved on a base, in alphabetical order. Raises NotFound."""
        with self._database.reading() as session:
            preserved = _preserved_of(session, find(session, models.BaseRow, base))
            return [PreservedPromptRecord(row.prompt, row.who, row.at) for row in preserved]
