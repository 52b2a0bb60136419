"""What a manifest that arrived means for the rows of a registry, and writing them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from overpaint.concepts import Concept
from overpaint.errors import AlreadyExists, OverpaintError
from overpaint.registry.names import checked_json, checked_name, checked_note
from overpaint.registry.registry import Registry
from overpaint.registry.store import PatchFiles
from overpaint.registry.store.manifest import BadManifest, Manifest

LARGEST_SEED = 2**63


@dataclass(frozen=True)
class Arrival:
    """The row that a manifest asks for; `fingerprint` is that of the base."""

    id: str
    concept: Concept
    solver: str
    kind: str
    settings: dict[str, Any]
    seed: int
    fingerprint: str


def arrival(manifest: Manifest) -> Arrival:
    """Read a manifest that `refuse_odd` let pass. Raises BadManifest for what no row could hold."""
    content = manifest.content
    solver = content["solver"]
    settings, seed = solver.get("settings", {}), solver.get("seed", 0)
    try:
        if not isinstance(settings, dict) or type(seed) is not int or not -LARGEST_SEED <= seed < LARGEST_SEED:
            raise BadManifest("its solver's settings or seed are none")
        checked_json(settings, "the settings of a patch")
        return Arrival(
            id=manifest.id,
            concept=_concept(content["concept"]),
            solver=checked_name(solver["name"], "solver"),
            kind=checked_name(content["kind"], "kind of patch"),
            settings=settings,
            seed=seed,
            fingerprint=checked_name(content["subject"]["fingerprint"], "fingerprint"),
        )
    except (OverpaintError, TypeError, AttributeError) as error:
        raise BadManifest(f"the manifest {manifest.id} is no patch's: {error}; nothing was taken") from error


def _concept(value: dict[str, Any]) -> Concept:
    lists = [value.get(key, []) for key in ("synonyms", "prompts")]
    words = [value.get("name"), value.get("anchor", ""), *(word for words in lists for word in words)]
    if not all(isinstance(each, list) for each in lists) or not all(isinstance(word, str) for word in words):
        raise BadManifest("its concept is not made of words")
    concept = Concept.from_json(value)
    for word in filter(None, (*concept.words, concept.anchor)):
        checked_name(word, "concept")
    for prompt in concept.prompts:
        checked_note(prompt, f"a prompt of {concept.name!r}")
    return concept


def keep(registry: Registry, row: Arrival, file_digest: str, base: str, notice: Callable[[str], None]) -> None:
    """Write the row of a patch, on the base of that name, whose bytes are in the store already."""
    try:
        registry.ensure_concept(row.concept)
    except AlreadyExists:
        notice(
            f"the concept {row.concept.name!r} is known here with other synonyms or another anchor and stays as it is; "
            f"patch {row.id[:12]} keeps its own"
        )
    registry.add_patch(
        id=row.id,
        blob=PatchFiles(registry.blobs).get(row.id, file_digest),
        concept=row.concept.name,
        base=base,
        solver=row.solver,
        kind=row.kind,
        settings=row.settings,
        seed=row.seed,
        seconds=0.0,
    )
