"""Revisions that change several patches, deleted recipes, patches that lapse, tags, texts to search, paged lists."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from typing import Any, NoReturn

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ACTIONS = "action IN ('add', 'remove', 'strength', 'until', 'checkout', 'copy', 'delete', 'undelete')"
BATCH = 1000


def upgrade() -> None:
    _count_and_delete_recipes()
    _split_history()
    _let_patches_lapse()
    _create_tags()
    _create_texts()
    _index_lists()


def downgrade() -> NoReturn:
    raise NotImplementedError("revision 0001 has no room for what 0002 can hold; put back the backup made before")


def _count_and_delete_recipes() -> None:
    with op.batch_alter_table("recipe") as table:
        table.add_column(sa.Column("revision", sa.Integer(), nullable=True))
        table.add_column(sa.Column("deleted_at", sa.Text(), nullable=True))
        table.drop_constraint("uq_recipe_name", type_="unique")
    op.execute("UPDATE recipe SET revision = (SELECT count(*) FROM history WHERE history.recipe_id = recipe.id)")
    with op.batch_alter_table("recipe") as table:
        table.alter_column("revision", existing_type=sa.Integer(), nullable=False)
    living = sa.text("deleted_at IS NULL")
    op.create_index("uq_recipe_name", "recipe", ["name"], unique=True, sqlite_where=living, postgresql_where=living)


def _split_history() -> None:
    op.create_table(
        "revision",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("recipe_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=True),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        sa.Column("digest_before", sa.Text(), nullable=True),
        sa.Column("digest_after", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_revision"),
        sa.UniqueConstraint("recipe_id", "number", name="uq_revision_recipe_id_number"),
        sa.CheckConstraint(ACTIONS, name=op.f("ck_revision_action")),
        sa.ForeignKeyConstraint(["recipe_id"], ["recipe.id"], name="fk_revision_recipe_id_recipe"),
    )
    op.create_table(
        "revision_patch",
        sa.Column("revision_id", sa.Integer(), nullable=False),
        sa.Column("patch_id", sa.Text(), nullable=False),
        sa.Column("strength_before", sa.Double(), nullable=True),
        sa.Column("strength_after", sa.Double(), nullable=True),
        sa.Column("until_before", sa.Date(), nullable=True),
        sa.Column("until_after", sa.Date(), nullable=True),
        sa.PrimaryKeyConstraint("revision_id", "patch_id", name="pk_revision_patch"),
        sa.ForeignKeyConstraint(["revision_id"], ["revision.id"], name="fk_revision_patch_revision_id_revision"),
        sa.ForeignKeyConstraint(["patch_id"], ["patch.id"], name="fk_revision_patch_patch_id_patch"),
    )
    op.create_index("ix_revision_patch_patch_id", "revision_patch", ["patch_id"])
    op.execute(
        "INSERT INTO revision (recipe_id, number, action, why, who, at, digest_before, digest_after) "
        "SELECT recipe_id, revision, action, why, who, at, digest_before, digest_after FROM history ORDER BY id"
    )
    op.execute(
        "INSERT INTO revision_patch (revision_id, patch_id, strength_before, strength_after) "
        "SELECT revision.id, history.patch_id, history.strength_before, history.strength_after FROM history "
        "JOIN revision ON revision.recipe_id = history.recipe_id AND revision.number = history.revision"
    )
    op.drop_table("history")


def _let_patches_lapse() -> None:
    op.add_column("recipe_patch", sa.Column("until", sa.Date(), nullable=True))
    op.create_index("ix_recipe_patch_until", "recipe_patch", ["until"])


def _create_tags() -> None:
    op.create_table(
        "patch_tag",
        sa.Column("patch_id", sa.Text(), nullable=False),
        sa.Column("tag", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("patch_id", "tag", name="pk_patch_tag"),
        sa.ForeignKeyConstraint(["patch_id"], ["patch.id"], name="fk_patch_tag_patch_id_patch"),
    )
    op.create_index("ix_patch_tag_tag", "patch_tag", ["tag"])
    op.create_table(
        "recipe_tag",
        sa.Column("recipe_id", sa.Integer(), nullable=False),
        sa.Column("tag", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("recipe_id", "tag", name="pk_recipe_tag"),
        sa.ForeignKeyConstraint(["recipe_id"], ["recipe.id"], name="fk_recipe_tag_recipe_id_recipe"),
    )
    op.create_index("ix_recipe_tag_tag", "recipe_tag", ["tag"])


def _create_texts() -> None:
    patch_text = op.create_table(
        "patch_text",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("patch_id", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_patch_text"),
        sa.UniqueConstraint("patch_id", name="uq_patch_text_patch_id"),
        sa.ForeignKeyConstraint(["patch_id"], ["patch.id"], name="fk_patch_text_patch_id_patch"),
    )
    recipe_text = op.create_table(
        "recipe_text",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("recipe_id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_recipe_text"),
        sa.UniqueConstraint("recipe_id", "revision", name="uq_recipe_text_recipe_id_revision"),
        sa.ForeignKeyConstraint(["recipe_id"], ["recipe.id"], name="fk_recipe_text_recipe_id_recipe"),
    )
    assert patch_text is not None
    assert recipe_text is not None
    _fill(
        patch_text,
        "SELECT patch.id, patch.base_id, patch.solver, patch.kind, base.name, concept.definition FROM patch "
        "JOIN base ON base.id = patch.base_id JOIN concept ON concept.id = patch.concept_id "
        "ORDER BY patch.solved_at, patch.id",
        _patch_text,
    )
    _fill(
        recipe_text,
        "SELECT recipe.id, 0, recipe.name, base.name FROM recipe JOIN base ON base.id = recipe.base_id "
        "ORDER BY recipe.id",
        _recipe_text,
    )
    _fill(recipe_text, "SELECT recipe_id, number, why, '' FROM revision WHERE why <> '' ORDER BY id", _recipe_text)


def _fill(table: sa.Table, query: str, row_of: Any) -> None:
    """Turn each row of `query` into a row of `table`, a batch at a time."""
    # Read to the end first: one connection cannot write while it is being read.
    rows = op.get_bind().execute(sa.text(query)).fetchall()
    for start in range(0, len(rows), BATCH):
        op.bulk_insert(table, [row_of(*row) for row in rows[start : start + BATCH]])


# The texts as the program of this revision writes them; a later program may write them otherwise.


def _patch_text(patch_id: str, base_id: int, solver: str, kind: str, base: str, definition: str) -> dict[str, Any]:
    concept = json.loads(definition)
    words = [*dict.fromkeys([concept["name"], *concept["synonyms"]]), concept["anchor"], concept["kind"], kind]
    marks = [f"\x1c{concept['kind']}", f"\x1d{solver}", f"\x1e{base_id}"]
    return {"patch_id": patch_id, "text": _text([*words, solver, base, *marks])}


def _recipe_text(recipe_id: int, number: int, first: str, second: str) -> dict[str, Any]:
    return {"recipe_id": recipe_id, "revision": number, "text": _text([first, second])}


def _text(lines: Iterable[str]) -> str:
    return "\n".join(["", *(_folded(line) for line in lines if line), ""])


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _index_lists() -> None:
    op.drop_index("ix_patch_concept_id", "patch")
    op.drop_index("ix_patch_base_id", "patch")
    op.create_index("ix_patch_solved_at_id", "patch", ["solved_at", "id"])
    for column in ("concept_id", "base_id", "solver"):
        op.create_index(f"ix_patch_{column}_solved_at_id", "patch", [column, "solved_at", "id"])
