"""Passes over a whole registry: verifying that everything is as it was, and collecting blobs that no patch needs.

Verifying reads everything again and names whatever is not as it was. A damaged blob goes to quarantine and is reported with
the patch and the tensor it belongs to. Nothing is deleted and no row is changed.

Garbage is left by writers that were killed, and by patches that were forgotten. It is planned first, then collected. A writer
makes its blobs durable before it writes the row that names them, so a blob that nothing names may be one whose row is still to
come. Two things keep it safe. Blobs younger than a grace period are left alone. And blobs are removed only while the database's
write lock is held, under which a writer looks once more whether its blobs are there before it commits its row; if they are gone,
it puts them again.

What a pass has read so far is on the disk, for there may be more blobs than memory has room for. It is written down with each
page of patches, so that a pass that was stopped can go on where it was. A folder that cannot be written, or in which somebody
else's pass is at work, gets its ledger in a temporary place instead, which no other pass finds.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sqlalchemy import select, type_coerce
from sqlalchemy.orm import Session, selectinload
from sqlalchemy.types import NullType

from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import Progress, silent
from overpaint.registry import models, queries
from overpaint.registry.files import FileInfo
from overpaint.registry.history import entries_at, entries_now, revisions_of
from overpaint.registry.records import EvaluationRecord, PatchRecord
from overpaint.registry.registry import Registry
from overpaint.registry.store import (
    BadManifest,
    Blob,
    BlobCorrupt,
    BlobMissing,
    Manifest,
    PatchFiles,
    digest_of,
    embedded_manifest,
    read_manifest,
)

SCHEMA = """
    CREATE TABLE IF NOT EXISTS blob (digest TEXT PRIMARY KEY, nbytes INTEGER) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS patch (id TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS note (text TEXT);
"""


class Ledger:
    """The patches and blobs that one pass has read, and what it noted down of them."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @property
    def last(self) -> str:
        """The greatest id of a patch that was read, or nothing."""
        return str(self._one("SELECT max(id) FROM patch") or "")

    def patch(self, id: str) -> None:
        """Write down that a patch was read."""
        self._connection.execute("INSERT OR IGNORE INTO patch VALUES (?)", (id,))

    def patches(self) -> Iterator[str]:
        """The ids of the patches that were read, sorted."""
        return (id for (id,) in self._connection.execute("SELECT id FROM patch ORDER BY id"))

    def blob(self, digest: str, nbytes: int = 0) -> None:
        """Write down a blob."""
        self._connection.execute("INSERT OR REPLACE INTO blob VALUES (?, ?)", (digest, nbytes))

    def has(self, digest: str) -> bool:
        """Whether a blob was written down."""
        return self._one("SELECT 1 FROM blob WHERE digest = ?", digest) is not None

    def note(self, text: str) -> None:
        """Write down a line."""
        self._connection.execute("INSERT INTO note VALUES (?)", (text,))

    def notes(self) -> list[str]:
        """The lines, in the order in which they were written."""
        return [text for (text,) in self._connection.execute("SELECT text FROM note ORDER BY rowid")]

    def totals(self) -> tuple[int, int, int]:
        """How many patches, how many blobs, and how many bytes these have."""
        every = "SELECT (SELECT count(*) FROM patch), count(*), coalesce(sum(nbytes), 0) FROM blob"
        patches, blobs, nbytes = self._connection.execute(every).fetchone()
        return patches, blobs, nbytes

    def save(self) -> None:
        """Make what was written down last beyond this program."""
        self._connection.commit()

    def _one(self, query: str, *values: str) -> object:
        row = self._connection.execute(query, values).fetchone()
        return row[0] if row else None


@contextmanager
def ledger(path: Path, *, resume: bool) -> Iterator[Ledger]:
    """The ledger at `path`, as it was left with `resume` and else a new one; it is gone after a block that ends well."""
    with tempfile.TemporaryDirectory(prefix="overpaint-") as elsewhere:
        try:
            connection = _opened(path, resume)
        except sqlite3.Error:
            path = Path(elsewhere) / path.name
            connection = _opened(path, resume)
        with closing(connection):
            try:
                yield Ledger(connection)
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.commit()
                raise
        path.unlink(missing_ok=True)


def _opened(path: Path, resume: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=0)
    try:
        # Nothing here need survive a power cut, and nobody else may write.
        connection.executescript(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = DELETE; PRAGMA synchronous = OFF"
        )
        connection.execute("BEGIN EXCLUSIVE")
        connection.commit()
        if not resume:
            connection.executescript("DROP TABLE IF EXISTS blob; DROP TABLE IF EXISTS patch; DROP TABLE IF EXISTS note")
        connection.executescript(SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


VERIFY_LEDGER = "verify.partial"
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
                # What search texts are made of; while it is wrong, nothing can be said of them.
                sources = [*_concepts(session), *_settings(session)]
                problems += [*sources, *_recipes(session), *([] if sources else _searches(session))]
    except models.Damaged as error:
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


def _searches(session: Session) -> Iterator[str]:
    """Search texts say what the rows say: a patch whose text is lost or another one's is found by nobody."""
    rows = chain(queries.stale_patches(session), queries.stale_recipes(session))
    first = [_shown(row) for row in islice(rows, 3)]
    if first:
        more = sum(1 for _ in rows)
        some = ", ".join(first) + (f" and {more} more" if more else "")
        yield f"the search texts of {some} are out of date; run `overpaint db reindex`"


def _shown(row: models.PatchRow | models.RecipeRow | models.RevisionRow | models.RecipeTextRow) -> str:
    if isinstance(row, models.PatchRow):
        return f"patch {row.id[:12]} ({row.concept.name})"
    if isinstance(row, models.RecipeRow):
        return f"recipe {row.name!r}"
    if isinstance(row, models.RecipeTextRow):
        return f"revision {row.revision}, which does not exist, of the recipe with the number {row.recipe_id}"
    return f"revision {row.number} of recipe {row.recipe.name!r}"


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
    with ledger(registry.folder / VERIFY_LEDGER, resume=resume) as book:
        check = _Check(PatchFiles(registry.blobs), book)
        with suppress(models.Damaged):  # which is among the problems by now; the blobs can be read all the same
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


GARBAGE_LEDGER = "gc.partial"
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


def plan_collection(
    registry: Registry, *, grace: float = GRACE, resume: bool = False, progress: Progress = silent
) -> GarbagePlan:
    """Find every blob that no patch needs and that was last put more than `grace` seconds ago. Nothing is removed.

    With `resume`, manifests that a plan which was stopped has read are not read again. Raises CannotTell when the manifest
    of a patch is missing or damaged, because then nobody knows its arrays.
    """
    cutoff, files = time.time() - grace, PatchFiles(registry.blobs)
    with ledger(registry.folder / GARBAGE_LEDGER, resume=resume) as book:
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
