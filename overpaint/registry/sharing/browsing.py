"""What a shared place has, and what pulling from it would change here, before anything is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from overpaint.core.names import without_file_scheme
from overpaint.registry.db_errors import plain_disk_errors
from overpaint.registry.history import HistoriesDiverged, compare_histories
from overpaint.registry.registry import Registry
from overpaint.registry.sharing.documents import (
    KEY,
    PATCH,
    SIGNED_LIST,
    BadLayout,
    Descriptor,
    Record,
    base_document,
    record_of,
)
from overpaint.registry.sharing.ingest import BadFileKind, Offers, PullRequest, existing_layout, read_offers
from overpaint.registry.sharing.layout import BLOCK, ArchiveReader, OciLayout, is_archive
from overpaint.registry.sharing.oci_registry import RegistryFiles
from overpaint.registry.sharing.selection import PatchOffer, RecipeOffer
from overpaint.registry.sharing.signing import SignedList, Untrusted, key_id, signatures_of, signed_list, signer_of


@dataclass(frozen=True)
class Listed:
    """A patch or a recipe that a place has, read from its manifest or its record and not from what the index says.

    `state` is "new", "known", "needs its base", or for a recipe also "updated", "the same", "newer here" and "diverged";
    `nbytes` is its size, `missing` how much of that a pull would read, `signed_by` the keys whose signatures fit.
    """

    what: str
    name: str
    id: str
    base: str
    """The base's name here, or its fingerprint where this registry does not have it."""
    solver: str
    kind: str
    words: tuple[str, ...]
    """The concept's name, synonyms and anchor; of a recipe its tags and the reasons in its history."""
    nbytes: int
    missing: int
    signed_by: tuple[str, ...]
    state: str

    def mentions(self, text: str) -> bool:
        """Whether every word of a text occurs in what this is called, is for and was made by."""
        mentioned = " ".join((self.what, self.name, self.id, self.base, self.solver, self.kind, *self.words)).casefold()
        return all(word in mentioned for word in text.casefold().split())


def browse(
    registry: Registry,
    source: str | Path,
    request: PullRequest,
    *,
    base: str | None = None,
    referring: bool = False,
    strict: bool = False,
) -> list[Listed]:
    """The recipes and patches of a folder, a URL, a registry or an archive that a pull with this request would take.

    Only those for `base`, if it is named. With `referring`, also the patches that an OCI registry has for it, or for any base
    here, under whatever tag. `strict` raises what the pull would raise; otherwise nothing is refused but what contradicts
    itself or is not signed as the request asks. Nothing is written.
    """
    path = Path(without_file_scheme(str(source)))
    with plain_disk_errors(path, reading=True):
        is_file = path.is_file()
    if is_file:
        with plain_disk_errors(path, reading=True), path.open("rb") as opened:
            if not is_archive(opened.read(BLOCK)):
                raise BadFileKind(
                    f"{path} is no archive that `overpaint export` wrote; `overpaint import` takes a patch file"
                )
            archive = OciLayout(ArchiveReader(opened, str(path)))
            return _listed(registry, archive, archive.entries(), request, base, strict)
    layout = OciLayout.at(source)
    entries = _of_registry(registry, layout, base) if referring and isinstance(layout.files, RegistryFiles) else []
    return _listed(registry, layout, entries or existing_layout(source).entries(), request, base, strict)


def _of_registry(registry: Registry, layout: OciLayout, base: str | None) -> list[Descriptor]:
    """What the tag lists, and the patches that refer to the bases here."""
    assert isinstance(layout.files, RegistryFiles)
    entries = {each.digest: each for each in layout.listed()}
    for fingerprint in {each.fingerprint for each in registry.bases() if base in (None, each.name)}:
        for each in layout.files.referrers(base_document(fingerprint).descriptor.digest):
            if each.artifact_type == PATCH:
                entries.setdefault(each.digest, each)
    return list(entries.values())


def _listed(
    registry: Registry,
    layout: OciLayout,
    entries: Sequence[Descriptor],
    request: PullRequest,
    base: str | None,
    strict: bool,
) -> list[Listed]:
    offers = read_offers(registry, layout, entries, request, older=True)
    if strict:
        offers.bases(registry, request.name)
    wanted = None if base is None else registry.base(base).fingerprint
    listing = _Listing(registry, layout, offers)
    return [
        *(listing.recipe(each, request.name) for each in offers.recipes if wanted in (None, each.record.fingerprint)),
        *(listing.patch(each) for each in offers.patches if wanted in (None, each.fingerprint)),
    ]


class _Listing:
    """How the offers of a layout look from a registry."""

    def __init__(self, registry: Registry, layout: OciLayout, offers: Offers) -> None:
        self._registry, self._layout, self._offers = registry, layout, offers
        self._bases = {each.fingerprint: each.name for each in reversed(registry.bases())}
        self._known = registry.whole_patches([each.manifest.id for each in offers.patches])
        keys = {each.annotations.get(KEY, "") for each in offers.entries if each.artifact_type == SIGNED_LIST}
        self._lists = [each for key in sorted(keys) for each in self._list_of(key)]

    def patch(self, offer: PatchOffer) -> Listed:
        manifest = offer.manifest
        concept, sizes = manifest.content["concept"], {a.digest: len(a.label) + a.nbytes for a in manifest.arrays}
        known = manifest.id in self._known
        missing = 0 if known else sum(size for digest, size in sizes.items() if not self._registry.blobs.exists(digest))
        return Listed(
            what="patch",
            name=offer.concept,
            id=manifest.id,
            base=self._bases.get(offer.fingerprint, offer.fingerprint),
            solver=str(manifest.content["solver"]["name"]),
            kind=str(manifest.content["kind"]),
            words=tuple(map(str, (*(concept.get("synonyms") or ()), concept.get("anchor") or ""))),
            nbytes=len(manifest.raw) + sum(sizes.values()),
            missing=missing,
            signed_by=self._signers(offer.document),
            state="known" if known else "new" if offer.fingerprint in self._bases else "needs its base",
        )

    def recipe(self, offer: RecipeOffer, name: str | None) -> Listed:
        record = offer.record
        return Listed(
            what="recipe",
            name=name or record.name,
            id=record.digest,
            base=self._bases.get(record.fingerprint, record.fingerprint),
            solver="",
            kind=f"{len(record.revisions)} revisions",
            words=tuple(map(str, (*(t["tag"] for t in record.tags), *(r["why"] or "" for r in record.revisions)))),
            nbytes=len(record.raw),
            missing=len(record.raw),
            signed_by=self._signers(offer.document),
            state=self._recipe_state(record, name or record.name),
        )

    def _recipe_state(self, record: Record, name: str) -> str:
        if record.fingerprint not in self._bases:
            return "needs its base"
        if not self._registry.has_recipe(name):
            return "new"
        ours = record_of(self._registry, name)
        try:
            return compare_histories(name, ours.revisions, ours.fingerprint, record.revisions, record.fingerprint)
        except HistoriesDiverged:
            return "diverged"

    def _list_of(self, key: str) -> Iterator[SignedList]:
        with suppress(BadLayout, Untrusted, ValueError):
            if found := signed_list(self._layout, self._offers.entries, bytes.fromhex(key)):
                yield found

    def _signers(self, document: str) -> tuple[str, ...]:
        """The ids of the keys that signed a document, or a list that names it."""
        keys = {signer_of(each, document) for each in signatures_of(self._layout, self._offers.entries, document)}
        keys |= {each.key for each in self._lists if document in {member.digest for member in each.members}}
        return tuple(sorted(key_id(key) for key in keys if key is not None))


def would_change(listed: Sequence[Listed]) -> str:
    """One sentence about what a pull of these would do here."""
    patches = [each for each in listed if each.what == "patch"]
    new = [each for each in patches if each.state != "known"]
    recipes = [f"{each.name} ({each.state})" for each in listed if each.what == "recipe"]
    nbytes = sum(each.missing for each in new)
    about = f"; recipes: {', '.join(recipes)}" if recipes else ""
    return (
        f"{len(new)} of {len(patches)} patches would be new, {nbytes:,} bytes would be read{about}. Nothing was changed"
    )
