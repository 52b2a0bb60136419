"""Patch files made without PyTorch, so that processes which are killed by the hundred need not load it."""

from __future__ import annotations

import array
import random
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from overpaint.core.concepts import Concept
from overpaint.core.encoding import canonical_json
from overpaint.registry import PatchRecord, Registry
from overpaint.registry.store import Parts, digest_of, embedded_manifest, joined, read_manifest

FINGERPRINT = "f" * 8
"""Of the base "small" that `shelf.stock` adds."""


def numbers(seed: str | int, *shape: int) -> tuple[tuple[int, ...], bytes]:
    """A shape, and as many random float32 values."""
    source, count = random.Random(seed), 1
    for side in shape:
        count *= side
    return shape, array.array("f", (source.gauss(0, 1) for _ in range(count))).tobytes()


def patch_file(
    label: str,
    arrays: Mapping[str, tuple[tuple[int, ...], bytes]] | None = None,
    *,
    concept: Concept | None = None,
    fingerprint: str = FINGERPRINT,
    **changes: Any,
) -> bytes:
    """A patch file whose content follows from `label`; `changes` replace or add fields of its manifest."""
    arrays = arrays or {f"text_encoder/{side}": numbers(f"{label}/{side}", 16, 2) for side in ("up", "down")}
    listed = {}
    for name, (shape, values) in arrays.items():
        digest = digest_of([canonical_json([name, "float32", list(shape)]), values])
        listed[name] = {"dtype": "float32", "shape": list(shape), "digest": digest}
    manifest = {
        "format": 1,
        "kind": "text-map",
        "concept": (concept or Concept("apple", anchor="pear")).as_json(),
        "solver": {"name": "uce", "settings": {"lambda": 0.1}, "seed": 7, "label": label},
        "subject": {"fingerprint": fingerprint, "tensors": digest_of([b"tensors"]), "count": 32},
        "arrays": listed,
        **changes,
    }
    read = read_manifest(canonical_json(manifest))
    return joined(Parts(read, {name: values for name, (_, values) in arrays.items()}))


def id_of(file: bytes) -> str:
    """The id of a patch file's patch."""
    manifest = embedded_manifest(file)
    assert manifest is not None
    return manifest.id


def keep(registry: Registry, file: bytes, *, base: str = "small", solved_at: datetime | None = None) -> PatchRecord:
    """Add a patch file to a registry, with the row that its manifest asks for."""
    manifest = embedded_manifest(file)
    assert manifest is not None
    content = manifest.content
    return registry.add_patch(
        id=manifest.id,
        blob=file,
        concept=content["concept"]["name"],
        base=base,
        solver=content["solver"]["name"],
        kind=content["kind"],
        settings=content["solver"]["settings"],
        seed=content["solver"]["seed"],
        seconds=0.5,
        solved_at=solved_at,
    )
