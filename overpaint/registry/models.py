"""The tables. A change here needs a new file in `overpaint/migrations/versions` and a new HEAD; tests compare them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, ClassVar

from sqlalchemy import BigInteger, CheckConstraint, Double, ForeignKey, Index, MetaData, Text, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

HEAD = "0001"
"""The revision this program reads and writes. A constant, so that opening a registry need not import Alembic."""

# Named from day one: SQLite changes a table by copying it, and only a constraint with a name can be dropped on the way.
NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(timezone.utc)


class UtcTime(TypeDecorator[datetime]):
    """A moment as ISO text in UTC, which sorts by time. SQLAlchemy's own type for SQLite would drop the zone."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "a moment without a zone"
        return value.astimezone(timezone.utc).isoformat(timespec="microseconds")

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        return None if value is None else datetime.fromisoformat(value)


class Row(DeclarativeBase):
    """The root of all tables (not called Base, because a base is something else here)."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {str: Text, float: Double, datetime: UtcTime}


class Base(Row):
    """A base model: where it was read from, and what it was."""

    __tablename__ = "base"
    __table_args__ = (UniqueConstraint("name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    source: Mapped[str]
    layout: Mapped[str]
    fingerprint: Mapped[str]
    added_at: Mapped[datetime] = mapped_column(default=now)


class Concept(Row):
    """What can be erased. `definition` is the JSON of a `Concept`; name and kind are repeated so that SQL sees them."""

    __tablename__ = "concept"
    __table_args__ = (UniqueConstraint("name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    kind: Mapped[str]
    definition: Mapped[str]
    added_at: Mapped[datetime] = mapped_column(default=now)


class Patch(Row):
    """A stored delta and where it came from. `id` is the digest of its manifest, `blob` the digest of its bytes."""

    __tablename__ = "patch"

    id: Mapped[str] = mapped_column(primary_key=True)
    concept_id: Mapped[int] = mapped_column(ForeignKey("concept.id"), index=True)
    base_id: Mapped[int] = mapped_column(ForeignKey("base.id"), index=True)
    solver: Mapped[str]
    kind: Mapped[str]
    settings: Mapped[str]
    seed: Mapped[int] = mapped_column(BigInteger)
    nbytes: Mapped[int] = mapped_column(BigInteger)
    blob: Mapped[str]
    seconds: Mapped[float]
    solved_at: Mapped[datetime] = mapped_column(default=now)

    concept: Mapped[Concept] = relationship(lazy="joined", innerjoin=True)
    base: Mapped[Base] = relationship(lazy="joined", innerjoin=True)


class RecipePatch(Row):
    """One patch lying on one recipe's base."""

    __tablename__ = "recipe_patch"

    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipe.id"), primary_key=True)
    patch_id: Mapped[str] = mapped_column(ForeignKey("patch.id"), primary_key=True, index=True)
    strength: Mapped[float]


class Recipe(Row):
    """A base and what lies on it now."""

    __tablename__ = "recipe"
    __table_args__ = (UniqueConstraint("name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    base_id: Mapped[int] = mapped_column(ForeignKey("base.id"))
    created_at: Mapped[datetime] = mapped_column(default=now)

    base: Mapped[Base] = relationship(lazy="joined", innerjoin=True)
    patches: Mapped[list[RecipePatch]] = relationship(lazy="selectin", order_by=RecipePatch.patch_id, viewonly=True)


class History(Row):
    """One change of one recipe. Rows are only ever added; revisions of a recipe count 1, 2, 3 without a gap."""

    __tablename__ = "history"
    __table_args__ = (
        UniqueConstraint("recipe_id", "revision"),
        CheckConstraint("action IN ('add', 'remove', 'strength')", name="action"),
        Index(None, "patch_id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipe.id"))
    revision: Mapped[int]
    action: Mapped[str]
    patch_id: Mapped[str] = mapped_column(ForeignKey("patch.id"))
    strength_before: Mapped[float | None]
    strength_after: Mapped[float | None]
    why: Mapped[str]
    who: Mapped[str]
    at: Mapped[datetime] = mapped_column(default=now)
    digest_before: Mapped[str | None]
    digest_after: Mapped[str | None]

    recipe: Mapped[Recipe] = relationship(lazy="joined", innerjoin=True)
    patch: Mapped[Patch] = relationship(lazy="joined", innerjoin=True)
