"""Digests over canonical content: one JSON encoding of a value, and one digest of many."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of many tensors: over their names and digests, sorted by name."""
    return hashlib.sha256(canonical_json(dict(digests))).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The canonical JSON of a value: sorted keys, no spaces, UTF-8. Raises ValueError on NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
