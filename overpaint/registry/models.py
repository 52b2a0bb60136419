"""The tables. A change here needs a new file in `overpaint/migrations/versions` and a new HEAD; tests compare them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime, timezone
from functools import cache
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Date,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Text,
    UniqueConstraint,
    event,
    inspect,
)
from sqlalchemy import text as sql
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.orm.interfaces import MANYTOONE
from sqlalchemy.types import TypeDecorator

from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError

HEAD = "0005"
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


class Damaged(OverpaintError):
    """A database that another program has changed."""


class DamagedRow(Damaged):
    """A row that another program changed; `what` is wrong with it."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"the registry's database is damaged: {what}; run `overpaint verify`, then put back a backup")


def stored_json(text: str, what: str) -> dict[str, Any]:
    """A JSON object from a column. Raises DamagedRow for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedRow(f"{what} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise DamagedRow(f"{what} cannot be read (no JSON object)")
    return value


Read = Callable[[Any], Any]
"""What makes of a value as the database has it one that the program uses."""


class _Stored(TypeDecorator[Any]):
    """A column whose values are of one Python type; SQLite would keep anything in it."""

    wanted: ClassVar[type | tuple[type, ...]]
    noun: ClassVar[str]

    def result_processor(self, dialect: Dialect, coltype: object) -> Read | None:
        wanted = self.wanted

        def process(value: Any) -> Any:
            if value is None or (isinstance(value, wanted) and value not in INFINITE):
                return value
            raise DamagedRow(f"{value!r} where a {self.noun} belongs")

        return process


INFINITE = (float("inf"), float("-inf"))


class StoredText(_Stored):
    """Text of any length."""

    cache_ok, impl, wanted, noun = True, Text, str, "text"


class StoredInteger(_Stored):
    """A whole number of 32 bits."""

    cache_ok, impl, wanted, noun = True, Integer, int, "whole number"


class StoredLong(_Stored):
    """A whole number of 64 bits."""

    cache_ok, impl, wanted, noun = True, BigInteger, int, "whole number"


class StoredFloat(_Stored):
    """A finite number of double precision."""

    cache_ok, impl, wanted, noun = True, Double, (int, float), "number"


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
        try:
            return None if value is None else datetime.fromisoformat(value)
        except (ValueError, TypeError) as error:
            raise DamagedRow(f"{value!r} where a time belongs") from error


class Day(TypeDecorator[date]):
    """A date; a database that holds something else is damaged."""

    impl = Date
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Read | None:
        read = super().result_processor(dialect, coltype)

        def process(value: Any) -> date | None:
            try:
                return read(value) if read else value
            except (ValueError, TypeError) as error:
                raise DamagedRow(f"{value!r} where a day belongs") from error

        return process


class Row(DeclarativeBase):
    """The root of all tables (not called Base, because a base is something else here)."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: StoredText,
        int: StoredInteger,
        float: StoredFloat,
        datetime: UtcTime,
        date: Day,
    }


@event.listens_for(Row, "load", propagate=True)
def _refuse_dangling(row: Row, _context: object) -> None:
    """Every reference that was read along with a row leads to a row."""
    for relation, column in _references(type(row)):
        if row.__dict__.get(relation, row) is None and row.__dict__.get(column) is not None:
            raise DamagedRow(f"a {row.__tablename__} refers to a {relation} that is gone")


@cache
def _references(table: type[Row]) -> list[tuple[str, str]]:
    """The attributes of a table that lead to one row of another, each with that of the key."""
    relations = [each for each in inspect(table).relationships if each.direction is MANYTOONE]
    return [(each.key, str(column.key)) for each in relations for column in each.local_columns]


class BaseRow(Row):
    """A base model: where it was read from, and what it was."""

    __tablename__ = "base"
    __table_args__ = (UniqueConstraint("name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    source: Mapped[str]
    layout: Mapped[str]
    fingerprint: Mapped[str]
    added_at: Mapped[datetime] = mapped_column(default=now)


class ConceptRow(Row):
    """What can be erased. `definition` is the JSON of a `Concept`; name and kind are repeated so that SQL sees them."""

    __tablename__ = "concept"
    __table_args__ = (UniqueConstraint("name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    kind: Mapped[str]
    definition: Mapped[str]
    added_at: Mapped[datetime] = mapped_column(default=now)

    @property
    def concept(self) -> Concept:
        """What the row defines. Raises DamagedRow."""
        try:
            return Concept.from_json(stored_json(self.definition, f"the concept {self.name!r}"))
        except (KeyError, TypeError, AttributeError, ValueError, OverpaintError) as error:
            raise DamagedRow(f"the concept {self.name!r} cannot be read ({error})") from error


class PatchRow(Row):
    """A stored delta and where it came from. `id` is the digest of its manifest, `blob` the digest of its bytes."""

    __tablename__ = "patch"
    # Lists are read a page at a time, newest or oldest first, of everything or of one concept, base or solver.
    __table_args__ = (
        Index(None, "solved_at", "id"),
        Index(None, "concept_id", "solved_at", "id"),
        Index(None, "base_id", "solved_at", "id"),
        Index(None, "solver", "solved_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    concept_id: Mapped[int] = mapped_column(ForeignKey("concept.id"))
    base_id: Mapped[int] = mapped_column(ForeignKey("base.id"))
    solver: Mapped[str]
    kind: Mapped[str]
    settings: Mapped[str]
    seed: Mapped[int] = mapped_column(StoredLong)
    nbytes: Mapped[int] = mapped_column(StoredLong)
    blob: Mapped[str]
    seconds: Mapped[float]
    solved_at: Mapped[datetime] = mapped_column(default=now)

    # Outer joins, though there always is a concept: SQLite may begin an inner join with the other table, and then it
    # sorts all patches to show fifty. And a row whose concept was lost would not be seen to be damaged.
    concept: Mapped[ConceptRow] = relationship(lazy="joined")
    base: Mapped[BaseRow] = relationship(lazy="joined")
    tags: Mapped[list[PatchTagRow]] = relationship(lazy="selectin", order_by="PatchTagRow.tag", viewonly=True)


class PatchTagRow(Row):
    """A tag that somebody gave a patch."""

    __tablename__ = "patch_tag"

    patch_id: Mapped[str] = mapped_column(ForeignKey("patch.id"), primary_key=True)
    tag: Mapped[str] = mapped_column(primary_key=True, index=True)
    who: Mapped[str]
    at: Mapped[datetime] = mapped_column(default=now)

    patch: Mapped[PatchRow] = relationship(lazy="joined", viewonly=True)


class PatchTextRow(Row):
    """What a search of patches reads instead of the tables it was made from; see `queries.py`. Newest last."""

    __tablename__ = "patch_text"
    __table_args__ = (UniqueConstraint("patch_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    patch_id: Mapped[str] = mapped_column(ForeignKey("patch.id"))
    text: Mapped[str]


class RecipeRow(Row):
    """A base and the patches on it now. One that was deleted keeps its rows and gives up its name."""

    __tablename__ = "recipe"
    __table_args__ = (
        Index(
            "uq_recipe_name",
            "name",
            unique=True,
            # The migrations say it to PostgreSQL; here that would load its whole dialect for every command.
            sqlite_where=sql("deleted_at IS NULL"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    base_id: Mapped[int] = mapped_column(ForeignKey("base.id"))
    revision: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(default=now)
    deleted_at: Mapped[datetime | None]

    base: Mapped[BaseRow] = relationship(lazy="joined")
    patches: Mapped[list[RecipePatchRow]] = relationship(order_by="RecipePatchRow.patch_id", viewonly=True)
    tags: Mapped[list[RecipeTagRow]] = relationship(order_by="RecipeTagRow.tag", viewonly=True)


class RecipePatchRow(Row):
    """One patch of one recipe, for good or until a day."""

    __tablename__ = "recipe_patch"

    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipe.id"), primary_key=True)
    patch_id: Mapped[str] = mapped_column(ForeignKey("patch.id"), primary_key=True, index=True)
    strength: Mapped[float]
    until: Mapped[date | None] = mapped_column(index=True)

    recipe: Mapped[RecipeRow] = relationship(viewonly=True)
    patch: Mapped[PatchRow] = relationship(viewonly=True)


class RecipeTagRow(Row):
    """A tag that somebody gave a recipe, and the revision it had then."""

    __tablename__ = "recipe_tag"

    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipe.id"), primary_key=True)
    tag: Mapped[str] = mapped_column(primary_key=True, index=True)
    revision: Mapped[int]
    who: Mapped[str]
    at: Mapped[datetime] = mapped_column(default=now)

    recipe: Mapped[RecipeRow] = relationship(lazy="joined", viewonly=True)


class RecipeTextRow(Row):
    """What a search of recipes reads: one row for the name and the tags, and one for each reason ever given."""

    __tablename__ = "recipe_text"
    __table_args__ = (UniqueConstraint("recipe_id", "revision"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipe.id"))
    revision: Mapped[int]
    text: Mapped[str]


class RevisionRow(Row):
    """One act on one recipe. Rows are only ever added; those of a recipe count 1, 2, 3 without a gap. 0 is its base."""

    __tablename__ = "revision"
    __table_args__ = (
        UniqueConstraint("recipe_id", "number"),
        CheckConstraint(
            "action IN ('add', 'remove', 'strength', 'until', 'checkout', 'copy', 'delete', 'undelete')", name="action"
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipe.id"))
    number: Mapped[int]
    action: Mapped[str]
    source: Mapped[str | None]
    why: Mapped[str]
    who: Mapped[str]
    at: Mapped[datetime] = mapped_column(default=now)
    digest_before: Mapped[str | None]
    digest_after: Mapped[str | None]

    recipe: Mapped[RecipeRow] = relationship(lazy="joined", viewonly=True)
    changes: Mapped[list[RevisionPatchRow]] = relationship(order_by="RevisionPatchRow.patch_id")


class RevisionPatchRow(Row):
    """What one revision did to one patch. A strength of NULL: the recipe did not have it."""

    __tablename__ = "revision_patch"

    revision_id: Mapped[int] = mapped_column(ForeignKey("revision.id"), primary_key=True)
    patch_id: Mapped[str] = mapped_column(ForeignKey("patch.id"), primary_key=True, index=True)
    strength_before: Mapped[float | None]
    strength_after: Mapped[float | None]
    until_before: Mapped[date | None]
    until_after: Mapped[date | None]

    patch: Mapped[PatchRow] = relationship(viewonly=True)


class EvaluationRow(Row):
    """One run of one suite, on a patch alone or on a recipe as it was at a revision. Rows are only ever added.

    `digest` is that of the weights that were judged; `settings` and `versions` are JSON.
    """

    __tablename__ = "evaluation"
    __table_args__ = (
        CheckConstraint("(patch_id IS NULL) <> (recipe_id IS NULL)", name="subject"),
        CheckConstraint("(recipe_id IS NULL) = (revision IS NULL)", name="revision"),
        Index(None, "patch_id", "at"),
        Index(None, "recipe_id", "revision", "at"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    patch_id: Mapped[str | None] = mapped_column(ForeignKey("patch.id"))
    recipe_id: Mapped[int | None] = mapped_column(ForeignKey("recipe.id"))
    revision: Mapped[int | None]
    digest: Mapped[str]
    suite: Mapped[str]
    judge: Mapped[str]
    seed: Mapped[int] = mapped_column(StoredLong)
    settings: Mapped[str]
    versions: Mapped[str]
    seconds: Mapped[float]
    who: Mapped[str]
    at: Mapped[datetime] = mapped_column(default=now)

    recipe: Mapped[RecipeRow | None] = relationship(lazy="joined", viewonly=True)
    results: Mapped[list[EvaluationResultRow]] = relationship(order_by="EvaluationResultRow.number")


class EvaluationResultRow(Row):
    """One number that an evaluation found, of `n` pictures or things counted; low and high bound it with 95%."""

    __tablename__ = "evaluation_result"

    evaluation_id: Mapped[int] = mapped_column(ForeignKey("evaluation.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    subject: Mapped[str]
    metric: Mapped[str]
    value: Mapped[float]
    low: Mapped[float | None]
    high: Mapped[float | None]
    n: Mapped[int]


class PreservedPromptRow(Row):
    """A prompt to preserve in whatever is solved on a base."""

    __tablename__ = "kept_prompt"

    base_id: Mapped[int] = mapped_column(ForeignKey("base.id"), primary_key=True)
    prompt: Mapped[str] = mapped_column(primary_key=True)
    who: Mapped[str]
    at: Mapped[datetime] = mapped_column(default=now)
