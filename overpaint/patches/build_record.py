"""What a built checkpoint says about itself: a record in the header of every weight file that the build wrote anew.

Beside what the recipe adds (its name, its base's name, each patch's concept), a record holds: `layout`; `base`, the base's
fingerprint; `patches`, with `id` and `strength`; `tensors`, the digest of each tensor of this file that the patches
changed; `components` and `digest`, those of the whole composition; `earlier`, the records of builds that this one began from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from overpaint.bases.base import Base
from overpaint.bases.safetensors_file import SafetensorsFile
from overpaint.core.encoding import KEY, canonical_json, combined_digest
from overpaint.core.errors import OverpaintError
from overpaint.patches.compose import Term

FORMAT = 1
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""What other programs write about the bytes that follow; no longer true when these change."""


class BadRecord(OverpaintError):
    """A record that is damaged or of a newer format."""


def record_of(base: Base, terms: Iterable[Term], details: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a build, but for its digests. `details` are the recipe's own words.

    Ids and strengths come from the terms, so that a record says what was applied, whatever the details say.
    """
    known = {patch.get("id"): patch for patch in details.get("patches", ())}
    patches = [
        {**known.get(term.id, {}), "id": term.id, "strength": term.strength}
        for term in sorted(terms, key=lambda t: t.id)
    ]
    earlier = _chain(base)
    about = {"format": FORMAT, "layout": base.layout.name, "base": base.fingerprint, "patches": patches}
    return {**details, **about, **({"earlier": earlier} if earlier else {})}


def _chain(base: Base) -> list[dict[str, Any]]:
    """The records that a base's own files carry, oldest first, each once."""
    by_digest: dict[bytes, dict[str, Any]] = {}
    for record in records(base.containers.values()):
        for one in (*record.get("earlier", ()), record):
            # The tensors it names are others by now.
            bare = {key: value for key, value in one.items() if key not in ("earlier", "tensors")}
            by_digest[canonical_json(bare)] = bare
    return list(by_digest.values())


def with_digests(record: Mapping[str, Any], tensors: Mapping[str, str], whole: Mapping[str, str]) -> dict[str, Any]:
    """A record with the digests of a file's changed `tensors` and of the `whole` composition, both by canonical name."""
    return {
        **record,
        "tensors": dict(tensors),
        "components": component_digests(whole),
        "digest": combined_digest(whole),
    }


def component_digests(digests: Mapping[str, str]) -> dict[str, str]:
    """One digest per component."""
    parts: dict[str, dict[str, str]] = {}
    for name, digest in digests.items():
        parts.setdefault(name.partition("/")[0], {})[name] = digest
    return {component: combined_digest(found) for component, found in sorted(parts.items())}


def metadata_with(metadata: Mapping[str, str], record: Mapping[str, Any]) -> dict[str, str]:
    """A file's metadata with a record in it, and without what the new bytes make untrue."""
    kept = {key: text for key, text in metadata.items() if key not in _STALE}
    return {**kept, KEY: canonical_json(record).decode()}


def records(containers: Iterable[SafetensorsFile]) -> list[dict[str, Any]]:
    """The records that weight files carry. Raises BadRecord for one that cannot be read."""
    records = (read_record(container) for container in containers)
    return [record for record in records if record is not None]


def read_record(container: SafetensorsFile) -> dict[str, Any] | None:
    """The record in a file's header, None when Overpaint did not build it. Raises BadRecord."""
    if KEY not in container.metadata:
        return None
    damaged = BadRecord(f"{container.path} has a record that is damaged; build it again, or get it again")
    try:
        record: dict[str, Any] = json.loads(container.metadata[KEY])
        if "arrays" in record:
            return None  # the manifest of a patch
        version, sound = record["format"], _is_sound(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    if version != FORMAT:
        raise BadRecord(f"{container.path} was built with format {version!r} of records; upgrade Overpaint to read it")
    if not sound:
        raise damaged
    return record


def _is_sound(record: dict[str, Any]) -> bool:
    """Whether what is read from a record has the types it should; raises where something is missing."""
    canonical_json(record)
    patches = [patch for one in (*record.get("earlier", ()), record) for patch in one["patches"]]
    texts = [record["layout"], record["base"], record["digest"], *record["tensors"].values()]
    texts += [*record["components"].values(), *(patch["id"] for patch in patches)]
    return all(isinstance(t, str) for t in texts) and all(isinstance(p["strength"], int | float) for p in patches)
