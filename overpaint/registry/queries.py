"""Finding rows by what people call them.

What a search reads: one short text for each patch, recipe and reason, in folded letters. It passes over them, newest first, and
stops when it has a page. So what is frequent is found at once; for what is rare, an index of pieces of three letters says which
texts are worth comparing (migration 0005).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import TypeVar

from sqlalchemy import ColumnElement, and_, column, delete, func, insert, or_, select, table
from sqlalchemy.orm import InstrumentedAttribute, Session

from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import sought_name, unknown
from overpaint.registry import models

# What must match as a whole stands on a line of its own behind one of these, which no name and no search can contain.
KIND, SOLVER, BASE, TAG = "\x1c", "\x1d", "\x1e", "\x1f"


def folded(text: str) -> str:
    """`text` so that upper and lower case and compatible characters are equal."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def index_patch(session: Session, patch: models.PatchRow) -> None:
    """Write the text by which a search finds `patch`."""
    known = session.scalar(select(models.PatchTextRow).where(models.PatchTextRow.patch_id == patch.id))
    row = known or models.PatchTextRow(patch_id=patch.id)
    row.text = text_of_patch(patch)
    session.add(row)


def text_of_patch(patch: models.PatchRow) -> str:
    """What a search reads of `patch`."""
    tags = [tag.tag for tag in patch.tags]
    return of_patch(patch.concept.concept, patch.kind, patch.solver, patch.base.name, patch.base_id, tags)


def of_patch(concept: Concept, kind: str, solver: str, base: str, base_id: int, tags: Iterable[str] = ()) -> str:
    """The words of a patch's concept, its kind, its solver and the name of its base; what must match exactly, marked."""
    words = [*concept.words, concept.anchor, concept.kind, kind, solver, base]
    marks = [(KIND, concept.kind), (SOLVER, solver), (BASE, str(base_id)), *((TAG, tag) for tag in tags)]
    return _text(words, marks)


def index_recipe(session: Session, recipe: models.RecipeRow) -> None:
    """Write the text by which a search finds `recipe`: its name, its base and its tags; reasons have rows of their own."""
    of_recipe = (models.RecipeTextRow.recipe_id == recipe.id) & (models.RecipeTextRow.revision == 0)
    known = session.scalar(select(models.RecipeTextRow).where(of_recipe))
    row = known or models.RecipeTextRow(recipe_id=recipe.id, revision=0)
    row.text = text_of_recipe(recipe)
    session.add(row)


def text_of_recipe(recipe: models.RecipeRow) -> str:
    """What a search reads of `recipe` beside the reasons in its history."""
    return _text([recipe.name, recipe.base.name], [(TAG, tag.tag) for tag in recipe.tags])


def index_reason(session: Session, revision: models.RevisionRow) -> None:
    """Write the reason that somebody gave for a revision, if any, for a search."""
    if revision.why:
        text = text_of_reason(revision.why)
        session.add(models.RecipeTextRow(recipe_id=revision.recipe_id, revision=revision.number, text=text))


def text_of_reason(why: str) -> str:
    """What a search reads of a reason."""
    return _text([why], [])


def stale_patches(session: Session) -> Iterator[models.PatchRow]:
    """Patches that searches do not read as they are: their text is lost, another one's, or missing in the index of pieces."""
    patch, text = models.PatchRow, models.PatchTextRow
    unindexed = set(_unindexed(session))
    for row, read in _beside(session, patch, text, text.patch_id == patch.id):
        if read != text_of_patch(row) or row.id in unindexed:
            yield row


def _unindexed(session: Session) -> Sequence[str]:
    """The ids of patches whose text the index of pieces misses."""
    text = models.PatchTextRow
    missing = select(text.patch_id).where(text.id.not_in(select(INDEXED.c.id)))
    return session.scalars(missing).all() if _has_pieces(session) else []


def stale_recipes(session: Session) -> Iterator[models.RecipeRow | models.RevisionRow | models.RecipeTextRow]:
    """Recipes and reasons that searches do not read as they are, and texts of revisions that there are not."""
    recipe, revision, text = models.RecipeRow, models.RevisionRow, models.RecipeTextRow
    for row, read in _beside(session, recipe, text, (text.recipe_id == recipe.id) & (text.revision == 0)):
        if read != text_of_recipe(row):
            yield row
    is_of = (text.recipe_id == revision.recipe_id) & (text.revision == revision.number)
    for given, read in _beside(session, revision, text, is_of):
        if read != (text_of_reason(given.why) if given.why else None):
            yield given
    yield from session.scalars(select(text).where(text.revision != 0, ~select(revision.id).where(is_of).exists()))


def reindex_patches(
    session: Session, after: tuple[datetime, str] | None, count: int
) -> tuple[int, tuple[datetime, str] | None]:
    """Bring the search texts of the next `count` patches up to date, in the order of solving, from behind `after` on.

    Returns how many were written, and behind which patch to go on, None at the end. A text that was lost is found first from
    then on, as if its patch were new.
    """
    patch, text = models.PatchRow, models.PatchTextRow
    query = (
        select(patch, text).outerjoin(text, text.patch_id == patch.id).order_by(patch.solved_at, patch.id).limit(count)
    )
    if after is not None:
        at, id = after
        query = query.where(or_(patch.solved_at > at, and_(patch.solved_at == at, patch.id > id)))
    page, written = session.execute(query).all(), 0
    for row, known in page:
        wanted = text_of_patch(row)
        if known is None:
            session.add(models.PatchTextRow(patch_id=row.id, text=wanted))
        elif known.text != wanted:
            known.text = wanted
        written += known is None or known in session.dirty
    session.flush()
    return written, (page[-1][0].solved_at, page[-1][0].id) if len(page) == count else None


def reindex_recipes(session: Session) -> int:
    """Bring the search texts of all recipes and of the reasons in their histories up to date; returns how many were written."""
    text, rows = models.RecipeTextRow, list(stale_recipes(session))
    for row in rows:
        if isinstance(row, models.RecipeRow):
            index_recipe(session, row)
        elif isinstance(row, models.RevisionRow):
            session.execute(delete(text).where(text.recipe_id == row.recipe_id, text.revision == row.number))
            index_reason(session, row)
        else:
            session.delete(row)
    session.flush()
    return len(rows)


def rebuild_pieces(session: Session) -> int:
    """Make the index of pieces again, where there is one to be asked by name; returns how many texts it missed."""
    missed = len(_unindexed(session))
    if _has_pieces(session):
        session.execute(insert(PIECES).values(patch_pieces="rebuild"))
    return missed


def _beside(
    session: Session, rows: type[RowT], texts: type[TextRow], match: ColumnElement[bool]
) -> Iterator[tuple[RowT, str | None]]:
    """Each row, and the text that a search reads of it, if there is one."""
    query = select(rows, texts.text).outerjoin(texts, match).execution_options(yield_per=AT_ONCE)
    for row, text in session.execute(query):  # noqa: UP028 - its types are not known
        yield row, text


def mentions(text: InstrumentedAttribute[str], words: Iterable[str]) -> list[ColumnElement[bool]]:
    """Conditions that `text` contains every one of `words`, in any order, also within other words."""
    return [text.contains(folded(word), autoescape=True) for word in words]


def is_marked(text: InstrumentedAttribute[str], mark: str, value: str) -> ColumnElement[bool]:
    """The condition that `text` has exactly `value` behind `mark`."""
    return text.contains(f"\n{mark}{folded(value)}\n", autoescape=True)


LARGEST = 2**63 - 1
"""Rows that a query may ask for."""
RECENT = 20_000
"""How many of the newest texts a search compares before it asks the index, which is slow for what nearly every text has."""
PIECES = table("patch_pieces", column("rowid"), column("patch_pieces"))
INDEXED = table("patch_pieces_docsize", column("id"))
"""Which texts the index of pieces has; SQLite's full-text search keeps this table."""


def patches_mentioning(
    session: Session,
    words: Sequence[str],
    marks: Sequence[tuple[str, str]],
    base_ids: Sequence[int],
    limit: int | None,
    offset: int,
) -> Sequence[str]:
    """The ids of a page of patches whose text contains all `words`, all `marks` and one of the bases, if any; newest first."""
    text, number = models.PatchTextRow.text, models.PatchTextRow.id
    conditions = [*mentions(text, words), *(is_marked(text, mark, value) for mark, value in marks)]
    if base_ids:
        conditions.append(or_(*(is_marked(text, BASE, str(each)) for each in base_ids)))
    query = select(models.PatchTextRow.patch_id).where(*conditions).order_by(number.desc())
    # What a filter asks for, half of all patches may have; words are rarer.
    sought = [folded(word) for word in words if len(folded(word)) > 2] or [
        f"\n{mark}{folded(value)}\n" for mark, value in marks
    ]
    pieces = sorted({each[at : at + 3] for each in sought for at in range(len(each) - 2)})
    if not pieces or not _has_pieces(session):
        return session.scalars(query.limit(limit).offset(offset)).all()
    found: list[str] = []
    last = session.scalar(select(func.max(number))) or 0
    wanted = None if limit is None else min(offset + limit, LARGEST)
    if wanted is not None:
        found += session.scalars(query.where(number > last - RECENT).limit(wanted))
        if len(found) == wanted:
            return found[offset:]
        query = query.where(number <= last - RECENT).limit(wanted - len(found))
    match = " AND ".join('"' + piece.replace('"', '""') + '"' for piece in pieces)
    found += session.scalars(
        query.where(number.in_(select(PIECES.c.rowid).where(PIECES.c.patch_pieces.op("MATCH")(match))))
    )
    return found[offset:]


def _has_pieces(session: Session) -> bool:
    """Whether there is an index to be asked by name, as on SQLite; PostgreSQL uses its own by itself."""
    if session.get_bind().dialect.name != "sqlite":
        return False
    names = table("sqlite_master", column("name"))
    return session.scalar(select(names.c.name).where(names.c.name == PIECES.name)) is not None


def _text(words: Iterable[str], marks: Iterable[tuple[str, str]]) -> str:
    lines = [*(folded(word) for word in words if word), *(f"{mark}{folded(value)}" for mark, value in marks)]
    return "\n".join(["", *lines, ""])


PREFIX = re.compile(r"[0-9a-fA-F]{4,64}")

CANDIDATES = 300
"""How many names are compared with one that nothing answers to: enough for a hint, however many there are."""

AT_ONCE = 1000
"""How many ids one query may name; databases have limits."""

IdT = TypeVar("IdT", str, int)
RowT = TypeVar("RowT", bound=models.Row)
TextRow = TypeVar("TextRow", models.PatchTextRow, models.RecipeTextRow)
Named = TypeVar("Named", models.BaseRow, models.ConceptRow, models.RecipeRow)


def added(session: Session, row: RowT) -> RowT:
    """`row`, written, so that its id and its defaults are there."""
    session.add(row)
    session.flush()
    return row


def lookup(session: Session, table: type[Named], name: str) -> Named | None:
    """The row of that name, or None. A deleted recipe has no name."""
    is_it = table.name == sought_name(name, table.__tablename__)
    return session.scalars(select(table).where(is_it, *_living(table))).one_or_none()


def find(session: Session, table: type[Named], name: str) -> Named:
    """The row of that name. Raises NotFound with the nearest names."""
    row = lookup(session, table, name)
    if row is None:
        raise unknown(table.__tablename__, name, _candidates(session, table, name))
    return row


def _living(table: type[Named]) -> list[ColumnElement[bool]]:
    return [models.RecipeRow.deleted_at.is_(None)] if issubclass(table, models.RecipeRow) else []


def _candidates(session: Session, table: type[Named], name: str) -> list[str]:
    """Names worth comparing: the first that came, and the neighbours in the alphabet."""
    names = select(table.name).where(*_living(table)).limit(CANDIDATES)
    composed = sought_name(name, table.__tablename__)
    first = names.order_by(table.id)
    after = names.where(table.name > composed).order_by(table.name)
    before = names.where(table.name < composed).order_by(table.name.desc())
    return [near for page in (first, after, before) for near in session.scalars(page)]


def chunks(ids: Iterable[IdT]) -> Iterator[Sequence[IdT]]:
    """`ids` in pieces that one query can name."""
    every = list(ids)
    return (every[start : start + AT_ONCE] for start in range(0, len(every), AT_ONCE))


def patches_by_id(session: Session, ids: Iterable[str]) -> dict[str, models.PatchRow]:
    """The patches of these ids, by id; looking up one that is not there raises DamagedRow."""
    query = select(models.PatchRow)
    pieces = (session.scalars(query.where(models.PatchRow.id.in_(some))) for some in chunks(ids))
    return _ById({row.id: row for piece in pieces for row in piece})


class _ById(dict[str, models.PatchRow]):
    def __missing__(self, id: str) -> models.PatchRow:
        raise models.DamagedRow(f"the patch {id}, which other rows name, is gone")


def same_bases(session: Session, name: str) -> list[int]:
    """The ids of the base of that name and of those with its fingerprint, which are the same base. Raises NotFound."""
    fingerprint = find(session, models.BaseRow, name).fingerprint
    query = select(models.BaseRow.id).where(models.BaseRow.fingerprint == fingerprint)
    return list(session.scalars(query.order_by(models.BaseRow.id)))


def find_patch(session: Session, key: str, *, base: str | None = None) -> models.PatchRow:
    """The patch that `key` means: a full id, a concept's name (its newest patch, on `base` if given) or the beginning of an id.

    A name goes before a beginning: "face" is both, and one can type more of an id but not more of a name. Raises
    NotFound, or OverpaintError with the candidates of an ambiguous beginning.
    """
    sought_name(key, "patch")
    by_id = session.get(models.PatchRow, key.lower())
    patch = by_id or _newest_of(session, key, base) or _beginning_with(session, key)
    if patch is None:
        raise _no_patch(session, key, base)
    return patch


def _newest_of(session: Session, concept: str, base: str | None) -> models.PatchRow | None:
    known = lookup(session, models.ConceptRow, concept)
    if known is None:
        return None
    newest = select(models.PatchRow).order_by(models.PatchRow.solved_at.desc(), models.PatchRow.id.desc()).limit(1)
    if base is not None:
        newest = newest.where(models.PatchRow.base_id.in_(same_bases(session, base)))
    return session.scalar(newest.where(models.PatchRow.concept_id == known.id))


def _beginning_with(session: Session, prefix: str) -> models.PatchRow | None:
    if not PREFIX.fullmatch(prefix):
        return None
    prefix = prefix.lower()
    # "g" sorts after every hexadecimal digit. A range uses the primary key's index, which LIKE would not.
    in_range = models.PatchRow.id.between(prefix, prefix + "g")
    rows = session.scalars(select(models.PatchRow).where(in_range).order_by(models.PatchRow.id).limit(9)).all()
    if len(rows) > 1:
        listed = "\n".join(f"  {patch.id}  {patch.concept.name} on {patch.base.name}" for patch in rows[:8])
        more = "\n  ..." if len(rows) > 8 else ""
        raise OverpaintError(f"{prefix} begins the id of more than one patch; type more of it:\n{listed}{more}")
    return rows[0] if rows else None


def _no_patch(session: Session, key: str, base: str | None) -> NotFound:
    if lookup(session, models.ConceptRow, key) is not None:
        there = "" if base is None else f" for the base {base!r}"
        return NotFound(f"the concept {key!r} has no patch{there} yet; solve one for it first")
    solved = select(models.PatchRow.concept_id).where(models.PatchRow.concept_id == models.ConceptRow.id).exists()
    names = select(models.ConceptRow.name).where(
        solved, models.ConceptRow.name.in_(_candidates(session, models.ConceptRow, key))
    )
    return unknown("patch", key, session.scalars(names.order_by(models.ConceptRow.id)))
