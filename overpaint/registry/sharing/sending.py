"""Send: patches and recipes of a registry to a layout, only what is missing there, the list of contents last."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from overpaint.core.errors import OverpaintError
from overpaint.core.progress import Progress, silent
from overpaint.registry.records import PatchRecord
from overpaint.registry.registry import Registry
from overpaint.registry.sharing.archive import new_archive
from overpaint.registry.sharing.layout import (
    NAME,
    NOTHING,
    RECIPE,
    REF,
    SIGNATURE,
    SUBJECT,
    Descriptor,
    Document,
    OciLayout,
    base_document,
    patch_document,
    recipe_document,
    record_document,
    signature_document,
)
from overpaint.registry.sharing.merge_history import Record, compared, record_of
from overpaint.registry.sharing.selection import recipe_at, refuse_odd
from overpaint.registry.sharing.signing import Signer
from overpaint.registry.sharing.vocabularies import documents
from overpaint.registry.store import PatchFiles, open_files
from overpaint.registry.store.patch_files import Manifest, Parts, split

# What the OCI image format allows for the name of a reference.
REFERENCE = re.compile(r"[A-Za-z0-9]+((--|[-._:@+])[A-Za-z0-9]+)*(/[A-Za-z0-9]+((--|[-._:@+])[A-Za-z0-9]+)*)*")


class NotShareable(OverpaintError):
    """A patch whose bytes are not in the one form that can be shared."""


@dataclass(frozen=True)
class Sent:
    """What a layout holds of what was asked for, and how much had to be written: blobs, and their bytes."""

    where: str
    patches: tuple[str, ...]
    recipes: tuple[str, ...]
    newer: tuple[str, ...]
    """Recipes that are newer there than here, and were left as they are."""
    written: int
    nbytes: int


def push(
    registry: Registry,
    destination: str | Path,
    *,
    patches: Iterable[str] = (),
    recipes: Iterable[str] = (),
    signer: Signer | None = None,
    vocabularies: Path | None = None,
    check: bool = False,
    report: Progress = silent,
) -> Sent:
    """Send patches and recipes, or everything when none are named, to a folder or a URL that `fsspec` knows.

    Everything is also the kept vocabularies of the folder `vocabularies`. A recipe brings every patch of its history. Raises
    NotFound for an unknown name, Diverged when a recipe of the same name has another history there, BlobMissing or
    BlobCorrupt when something cannot be read. Whatever stops it, the destination lists only what it holds. What is there
    already and damaged is replaced; `check` looks for damage also in large blobs behind a URL, which reads them all.
    """
    return send(
        registry,
        OciLayout(open_files(destination), check=check),
        patches=patches,
        recipes=recipes,
        signer=signer,
        vocabularies=vocabularies,
        report=report,
    )


def export(
    registry: Registry,
    file: Path,
    *,
    patches: Iterable[str] = (),
    recipes: Iterable[str] = (),
    signer: Signer | None = None,
    vocabularies: Path | None = None,
) -> Sent:
    """Write patches and recipes, with everything they need, to one new file. The same content gives the same bytes.

    Raises AlreadyExists when the file is there, and what `push` raises; nothing is left behind then.
    """
    with new_archive(file) as archive:
        return send(
            registry, OciLayout(archive), patches=patches, recipes=recipes, signer=signer, vocabularies=vocabularies
        )


def send(
    registry: Registry,
    layout: OciLayout,
    *,
    patches: Iterable[str] = (),
    recipes: Iterable[str] = (),
    signer: Signer | None = None,
    vocabularies: Path | None = None,
    report: Progress = silent,
) -> Sent:
    """See `push`."""
    patches, recipes = list(patches), list(recipes)
    everything = not patches and not recipes
    if everything:
        wanted = {record.id: record for record in registry.patches()}
        recipes = [record.name for record in registry.recipes()]
    else:
        wanted = {record.id: record for record in map(registry.patch, patches)}
    records = [record_of(registry, name) for name in recipes]
    for each in records:
        wanted.update((id, registry.patch(id)) for id in each.patches if id not in wanted)
    sender = _Sender(layout, signer)
    sender.compare(records, sender.layout.listed())  # before anything is sent
    ordered = [wanted[id] for id in sorted(wanted)]
    for step, record in enumerate(ordered, 1):
        report(step, len(ordered), f"patch {record.id[:12]} ({record.concept})")
        sender.patch(PatchFiles(registry.blobs), record)
    for each in records:
        sender.recipe(each)
    for document, name, data in documents(vocabularies) if everything and vocabularies else ():
        sender.vocabulary(document, name, data)
    newer = sender.finish(records)
    sent = tuple(each.name for each in records if each.name not in newer)
    return Sent(layout.where, tuple(sorted(wanted)), sent, tuple(sorted(newer)), sender.written, sender.nbytes)


class _Sender:
    """One push: what was written so far, and what index.json shall list in the end."""

    def __init__(self, layout: OciLayout, signer: Signer | None) -> None:
        self.layout, self.signer = layout, signer
        self.written = self.nbytes = 0
        self._documents: dict[str, Document] = {}
        self._entries: list[Descriptor] = []
        layout.begin()
        self._count(layout.put(Descriptor.of(NOTHING, "").digest, len(NOTHING), [NOTHING]))

    def compare(self, records: Iterable[Record], listed: Iterable[Descriptor]) -> set[str]:
        """The names of the recipes that are newer where they are sent. Raises Diverged."""
        there, newer = {each.annotations.get(NAME): each for each in listed if each.artifact_type == RECIPE}, set[str]()
        for record in records:
            if record.name in there:
                theirs = recipe_at(self.layout, there[record.name]).record
                if compared(record.revisions, record.fingerprint, theirs, record.name) == "updated":
                    newer.add(record.name)
        return newer

    def patch(self, files: PatchFiles, record: PatchRecord) -> None:
        """Send one patch: its arrays, its manifest, its document."""
        manifest, whole = _manifest(files, record)
        for array in manifest.arrays:
            # Read only when it is asked for, which it is not when it is there already.
            parts = (part for _ in (0,) for part in _array(files, array.name, array.digest, array.label, whole))
            self._count(self.layout.put(array.digest, len(array.label) + array.nbytes, parts))
        self._count(self.layout.put(manifest.id, len(manifest.raw), [manifest.raw]))
        document = patch_document(manifest)
        self._base(manifest.content["subject"]["fingerprint"])
        self._documents[manifest.id] = document
        concept = str(manifest.content["concept"]["name"])
        self._list(document, {REF: manifest.id, NAME: concept})

    def recipe(self, record: Record) -> None:
        """Send one recipe, whose patches have been sent."""
        self._base(record.fingerprint)
        self._count(self.layout.put(record.digest, len(record.raw), [record.raw]))
        of_record = record_document(record.raw, record.fingerprint)
        self._count(self.layout.put_document(of_record))
        marks = {NAME: record.name, **({REF: record.name} if REFERENCE.fullmatch(record.name) else {})}
        self._list(recipe_document(of_record, [self._documents[id] for id in record.patches]), marks)

    def vocabulary(self, document: Document, name: str, data: bytes) -> None:
        """Send a kept vocabulary."""
        self._count(self.layout.put(Descriptor.of(data, "").digest, len(data), [data]))
        self._list(document, {NAME: name})

    def finish(self, records: Sequence[Record]) -> set[str]:
        """List all that was sent, beside what is listed already; return the names of the recipes that are newer there."""
        newer: set[str] = set()

        def merged(before: list[Descriptor]) -> Iterable[Descriptor]:
            newer.update(self.compare(records, before))
            return _merged(before, self._entries, newer)

        self.layout.update(merged)
        return newer

    def _list(self, document: Document, marks: dict[str, str]) -> None:
        self._count(self.layout.put_document(document))
        described = document.descriptor
        self._entries.append(
            Descriptor(described.media_type, described.digest, described.size, described.artifact_type, marks)
        )
        if self.signer is not None:
            seal = self.signer.seal(described.digest)
            self._count(self.layout.put(Descriptor.of(seal, "").digest, len(seal), [seal]))
            signature = signature_document(seal, described)
            self._count(self.layout.put_document(signature))
            where = signature.descriptor
            self._entries.append(
                Descriptor(where.media_type, where.digest, where.size, SIGNATURE, {SUBJECT: described.digest})
            )

    def _base(self, fingerprint: str) -> None:
        self._count(self.layout.put_document(base_document(fingerprint)))

    def _count(self, nbytes: int) -> None:
        self.written += nbytes > 0
        self.nbytes += nbytes


def _merged(before: Iterable[Descriptor], ours: Iterable[Descriptor], newer: set[str]) -> Iterable[Descriptor]:
    """What a layout lists when `ours` has come to what was there `before`, where some recipes are `newer`."""
    ours = [each for each in ours if each.artifact_type != RECIPE or each.annotations[NAME] not in newer]
    names = {each.annotations[NAME] for each in ours if each.artifact_type == RECIPE}
    kept = (each for each in before if each.artifact_type != RECIPE or each.annotations.get(NAME) not in names)
    every = {each.digest: each for each in (*kept, *ours)}
    # The signature of a recipe that has another document now is over nothing that is listed.
    return (
        each for each in every.values() if each.artifact_type != SIGNATURE or each.annotations.get(SUBJECT) in every
    )


def _manifest(files: PatchFiles, record: PatchRecord) -> tuple[Manifest, Parts | None]:
    """The manifest of a patch, and all its parts if it is kept as a whole file. Raises NotShareable."""
    if record.id != record.blob and files.blobs.exists(record.id):
        manifest = files.manifest(record.id)
        refuse_odd(manifest)
        return manifest, None
    parts = split(files.get(record.id, record.blob))
    if parts is None or parts.manifest.id != record.id:
        raise NotShareable(
            f"the file of patch {record.id} ({record.concept}) is not in the form that can be shared; run `overpaint "
            "verify`, and solve it again"
        )
    refuse_odd(parts.manifest)
    return parts.manifest, parts


def _array(
    files: PatchFiles, name: str, digest: str, label: bytes, whole: Parts | None
) -> tuple[bytes | memoryview, ...]:
    return (files.blobs.get(digest),) if whole is None else (label, whole.values[name])
