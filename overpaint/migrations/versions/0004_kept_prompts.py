"""Prompts to keep: what a base must go on understanding as it does."""

from __future__ import annotations

from typing import NoReturn

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "kept_prompt",
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("base_id", "prompt", name="pk_kept_prompt"),
        sa.ForeignKeyConstraint(["base_id"], ["base.id"], name="fk_kept_prompt_base_id_base"),
    )


def downgrade() -> NoReturn:
    raise NotImplementedError("revision 0003 has no room for what 0004 can hold; put back the backup made before")
