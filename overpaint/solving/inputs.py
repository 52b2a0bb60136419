"""All that a patch follows from, as its manifest tells it: equal inputs give equal patches, so nothing is solved twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overpaint.concepts import Concept
from overpaint.errors import NotFound
from overpaint.registry.records import PatchRecord
from overpaint.registry.store import BlobCorrupt, BlobMissing, PatchFiles
from overpaint.registry.store.manifest import canonical_json
from overpaint.registry.store.patch_files import embedded_manifest
from overpaint.solving.orders import BadKeep, Keep, Order, Surroundings

if TYPE_CHECKING:
    from overpaint.registry.registry import Registry
    from overpaint.solvers.problem import Solver

FEW = 20
"""Of so many concepts, patches are asked for one concept at a time."""
_PLAIN: Mapping[str, Any] = {"kind": "object", "synonyms": [], "anchor": ""}


def provenance(order: Order, method: Solver, around: Surroundings) -> dict[str, Any]:
    """What a manifest says about how its patch was solved, before any compression.

    The order's own concept is left out of the universe. Prompts to keep and pictures are named where there are any;
    pictures by what is in their files.
    """
    from overpaint.solvers.settings import settings_of

    settings = settings_of(method)
    others = sorted((each for each in around.universe if each.name != order.concept.name), key=lambda each: each.name)
    found: dict[str, Any] = {
        "name": order.solver,
        "settings": settings,
        "seed": order.seed,
        "universe": [brief(each) for each in others],
    }
    if around.keep:
        found["keep"] = sorted(around.keep)
    if settings.get("images"):
        found["pictures"] = _digests(Path(settings["images"]))
    return found


def brief(concept: Concept) -> dict[str, Any]:
    """A concept as a universe lists it: its name, and what differs from a plain object; `Concept.from_json` reads it back.

    In full, the universe of two hundred concepts would weigh more than the patch.
    """
    return {key: value for key, value in concept.as_json().items() if value != _PLAIN.get(key)}


def universe_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The other concepts that a patch was solved for, each in full; earlier versions wrote them so."""
    listed = manifest["solver"].get("universe")
    items = listed if isinstance(listed, list) else []
    return [{**_PLAIN, **item} for item in items if isinstance(item, dict)]


def _digests(folder: Path) -> list[str]:
    """The digests of a folder's files, sorted; none for a folder that is not there, which the solver will say."""
    files = sorted(folder.expanduser().iterdir()) if folder.expanduser().is_dir() else []
    return sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file())


def digest_of_order(order: Order, solved: Mapping[str, Any], fingerprint: str) -> str:
    """The digest of the inputs of an order on a base, `solved` being its provenance."""
    asked = {**solved, "compressed": [keep.as_json() for keep in order.keeps]} if order.keeps else solved
    return digest_of_manifest(
        {"concept": order.concept.as_json(), "solver": asked, "subject": {"fingerprint": fingerprint}}
    )


def digest_of_manifest(manifest: Mapping[str, Any]) -> str:
    """The digest of the inputs that a manifest names: base, concept, and how it was solved.

    Of compressions counts what they were asked to keep, not what came of it; of pictures what they show, not where they lie.
    """
    solved = {**manifest["solver"], "universe": universe_of(manifest)}
    if "pictures" in solved:
        solved["settings"] = {**solved["settings"], "images": ""}
    if "compressed" in solved:
        solved["compressed"] = [keep.as_json() for keep in keeps_of(manifest)]
    meant = [manifest["subject"]["fingerprint"], manifest["concept"], solved]
    return hashlib.sha256(canonical_json(meant)).hexdigest()


def keeps_of(manifest: Mapping[str, Any]) -> tuple[Keep, ...]:
    """The compressions that a patch went through. Raises BadKeep for what this program cannot do again."""
    steps = manifest["solver"].get("compressed", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise BadKeep("the patch's manifest does not say how it was compressed; solve its concept again")
    return tuple(Keep.from_json(step) for step in steps)


def manifest_of(registry: Registry, record: PatchRecord) -> Mapping[str, Any]:
    """What a stored patch says about itself, without reading its arrays where they are kept apart.

    Raises BlobMissing or BlobCorrupt.
    """
    files = PatchFiles(registry.blobs)
    try:
        return files.manifest(record.id).content
    except BlobMissing:
        manifest = embedded_manifest(registry.blob(record))
        if manifest is None:
            raise
        return manifest.content


def solved_before(registry: Registry, base: str, orders: Sequence[Order]) -> dict[str, PatchRecord]:
    """The patches on a base that may be what `orders` ask for, by the digest of their inputs.

    Only those are read whose row already fits: concept, solver and seed. What cannot be read, or has lost bytes, is as good
    as not solved: solving it puts the bytes back.
    """
    files = PatchFiles(registry.blobs)
    wanted = {(order.concept.name, order.solver, order.seed) for order in orders}
    found = {}
    for record in _candidates(registry, base, orders):
        if (record.concept, record.solver, record.seed) in wanted and files.holds(record.id, record.blob):
            with suppress(BadKeep, BlobCorrupt, BlobMissing):
                found[digest_of_manifest(manifest_of(registry, record))] = record
    return found


def _candidates(registry: Registry, base: str, orders: Sequence[Order]) -> Iterator[PatchRecord]:
    """The patches of a few concepts one by one; of many, all that their solvers made."""
    names = sorted({order.concept.name for order in orders})
    if len(names) > FEW:
        for solver in sorted({order.solver for order in orders}):
            yield from registry.patches(base=base, solver=solver)
        return
    for name in names:
        with suppress(NotFound):  # a concept that is new here
            yield from registry.patches(base=base, concept=name)


def as_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as provenance keeps them, in the spelling of `--set`, which reads back the same values."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
