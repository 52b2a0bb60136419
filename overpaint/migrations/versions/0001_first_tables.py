"""The first tables: bases, concepts, patches, recipes and their history."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_bases_and_concepts()
    _create_patches()
    _create_recipes()
    _create_history()


def downgrade() -> None:
    for table in ("history", "recipe_patch", "recipe", "patch", "concept", "base"):
        op.drop_table(table)


def _create_bases_and_concepts() -> None:
    op.create_table(
        "base",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("layout", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("added_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_base"),
        sa.UniqueConstraint("name", name="uq_base_name"),
    )
    op.create_table(
        "concept",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("definition", sa.Text(), nullable=False),
        sa.Column("added_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_concept"),
        sa.UniqueConstraint("name", name="uq_concept_name"),
    )


def _create_patches() -> None:
    op.create_table(
        "patch",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("concept_id", sa.Integer(), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("solver", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("nbytes", sa.BigInteger(), nullable=False),
        sa.Column("blob", sa.Text(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("solved_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_patch"),
        sa.ForeignKeyConstraint(["concept_id"], ["concept.id"], name="fk_patch_concept_id_concept"),
        sa.ForeignKeyConstraint(["base_id"], ["base.id"], name="fk_patch_base_id_base"),
    )
    op.create_index("ix_patch_concept_id", "patch", ["concept_id"])
    op.create_index("ix_patch_base_id", "patch", ["base_id"])


def _create_recipes() -> None:
    op.create_table(
        "recipe",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_recipe"),
        sa.UniqueConstraint("name", name="uq_recipe_name"),
        sa.ForeignKeyConstraint(["base_id"], ["base.id"], name="fk_recipe_base_id_base"),
    )
    op.create_table(
        "recipe_patch",
        sa.Column("recipe_id", sa.Integer(), nullable=False),
        sa.Column("patch_id", sa.Text(), nullable=False),
        sa.Column("strength", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("recipe_id", "patch_id", name="pk_recipe_patch"),
        sa.ForeignKeyConstraint(["recipe_id"], ["recipe.id"], name="fk_recipe_patch_recipe_id_recipe"),
        sa.ForeignKeyConstraint(["patch_id"], ["patch.id"], name="fk_recipe_patch_patch_id_patch"),
    )
    op.create_index("ix_recipe_patch_patch_id", "recipe_patch", ["patch_id"])


def _create_history() -> None:
    op.create_table(
        "history",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("recipe_id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("patch_id", sa.Text(), nullable=False),
        sa.Column("strength_before", sa.Double(), nullable=True),
        sa.Column("strength_after", sa.Double(), nullable=True),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        sa.Column("digest_before", sa.Text(), nullable=True),
        sa.Column("digest_after", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_history"),
        sa.UniqueConstraint("recipe_id", "revision", name="uq_history_recipe_id_revision"),
        sa.CheckConstraint("action IN ('add', 'remove', 'strength')", name=op.f("ck_history_action")),
        sa.ForeignKeyConstraint(["recipe_id"], ["recipe.id"], name="fk_history_recipe_id_recipe"),
        sa.ForeignKeyConstraint(["patch_id"], ["patch.id"], name="fk_history_patch_id_patch"),
    )
    op.create_index("ix_history_patch_id", "history", ["patch_id"])
