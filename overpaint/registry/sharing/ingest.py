"""Taking patches and recipes from a layout or one file into a registry: every digest checked, only what is missing.

First everything is looked at that can be known without the arrays: documents, manifests, signatures, bases, recipes. Then
the arrays come, into blobs that nothing names yet. The rows are written last, so what is refused leaves nothing that
anybody would see. `browse` ends after the first of these: what a shared place has, and what pulling from it would change here.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from overpaint.core.concepts import Concept
from overpaint.core.encoding import header_length
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.core.names import checked_json, checked_name, checked_note, without_file_scheme
from overpaint.core.reporting import Progress, silent
from overpaint.registry.database import plain_disk_errors
from overpaint.registry.history import HistoriesDiverged, MergeOutcome, compare_histories
from overpaint.registry.registry import Registry
from overpaint.registry.sharing.documents import (
    INDEX_LIMIT,
    KEY,
    NAME,
    PATCH,
    RECIPE,
    SIGNED_LIST,
    VOCABULARY,
    BadLayout,
    Descriptor,
    Record,
    base_document,
    merge_recipe,
    read_document,
    record_of,
)
from overpaint.registry.sharing.layout import BLOCK, ArchiveReader, OciLayout, is_archive
from overpaint.registry.sharing.oci_registry import RegistryFiles
from overpaint.registry.sharing.selection import PATCH_LIMIT, PatchOffer, RecipeOffer, Selection, refuse_odd
from overpaint.registry.sharing.signing import (
    Keyring,
    SignedList,
    Trust,
    Untrusted,
    key_id,
    signatures_of,
    signed_list,
    signer_of,
)
from overpaint.registry.store import (
    DIGEST,
    MANIFEST_LIMIT,
    Array,
    BadManifest,
    BlobCorrupt,
    BlobMissing,
    Manifest,
    Parts,
    PatchFiles,
    joined,
    split,
)

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


def keep(
    registry: Registry,
    row: Arrival,
    file_digest: str,
    base: str,
    warn: Callable[[str], None],
    solved_at: datetime | None = None,
) -> None:
    """Write the row of a patch, on the base of that name, whose bytes are in the store already."""
    try:
        registry.add_concept(row.concept, exist_ok=True)
    except AlreadyExists:
        warn(
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
        solved_at=solved_at,
    )


class MissingBase(NotFound):
    """A base that patches were solved for, and that this registry does not have."""


@dataclass(frozen=True)
class Received:
    """The ids of the patches that are new here and of those that were here, what became of each recipe, bytes read."""

    new: tuple[str, ...]
    known: tuple[str, ...]
    recipes: tuple[tuple[str, MergeOutcome], ...]
    nbytes: int
    verified: bool
    """Whether a trusted key's signature was required, and so was found, for each of them."""


@dataclass(frozen=True)
class PullRequest:
    """What is asked of a source, and what it must be.

    Patches by id, its beginning or concept, and recipes by name; everything, if neither is named. With `trusted`, all that
    is taken must be signed by one of its keys, nothing that their signed lists name may be missing, and a place may show no
    older list than before unless `accept_older`. `name` is another name for the one recipe that is taken. `check` is called
    with the file of each new patch, and raises if it will not do. With everything come the kept vocabularies, if there is a
    folder `vocabularies` for them; `check_vocabulary` is called with each file.
    """

    patches: Iterable[str] = ()
    recipes: Iterable[str] = ()
    trusted: Keyring | None = None
    name: str | None = None
    accept_older: bool = False
    check: Callable[[bytes], object] = lambda file: None
    vocabularies: Path | None = None
    check_vocabulary: Callable[[Path], object] = lambda file: None
    progress: Progress = silent
    warn: Callable[[str], None] = lambda text: None


def pull(registry: Registry, source: str | Path, request: PullRequest) -> Received:
    """Take what is asked for from a folder or a URL that `fsspec` knows.

    Raises NotFound for what is not there; Untrusted; BadLayout, BadManifest or BadRecipeRecord for what contradicts itself or
    its digest; MissingBase; HistoriesDiverged when a recipe that is here has another history.
    """
    return receive(registry, existing_layout(source), request, remember=True)


def existing_layout(source: str | Path) -> OciLayout:
    """The layout at a source. Raises NotFound where nothing was pushed, BadLayout where half of one is."""
    layout = OciLayout.at(source)
    if not layout.is_there():
        if layout.files.read("index.json", limit=INDEX_LIMIT) is not None:
            raise BadLayout(f"{layout.where} lacks the file oci-layout; it was not copied whole: copy it again")
        raise NotFound(f"nothing was ever pushed to {layout.where}, or no push was finished; check the address")
    return layout


@dataclass(frozen=True)
class Offers:
    """What a layout has of what was asked for: every document read, every signature that was asked for checked."""

    entries: Sequence[Descriptor]
    trust: Trust | None
    patches: Sequence[PatchOffer]
    recipes: Sequence[RecipeOffer]

    def bases(self, registry: Registry, name: str | None) -> dict[str, str]:
        """The name here of each base by its fingerprint.

        Raises MissingBase, and HistoriesDiverged when a recipe (as `name`) has another history here.
        """
        rows = [arrival(each.manifest).fingerprint for each in self.patches]
        bases = bases_of(registry, [*rows, *(each.record.fingerprint for each in self.recipes)])
        _refuse_diverged(registry, self.recipes, name)
        return bases


def read_offers(
    registry: Registry,
    layout: OciLayout,
    entries: Sequence[Descriptor],
    request: PullRequest,
    *,
    older: bool = False,
    remember: bool = False,
) -> Offers:
    """Read the documents that are asked for. Raises what `pull` raises for them, and nothing about this registry.

    `older` compares signed lists with what this registry saw of the place before, and `remember` writes down what it sees now.
    """
    selection = Selection.by(request.patches, request.recipes)
    trust = None if request.trusted is None else Trust(layout, entries, request.trusted)
    if trust is not None:
        if older or remember:
            trust.refuse_older(registry.folder, request.accept_older, remember=remember)
        trust.refuse_removed(selection.asks_for, request.warn)
        entries = trust.entries
    patches, recipes = selection.of(layout, entries)
    if not any(each.artifact_type in (PATCH, RECIPE, VOCABULARY) for each in entries):
        request.warn(f"{layout.where} lists no patches and no recipes")
    if request.name is not None and len(recipes) != 1:
        raise OverpaintError(f"one recipe can be given another name, and this would take {len(recipes)}; name one")
    if trust is not None:
        for offer in patches:
            trust.require(offer.document, f"patch {offer.manifest.id[:12]} ({offer.concept})")
        for recipe in recipes:
            trust.require(recipe.document, f"the recipe {recipe.record.name!r}")
    return Offers(entries, trust, patches, recipes)


def receive(registry: Registry, layout: OciLayout, request: PullRequest, *, remember: bool = False) -> Received:
    """See `pull`; whether to `remember` the counters of signed lists, which only a place that changes has."""
    found = read_offers(registry, layout, layout.entries(), request, remember=remember)
    bases = found.bases(registry, request.name)
    rows = [arrival(each.manifest) for each in found.patches]
    files, nbytes, new = PatchFiles(registry.blobs), 0, dict[str, str]()
    here = registry.whole_patches([row.id for row in rows])
    for step, offer in enumerate(found.patches, 1):
        id = offer.manifest.id
        request.progress(step, len(found.patches), f"patch {id[:12]} ({offer.concept})")
        if id not in here:
            file, read = _fetched(layout, files, offer.manifest)
            request.check(file)
            files.put(id, file)
            new[id], nbytes = hashlib.sha256(file).hexdigest(), nbytes + read
    for row, offer in zip(rows, found.patches, strict=True):
        if row.id in new:
            keep(registry, row, new[row.id], bases[row.fingerprint], request.warn, offer.solved_at)
    outcomes = [
        (
            request.name or each.record.name,
            merge_recipe(registry, each.record, bases[each.record.fingerprint], request.name),
        )
        for each in found.recipes
    ]
    known = tuple(row.id for row in rows if row.id not in new)
    if request.vocabularies and Selection.by(request.patches, request.recipes).everything:
        folder, check = request.vocabularies, request.check_vocabulary
        nbytes += _take_vocabularies(layout, found.entries, folder, check, found.trust, request.warn)
    return Received(tuple(new), known, tuple(outcomes), nbytes, request.trusted is not None)


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
    """Before anything is taken; whoever changes a recipe meanwhile is noticed when it is merged."""
    for each in recipes:
        wanted = name or each.record.name
        if registry.has_recipe(wanted):
            ours = record_of(registry, wanted)
            theirs = each.record
            compare_histories(wanted, ours.revisions, ours.fingerprint, theirs.revisions, theirs.fingerprint)
        else:
            checked_name(wanted, "recipe")


def _fetched(layout: OciLayout, files: PatchFiles, manifest: Manifest) -> tuple[bytes, int]:
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


class BadFileKind(OverpaintError):
    """A file that is neither an archive nor a patch file."""


def import_file(registry: Registry, file: Path, request: PullRequest) -> Received:
    """Take what is asked for from a file.

    Nothing is unpacked, and nothing is ever executed: a file is read as an archive, as a patch file, or not at all. Raises
    NotFound when there is no such file, BadFileKind when it is neither, and what `pull` raises.
    """
    with plain_disk_errors(file, reading=True):
        if file.is_dir():
            raise NotFound(f"{file} is a folder; `overpaint pull` takes what was pushed to a folder")
        if not file.is_file():
            raise NotFound(f"there is no file {file}; name one that `overpaint export` wrote, or a patch file")
    with plain_disk_errors(file, reading=True), file.open("rb") as opened:
        beginning = opened.read(BLOCK)
        if is_archive(beginning):
            return receive(registry, OciLayout(ArchiveReader(opened, str(file))), request)
        data = _patch_file(opened, beginning, file)
    if request.trusted is not None:
        raise Untrusted(f"{file} is a bare patch file, which carries no signature; nothing was taken")
    return _import_patch(registry, data, file, request)


def _patch_file(opened: BinaryIO, beginning: bytes, path: Path) -> bytes:
    """The bytes of a file that may be a patch file: its header's length and its size are sensible. Raises BadFileKind."""
    nbytes = path.stat().st_size
    length = header_length(beginning.ljust(8, b"\xff"))
    if length > min(nbytes - 8, 3 * MANIFEST_LIMIT) or not beginning[8:9] == b"{":
        raise BadFileKind(
            f"{path} is neither an archive that `overpaint export` wrote nor a patch file; nothing in it was read further"
        )
    if nbytes > PATCH_LIMIT:
        raise BadFileKind(f"{path} has {nbytes} bytes, and a patch has at most {PATCH_LIMIT}; nothing was taken")
    opened.seek(0)
    return opened.read(nbytes)


def _import_patch(registry: Registry, data: bytes, path: Path, request: PullRequest) -> Received:
    parts = split(data)
    if parts is None:
        raise BadFileKind(
            f"{path} looks like a safetensors file, but it is not the sound file of a patch: its manifest is missing, or "
            "does not fit what follows it; take it from its source again"
        )
    refuse_odd(parts.manifest)
    row = arrival(parts.manifest)
    bases, files = bases_of(registry, [row.fingerprint]), PatchFiles(registry.blobs)
    if registry.whole_patches([row.id]):
        return Received((), (row.id,), (), 0, verified=False)
    request.check(data)
    files.put(row.id, data)
    keep(registry, row, hashlib.sha256(data).hexdigest(), bases[row.fingerprint], request.warn)
    return Received((row.id,), (), (), len(data), verified=False)


VOCABULARY_LIMIT = 1 << 30
"""The most bytes that an encoded vocabulary may have: twelve sentences of a text encoder 2,048 wide are 200 MB."""


def _take_vocabularies(
    layout: OciLayout,
    entries: Sequence[Descriptor],
    folder: Path,
    check: Callable[[Path], object],
    trust: Trust | None,
    warn: Callable[[str], None],
) -> int:
    """Put the vocabularies that a layout lists and the folder lacks there; returns how many bytes were read.

    `check` is called with each file, under its name in a place of its own, and raises OverpaintError if it will not do.
    """
    nbytes = 0
    for entry in entries:
        name = entry.annotations.get(NAME, "")
        if entry.artifact_type != VOCABULARY or not DIGEST.fullmatch(name) or (folder / f"{name}.safetensors").exists():
            continue
        try:
            if trust is not None:
                trust.require(entry.digest, f"the vocabulary {name[:12]}")
            nbytes += _vocabulary(layout, entry, folder / f"{name}.safetensors", check)
        except (OverpaintError, OSError) as error:
            warn(f"the vocabulary {name[:12]} was left out, and is computed when it is needed: {error}")
    return nbytes


def _vocabulary(layout: OciLayout, entry: Descriptor, target: Path, check: Callable[[Path], object]) -> int:
    where = f"the document {entry.digest} of {layout.where}"
    layers = read_document(layout.document(entry), where).get("layers")
    if not isinstance(layers, list) or len(layers) != 1:
        raise BadLayout(f"{where} is not that of one vocabulary")
    blob = Descriptor.from_json(layers[0], where)
    if blob.size > VOCABULARY_LIMIT:
        raise BadLayout(f"{where} claims {blob.size} bytes, and a vocabulary has at most {VOCABULARY_LIMIT}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        file = Path(scratch) / target.name
        file.write_bytes(layout.blob(blob.digest, blob.size))
        check(file)
        file.replace(target)
    return blob.size


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
            return _listing_of(registry, archive, archive.entries(), request, base, strict)
    layout = OciLayout.at(source)
    entries = _of_registry(registry, layout, base) if referring and isinstance(layout.files, RegistryFiles) else []
    return _listing_of(registry, layout, entries or existing_layout(source).entries(), request, base, strict)


def _of_registry(registry: Registry, layout: OciLayout, base: str | None) -> list[Descriptor]:
    """What the tag lists, and the patches that refer to the bases here."""
    assert isinstance(layout.files, RegistryFiles)
    entries = {each.digest: each for each in layout.listed()}
    for fingerprint in {each.fingerprint for each in registry.bases() if base in (None, each.name)}:
        for each in layout.files.referrers(base_document(fingerprint).descriptor.digest):
            if each.artifact_type == PATCH:
                entries.setdefault(each.digest, each)
    return list(entries.values())


def _listing_of(
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
