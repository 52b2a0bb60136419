"""Finding rows by what people call them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from overpaint.errors import NotFound, OverpaintError
from overpaint.registry import models
from overpaint.registry.names import checked_name, unknown

PREFIX = re.compile(r"[0-9a-fA-F]{4,64}")

CANDIDATES = 300
"""How many names are compared with one that nothing answers to: enough for a hint, however many there are."""

AT_ONCE = 1000
"""How many ids one query may name; databases have limits."""

RowT = TypeVar("RowT", bound=models.Row)
Named = TypeVar("Named", models.Base, models.Concept, models.Recipe)


def added(session: Session, row: RowT) -> RowT:
    """`row`, written, so that its id and its defaults are there."""
    session.add(row)
    session.flush()
    return row


def lookup(session: Session, table: type[Named], name: str) -> Named | None:
    """The row of that name, or None. A deleted recipe has no name."""
    is_it = table.name == checked_name(name, table.__tablename__)
    return session.scalars(select(table).where(is_it, *_living(table))).one_or_none()


def find(session: Session, table: type[Named], name: str) -> Named:
    """The row of that name. Raises NotFound with the nearest names."""
    row = lookup(session, table, name)
    if row is None:
        raise unknown(table.__tablename__, name, _candidates(session, table, name))
    return row


def _living(table: type[Named]) -> list[ColumnElement[bool]]:
    return [models.Recipe.deleted_at.is_(None)] if issubclass(table, models.Recipe) else []


def _candidates(session: Session, table: type[Named], name: str) -> list[str]:
    """Names worth comparing: the first that came, and the neighbours in the alphabet."""
    names = select(table.name).where(*_living(table)).limit(CANDIDATES)
    composed = checked_name(name, table.__tablename__)
    first = names.order_by(table.id)
    after = names.where(table.name > composed).order_by(table.name)
    before = names.where(table.name < composed).order_by(table.name.desc())
    return [near for page in (first, after, before) for near in session.scalars(page)]


def chunks(ids: Iterable[str]) -> Iterator[Sequence[str]]:
    """`ids` in pieces that one query can name."""
    every = list(ids)
    return (every[start : start + AT_ONCE] for start in range(0, len(every), AT_ONCE))


def patches_by_id(session: Session, ids: Iterable[str]) -> dict[str, models.Patch]:
    """The patches of these ids, by id."""
    query = select(models.Patch)
    return {row.id: row for some in chunks(ids) for row in session.scalars(query.where(models.Patch.id.in_(some)))}


def find_patch(session: Session, key: str) -> models.Patch:
    """The patch that `key` means: a full id, a concept's name (its newest patch) or the beginning of an id.

    A name goes before a beginning: "face" is both, and one can type more of an id but not more of a name. Raises
    NotFound, or OverpaintError with the candidates of an ambiguous beginning.
    """
    checked_name(key, "patch")
    patch = session.get(models.Patch, key.lower()) or _newest_of(session, key) or _beginning_with(session, key)
    if patch is None:
        raise _no_patch(session, key)
    return patch


def _newest_of(session: Session, concept: str) -> models.Patch | None:
    known = lookup(session, models.Concept, concept)
    if known is None:
        return None
    newest = select(models.Patch).order_by(models.Patch.solved_at.desc(), models.Patch.id.desc()).limit(1)
    return session.scalar(newest.where(models.Patch.concept_id == known.id))


def _beginning_with(session: Session, prefix: str) -> models.Patch | None:
    if not PREFIX.fullmatch(prefix):
        return None
    prefix = prefix.lower()
    # "g" sorts after every hexadecimal digit. A range uses the primary key's index, which LIKE would not.
    in_range = models.Patch.id.between(prefix, prefix + "g")
    found = session.scalars(select(models.Patch).where(in_range).order_by(models.Patch.id).limit(9)).all()
    if len(found) > 1:
        listed = "\n".join(f"  {patch.id}  {patch.concept.name} on {patch.base.name}" for patch in found[:8])
        more = "\n  ..." if len(found) > 8 else ""
        raise OverpaintError(f"{prefix} begins the id of more than one patch; type more of it:\n{listed}{more}")
    return found[0] if found else None


def _no_patch(session: Session, key: str) -> NotFound:
    if lookup(session, models.Concept, key) is not None:
        return NotFound(f"the concept {key!r} has no patch yet; solve one for it first")
    solved = select(models.Patch.concept_id).where(models.Patch.concept_id == models.Concept.id).exists()
    names = select(models.Concept.name).where(
        solved, models.Concept.name.in_(_candidates(session, models.Concept, key))
    )
    return unknown("patch", key, session.scalars(names.order_by(models.Concept.id)))
