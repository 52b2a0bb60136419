"""Finding rows by what people call them."""

from __future__ import annotations

import re
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from overpaint.errors import NotFound, OverpaintError
from overpaint.registry import models
from overpaint.registry.names import checked_name, unknown

PREFIX = re.compile(r"[0-9a-fA-F]{4,64}")

Named = TypeVar("Named", models.Base, models.Concept, models.Recipe)


def lookup(session: Session, table: type[Named], name: str) -> Named | None:
    """The row of that name, or None."""
    return session.scalar(select(table).where(table.name == checked_name(name, table.__tablename__)))


def find(session: Session, table: type[Named], name: str) -> Named:
    """The row of that name. Raises NotFound with the nearest names."""
    row = lookup(session, table, name)
    if row is None:
        raise unknown(table.__tablename__, name, session.scalars(select(table.name).order_by(table.id)))
    return row


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
    newest = select(models.Patch).join(models.Patch.concept).order_by(models.Patch.solved_at.desc(), models.Patch.id)
    return session.scalars(newest.where(models.Concept.name == checked_name(concept, "patch")).limit(1)).first()


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
    solved = select(models.Concept.name).join(models.Patch).distinct().order_by(models.Concept.id)
    return unknown("patch", key, session.scalars(solved))
