"""The history of the registry's tables, as Alembic revisions. `overpaint.registry.schema` runs them."""

from __future__ import annotations
