"""Bases of a registry: opened, compared with what was added, their digests remembered beside the database."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from overpaint.bases.base import Base
from overpaint.errors import AlreadyExists, OverpaintError
from overpaint.registry.records import BaseRecord
from overpaint.registry.registry import Registry


def add_base(registry: Registry, name: str, source: str | Path) -> tuple[BaseRecord, Base]:
    """See `Workshop.add_base`."""
    if any(known.name == name for known in registry.bases()):
        raise AlreadyExists(f"a base called {name!r} is there already; choose another name")
    base = Base.open(source)
    base.recall_digests(_cache_of(registry, base))
    record = registry.add_base(name, Path(base.source), base.layout.name, base.fingerprint)
    base.keep_digests(_cache_of(registry, base))
    return record, base


def open_base(registry: Registry, name: str) -> Base:
    """The base of that name as it was when it was added. Raises NotFound, OverpaintError when its files changed."""
    record = registry.base(name)
    base = Base.open(record.source)
    base.recall_digests(_cache_of(registry, base))
    if base.fingerprint != record.fingerprint:
        raise OverpaintError(
            f"the base {name!r} at {record.source} changed since it was added: fingerprint {base.fingerprint[:12]} "
            f"instead of {record.fingerprint[:12]}; put its files back, or add it under another name"
        )
    base.keep_digests(_cache_of(registry, base))
    return base


def _cache_of(registry: Registry, base: Base) -> Path:
    return registry.folder / "cache" / "digests" / f"{sha256(str(base.path).encode()).hexdigest()[:32]}.json"
