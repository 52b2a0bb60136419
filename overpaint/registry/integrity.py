"""Verify: everything the registry remembers is read again, and whatever is not as it was is named.

A damaged blob goes to quarantine and is reported with the patch and the tensor it belongs to. Nothing is deleted and no
row is changed.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any

from sqlalchemy import select, type_coerce
from sqlalchemy.orm import Session, selectinload
from sqlalchemy.types import NullType

from overpaint.core.reporting import Progress, silent
from overpaint.registry import models
from overpaint.registry.db_errors import Damaged
from overpaint.registry.history import entries_at, entries_now, revisions_of
from overpaint.registry.ledger import Ledger, ledger
from overpaint.registry.records import PatchRecord
from overpaint.registry.registry import EvaluationRecord, Registry
from overpaint.registry.store import BlobCorrupt, BlobMissing, PatchFiles
from overpaint.registry.store.blobs import digest_of
from overpaint.registry.store.patch_files import BadManifest, Manifest, embedded_manifest, read_manifest

LEDGER = "verify.partial"
"""The file in a registry's folder by which a pass goes on where it was."""
PAGE = 200
"""How many patches are read before that is written down."""
MANY = 1000
"""How many rows are fetched at a time."""


@dataclass(frozen=True)
class StoredPatch:
    """What a row records about a patch's bytes; `concept` is a name, `fingerprint` that of the base."""

    id: str
    blob: str
    nbytes: int
    kind: str
    solver: str
    concept: str
    fingerprint: str


def patch_rows(registry: Registry, after: str = "") -> Iterator[StoredPatch]:
    """Every patch of a registry whose id is greater than `after`, by id.

    They are read a page at a time, each page of its own moment, so that no transaction is as long as a pass over all of them.
    """
    patch = models.PatchRow
    query = (
        select(
            patch.id,
            patch.blob,
            patch.nbytes,
            patch.kind,
            patch.solver,
            models.ConceptRow.name,
            models.BaseRow.fingerprint,
        )
        .join(models.ConceptRow, models.ConceptRow.id == patch.concept_id)
        .join(models.BaseRow, models.BaseRow.id == patch.base_id)
        .order_by(patch.id)
        .limit(MANY)
    )
    while True:
        with registry.reading() as session:
            page = [StoredPatch(*row) for row in session.execute(query.where(patch.id > after))]
        yield from page
        if len(page) < MANY:
            return
        after = page[-1].id


def row_problems(registry: Registry) -> list[str]:
    """What is wrong in the database itself: damage, references to nothing, rows that contradict each other."""
    problems: list[str] = []
    try:
        with registry.reading() as session:
            # What cannot be read at all is said first, because nothing else can be checked then.
            problems += [*_damage(session), *_values(session)]
            if not problems:
                problems += [*_concepts(session), *_settings(session), *_recipes(session)]
    except Damaged as error:
        problems.append(str(error))
    return problems


def _damage(session: Session) -> Iterator[str]:
    """A server checks its files and its references itself."""
    if session.get_bind().dialect.name != "sqlite":
        return
    connection = session.connection()
    for (verdict,) in connection.exec_driver_sql("PRAGMA integrity_check(20)"):
        if verdict != "ok":
            yield f"the database is damaged: {verdict}; put back a backup with `overpaint db restore`"
    for table, row, other, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield f"row {row} of {table} refers to a {other} that is not there"


def _values(session: Session) -> Iterator[str]:
    """Every value as the reader of its column finds it; SQLite takes anything for a number or a time."""
    dialect = session.get_bind().dialect
    for table in models.Row.metadata.sorted_tables:
        readers = [
            (column.name, column.type.dialect_impl(dialect).result_processor(dialect, None)) for column in table.columns
        ]
        stored = select(*(type_coerce(column, NullType()) for column in table.columns))
        for row in session.execute(stored.execution_options(yield_per=MANY)):
            for (name, read), value in zip(readers, row, strict=True):
                try:
                    if read is not None:
                        read(value)
                except models.DamagedRow as error:
                    yield f"the {name} of a row of {table.name} is damaged: {error.what}, in {tuple(row)}"


def _concepts(session: Session) -> Iterator[str]:
    for row in session.scalars(select(models.ConceptRow).execution_options(yield_per=MANY)):
        try:
            concept = row.concept
        except models.DamagedRow as error:
            yield error.what
            continue
        if (concept.name, concept.kind) != (row.name, row.kind):
            yield f"the concept {row.name!r} ({row.kind}) is defined as {concept.name!r} ({concept.kind})"


def _settings(session: Session) -> Iterator[str]:
    """Columns with JSON in them."""
    for query, of in ((select(models.PatchRow), PatchRecord.of), (select(models.EvaluationRow), EvaluationRecord.of)):
        for row in session.scalars(query.execution_options(yield_per=MANY)):
            try:
                of(row)
            except models.DamagedRow as error:
                yield error.what


def _recipes(session: Session) -> Iterator[str]:
    """Each recipe has the patches of its newest revision, revisions without a gap, and a base that fits."""
    together = selectinload(models.RecipeRow.patches).joinedload(models.RecipePatchRow.patch)
    digests: Digests = {}
    for recipe in session.scalars(select(models.RecipeRow).options(together).order_by(models.RecipeRow.id)):
        numbers = select(models.RevisionRow.number).where(models.RevisionRow.recipe_id == recipe.id)
        stored = list(session.scalars(numbers.order_by(models.RevisionRow.number)))
        if stored != list(range(1, recipe.revision + 1)):
            yield f"recipe {recipe.name!r} is at revision {recipe.revision}, and its history has {stored[-20:]}"
        if entries_now(recipe) != entries_at(session, recipe, recipe.revision):
            yield f"the patches of recipe {recipe.name!r} are not those of its history"
        for entry in recipe.patches:
            if entry.patch.base.fingerprint != recipe.base.fingerprint:
                yield f"patch {entry.patch_id} is on recipe {recipe.name!r}, which has another base"
        yield from _digests(session, recipe, digests)


Digests = dict[tuple[str, frozenset[tuple[str, float]]], tuple[str, str]]
"""By base and patches with their strengths: the digest of the weights, and what recorded it."""


def _digests(session: Session, recipe: models.RecipeRow, known: Digests) -> Iterator[str]:
    """A digest follows from the base and the patches, so what is equal has one, in all revisions of all recipes.

    So each revision begins with the digest that the one before it ended with, and without patches it is the base's.
    """
    fingerprint, entries = recipe.base.fingerprint, dict[str, float]()
    known[fingerprint, frozenset()] = fingerprint, f"the base {recipe.base.name!r}"
    for revision in revisions_of(session, recipe):
        for when, digest in (("before", revision.digest_before), ("after", revision.digest_after)):
            if when == "after":
                changed = {change.patch: change.after for change in revision.changes}
                entries = {patch: strength for patch, strength in entries.items() if patch not in changed}
                entries |= {patch: entry.strength for patch, entry in changed.items() if entry is not None}
            if digest is None:
                continue
            here = f"revision {revision.number} of recipe {recipe.name!r} ({when})"
            other, there = known.setdefault((fingerprint, frozenset(entries.items())), (digest, here))
            if digest != other:
                yield f"{here} records the digest {digest}, and {there} has {other} for the same patches"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: in which part, of which patch and tensor if it belongs to any, and what was found."""

    part: str
    patch: str | None
    concept: str | None
    tensor: str | None
    found: str


@dataclass(frozen=True)
class Verified:
    """What was read, and all that is wrong with it."""

    patches: int
    blobs: int
    nbytes: int
    problems: tuple[Problem, ...]


def verify(registry: Registry, *, resume: bool = False, progress: Progress = silent) -> Verified:
    """Read every row, every patch and every blob of a registry, and compare each with its digest.

    With `resume`, what a pass that was stopped has read is not read again; its problems are among those that are returned.
    """
    problems = [Problem("database", None, None, None, text) for text in row_problems(registry)]
    with ledger(registry.folder / LEDGER, resume=resume) as book:
        check = _Check(PatchFiles(registry.blobs), book)
        with suppress(Damaged):  # which is among the problems by now; the blobs can be read all the same
            done, of = book.totals()[0], registry.count_patches()
            for step, row in enumerate(patch_rows(registry, book.last), done + 1):
                progress(step, max(step, of), f"patch {row.id[:12]} ({row.concept})")
                for problem in check.patch(row):
                    book.note(json.dumps(astuple(problem)))
                book.patch(row.id)
                if step % PAGE == 0:
                    book.save()
        problems += [Problem(*json.loads(line)) for line in dict.fromkeys(book.notes())]
        problems += check.others(progress)
        return Verified(*book.totals(), tuple(problems))


class _Check:
    """One pass over a store, which writes every blob that it has read into a ledger."""

    def __init__(self, files: PatchFiles, book: Ledger) -> None:
        self.files = files
        self._book = book

    def patch(self, row: StoredPatch) -> Iterator[Problem]:
        """What is wrong with the bytes of one patch, or between them and its row."""
        whole, parts = self.files.blobs.exists(row.blob), row.id != row.blob and self.files.blobs.exists(row.id)
        if whole:
            yield from self._whole(row)
        if parts:
            yield from self._parts(row)
        if not whole and not parts:
            yield _problem(row, "manifest", None, self.files.blobs.missing(row.id))

    def others(self, progress: Progress) -> list[Problem]:
        """What is wrong with the blobs that no patch led to, by digest."""
        problems = []
        for number, blob in enumerate(self.files.blobs.blobs(), 1):
            if not self._book.has(blob.digest):
                progress(number, number, f"blob {blob.digest[:12]}")
                try:
                    self._read(blob.digest)
                except BlobCorrupt as error:
                    text = f"{error}; no patch that can be read names it"
                    problems.append((blob.digest, Problem("blob", None, None, None, text)))
                except BlobMissing:
                    pass  # it was collected as garbage meanwhile
        return [problem for _, problem in sorted(problems, key=lambda each: each[0])]

    def _whole(self, row: StoredPatch) -> Iterator[Problem]:
        """A patch that is kept as one file."""
        try:
            file = self._read(row.blob)
        except BlobCorrupt as error:
            for part, tensor in _damaged_parts(row, error.found):
                yield _problem(row, part, tensor, str(error))
            return
        except BlobMissing as error:  # it was set aside a moment ago, by another reader
            yield _problem(row, "file", None, str(error))
            return
        manifest = embedded_manifest(file)
        if manifest is None or manifest.id != row.id:
            yield _problem(row, "row", None, "its file is sound, but holds no manifest that has the patch's id")
        else:
            yield from _compared(row, manifest, len(file))

    def _parts(self, row: StoredPatch) -> Iterator[Problem]:
        """A patch that is kept as manifest and arrays."""
        try:
            manifest = read_manifest(self._read(row.id))
        except (BlobCorrupt, BlobMissing, BadManifest) as error:
            yield _problem(row, "manifest", None, str(error))
            return
        file, whole = hashlib.sha256(manifest.head), True
        nbytes = len(manifest.head)
        for array in manifest.arrays:
            try:
                values = self._read(array.digest).removeprefix(array.label)
                file.update(values)
                nbytes += len(values)
            except (BlobCorrupt, BlobMissing) as error:
                whole = False
                yield _problem(row, "array", array.name, str(error))
        if whole and file.hexdigest() != row.blob:
            yield _problem(row, "row", None, f"its parts are sound, but make the file {file.hexdigest()}")
        if whole:
            yield from _compared(row, manifest, nbytes)

    def _read(self, digest: str) -> bytes:
        data = self.files.blobs.get(digest)
        self._book.blob(digest, len(data))
        return data


def _damaged_parts(row: StoredPatch, file: bytes) -> Iterator[tuple[str, str | None]]:
    """Which parts of a damaged patch file are not what its manifest, if that is still sound, says of them."""
    manifest = embedded_manifest(file)
    if manifest is None or manifest.id != row.id:
        yield "manifest", None
        return
    if not file.startswith(manifest.head):
        yield "header", None
    offset = len(manifest.head)
    for array in manifest.arrays:
        values = file[offset : offset + array.nbytes]
        offset += array.nbytes
        if digest_of((array.label, values)) != array.digest:
            yield "array", array.name
    if len(file) > offset:
        yield "file", None


def _compared(row: StoredPatch, manifest: Manifest, nbytes: int) -> Iterator[Problem]:
    """What a row says otherwise than the manifest of its patch."""
    content = manifest.content
    pairs: list[tuple[str, Any, Any]] = [
        ("size", row.nbytes, nbytes),
        ("kind", row.kind, content.get("kind")),
        ("concept", row.concept, _composed(_of(content.get("concept"), "name"))),
        ("solver", row.solver, _of(content.get("solver"), "name")),
        ("base", row.fingerprint, _of(content.get("subject"), "fingerprint")),
    ]
    for what, kept, found in pairs:
        if kept != found:
            yield _problem(row, "row", None, f"the database gives it the {what} {kept!r}, its manifest {found!r}")


def _of(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _composed(name: Any) -> Any:
    return unicodedata.normalize("NFC", name) if isinstance(name, str) else name


def _problem(row: StoredPatch, part: str, tensor: str | None, found: str) -> Problem:
    return Problem(part, row.id, row.concept, tensor, found)
