"""Evaluations: what a suite measured of a patch alone, or of a recipe as it was at a revision."""

from __future__ import annotations

from typing import NoReturn

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "evaluation",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("patch_id", sa.Text(), nullable=True),
        sa.Column("recipe_id", sa.Integer(), nullable=True),
        sa.Column("revision", sa.Integer(), nullable=True),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("suite", sa.Text(), nullable=False),
        sa.Column("judge", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("versions", sa.Text(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_evaluation"),
        sa.CheckConstraint("(patch_id IS NULL) <> (recipe_id IS NULL)", name=op.f("ck_evaluation_subject")),
        sa.CheckConstraint("(recipe_id IS NULL) = (revision IS NULL)", name=op.f("ck_evaluation_revision")),
        sa.ForeignKeyConstraint(["patch_id"], ["patch.id"], name="fk_evaluation_patch_id_patch"),
        sa.ForeignKeyConstraint(["recipe_id"], ["recipe.id"], name="fk_evaluation_recipe_id_recipe"),
    )
    op.create_index("ix_evaluation_patch_id_at", "evaluation", ["patch_id", "at"])
    op.create_index("ix_evaluation_recipe_id_revision_at", "evaluation", ["recipe_id", "revision", "at"])
    op.create_table(
        "evaluation_result",
        sa.Column("evaluation_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("low", sa.Double(), nullable=True),
        sa.Column("high", sa.Double(), nullable=True),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("evaluation_id", "number", name="pk_evaluation_result"),
        sa.ForeignKeyConstraint(
            ["evaluation_id"], ["evaluation.id"], name="fk_evaluation_result_evaluation_id_evaluation"
        ),
    )


def downgrade() -> NoReturn:
    raise NotImplementedError("revision 0002 has no room for what 0003 can hold; put back the backup made before")
