"""Runs the revisions on the connection it is given. Alembic executes this file; nothing imports it.

The caller has begun a transaction, so all revisions happen or none does.
"""

from __future__ import annotations

from alembic import context

from overpaint.registry.models import Row

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Row.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
