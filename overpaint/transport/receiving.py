"""Receive: patches and recipes from a layout, every digest checked on arrival, only what is missing here.

First everything is looked at that can be known without the arrays: documents, manifests, signatures, bases, recipes. Then
the arrays come, into blobs that nothing names yet. The rows are written last, so what is refused leaves nothing that
anybody would see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from overpaint.errors import NotFound, OverpaintError
from overpaint.registry.queries import patches_by_id
from overpaint.registry.registry import Registry
from overpaint.registry.store import BlobCorrupt, BlobMissing, PatchFiles, open_files
from overpaint.registry.store.manifest import Array, Manifest
from overpaint.registry.store.patch_files import Parts, joined
from overpaint.transport.arriving import arrival, keep
from overpaint.transport.choosing import Selection
from overpaint.transport.laying import lay
from overpaint.transport.layout import Layout
from overpaint.transport.oci import BadLayout, Descriptor
from overpaint.transport.reading import PatchOffer, RecipeOffer, seals_of
from overpaint.transport.records import Outcome, compared, record_of
from overpaint.transport.signing import Keyring
from overpaint.transport.vocabularies import take

Progress = Callable[[int, int, str], None]


class MissingBase(NotFound):
    """A base that patches were solved for, and that this registry does not have."""


@dataclass(frozen=True)
class Received:
    """The ids of the patches that are new here and of those that were here, what became of each recipe, bytes read."""

    new: tuple[str, ...]
    known: tuple[str, ...]
    recipes: tuple[tuple[str, Outcome], ...]
    nbytes: int


@dataclass(frozen=True)
class Request:
    """What is asked of a source, and what it must be.

    Patches by id, its beginning or concept, and recipes by name; everything, if neither is named. With `trusted`, all that
    is taken must be signed by one of its keys. `name` is another name for the one recipe that is taken. `check` is called
    with the file of each new patch, and raises if it will not do. With everything come the kept vocabularies, if there is a
    folder `vocabularies` for them; `check_vocabulary` is called with each file.
    """

    patches: Sequence[str] = ()
    recipes: Sequence[str] = ()
    trusted: Keyring | None = None
    name: str | None = None
    check: Callable[[bytes], object] = lambda file: None
    vocabularies: Path | None = None
    check_vocabulary: Callable[[Path], object] = lambda file: None
    report: Progress = lambda step, of, text: None
    notice: Callable[[str], None] = lambda text: None


def pull(registry: Registry, source: str | Path, request: Request) -> Received:
    """Take what is asked for from a folder or a URL that `fsspec` knows.

    Raises NotFound for what is not there; Untrusted; BadLayout, BadManifest or BadRecord for what contradicts itself or
    its digest; MissingBase; Diverged when a recipe that is here has another history.
    """
    layout = Layout(open_files(source))
    if not layout.is_there():
        raise NotFound(f"nothing was ever pushed to {layout.where}: it has no file oci-layout; check the address")
    return receive(registry, layout, request)


def receive(registry: Registry, layout: Layout, request: Request) -> Received:
    """See `pull`."""
    entries = layout.entries()
    offers, recipe_offers = Selection(request.patches, request.recipes).of(layout, entries)
    if request.name is not None and len(recipe_offers) != 1:
        raise OverpaintError(
            f"one recipe can be given another name, and this would take {len(recipe_offers)}; name one"
        )
    _require_trust(layout, entries, request.trusted, offers, recipe_offers)
    rows = [arrival(each.manifest) for each in offers]
    bases = bases_of(
        registry, [*(each.fingerprint for each in rows), *(each.record.fingerprint for each in recipe_offers)]
    )
    _refuse_diverged(registry, recipe_offers, request.name)

    files, nbytes, new = PatchFiles(registry.blobs), 0, dict[str, str]()
    here = whole_here(registry, files, [row.id for row in rows])
    for step, offer in enumerate(offers, 1):
        id = offer.manifest.id
        request.report(step, len(offers), f"patch {id[:12]} ({offer.concept})")
        if id not in here:
            file, read = _fetched(layout, files, offer.manifest)
            request.check(file)
            files.put(id, file)
            new[id], nbytes = hashlib.sha256(file).hexdigest(), nbytes + read
    for row in rows:
        if row.id in new:
            keep(registry, row, new[row.id], bases[row.fingerprint], request.notice)
    outcomes = [
        (request.name or each.record.name, lay(registry, each.record, bases[each.record.fingerprint], request.name))
        for each in recipe_offers
    ]
    known = tuple(row.id for row in rows if row.id not in new)
    if request.vocabularies and not request.patches and not request.recipes:
        folder, check = request.vocabularies, request.check_vocabulary
        nbytes += take(layout, entries, folder, check, request.trusted, request.notice)
    return Received(tuple(new), known, tuple(outcomes), nbytes)


def _require_trust(
    layout: Layout,
    entries: Sequence[Descriptor],
    trusted: Keyring | None,
    patches: Iterable[PatchOffer],
    recipes: Iterable[RecipeOffer],
) -> None:
    if trusted is None:
        return
    for patch in patches:
        what = f"patch {patch.manifest.id[:12]} ({patch.concept})"
        trusted.check(patch.document, seals_of(layout, entries, patch.document), what)
    for recipe in recipes:
        what = f"the recipe {recipe.record.name!r}"
        trusted.check(recipe.document, seals_of(layout, entries, recipe.document), what)


def bases_of(registry: Registry, fingerprints: Iterable[str]) -> dict[str, str]:
    """The names of the bases of these fingerprints. Raises MissingBase, naming all that are missing."""
    known: dict[str, str] = {}
    for base in registry.bases():
        known.setdefault(base.fingerprint, base.name)
    missing = sorted(set(fingerprints) - set(known))
    if missing:
        raise MissingBase(
            f"these patches were solved for a base that this registry does not have (fingerprint {', '.join(missing)}); "
            "add it first with `overpaint base add NAME FOLDER`. Nothing was taken"
        )
    return known


def _refuse_diverged(registry: Registry, recipes: Iterable[RecipeOffer], name: str | None) -> None:
    """Before anything is taken; whoever changes the recipe meanwhile is noticed when it is laid."""
    here = {each.name for each in registry.recipes()}
    for each in recipes:
        wanted = name or each.record.name
        if wanted in here:
            ours = record_of(registry, wanted)
            compared(ours.revisions, ours.fingerprint, each.record, wanted)


def whole_here(registry: Registry, files: PatchFiles, ids: Iterable[str]) -> set[str]:
    """Which of these patches have their row and all their bytes."""
    with registry._database.reading() as session:
        found = {id: row.blob for id, row in patches_by_id(session, ids).items()}
    return {id for id, blob in found.items() if files.holds(id, blob)}


def _fetched(layout: Layout, files: PatchFiles, manifest: Manifest) -> tuple[bytes, int]:
    """The file of a patch, and how many bytes of it had to be read from the layout. Raises BadLayout."""
    values, read = {}, 0
    for array in manifest.arrays:
        blob = _at_hand(files, array)
        if blob is None:
            blob = layout.blob(array.digest, len(array.label) + array.nbytes)
            read += len(blob)
        if not blob.startswith(array.label):
            raise BadLayout(f"the array {array.name} of patch {manifest.id} in {layout.where} is another array")
        values[array.name] = memoryview(blob)[len(array.label) :]
    return joined(Parts(manifest, values)), read


def _at_hand(files: PatchFiles, array: Array) -> bytes | None:
    """An array that another patch here has too."""
    if not files.blobs.exists(array.digest):
        return None
    try:
        return files.blobs.get(array.digest)
    except (BlobCorrupt, BlobMissing):
        return None  # it went to quarantine, and a sound one takes its place
