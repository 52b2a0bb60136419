"""Send: patches and recipes of a registry to a layout, only what is missing there, the list of contents last."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import Progress, silent
from overpaint.registry.history import compare_histories
from overpaint.registry.records import PatchRecord
from overpaint.registry.registry import Registry
from overpaint.registry.sharing.documents import (
    COUNTER,
    CREATED,
    KEY,
    NAME,
    NOTHING,
    RECIPE,
    REF,
    REVISIONS,
    SIGNATURE,
    SIGNED_LIST,
    SUBJECT,
    BadLayout,
    Descriptor,
    Document,
    Record,
    base_document,
    list_document,
    patch_document,
    recipe_document,
    record_document,
    record_of,
    signature_document,
    vocabulary_document,
)
from overpaint.registry.sharing.hub import Beside
from overpaint.registry.sharing.layout import OciLayout, new_archive
from overpaint.registry.sharing.selection import Selection, recipe_at, refuse_odd
from overpaint.registry.sharing.signing import SignedList, Signer, Untrusted, refuse_older, seen_counter, signed_list
from overpaint.registry.sharing.signing import remember as remember_counters
from overpaint.registry.store import DIGEST, Manifest, Parts, PatchFiles, bytes_of_patch, split

# What the OCI image format allows for the name of a reference.
REFERENCE = re.compile(r"[A-Za-z0-9]+((--|[-._:@+])[A-Za-z0-9]+)*(/[A-Za-z0-9]+((--|[-._:@+])[A-Za-z0-9]+)*)*")
WORKERS = 8
"""How many patches are sent at a time."""


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
    overwrite: bool = False,
    accept_older: bool = False,
    beside: Beside = lambda entries: {},
    progress: Progress = silent,
) -> Sent:
    """Send patches and recipes, or everything when none are named, to a folder, a URL, an OCI registry or the Hub.

    Everything is also the kept vocabularies of the folder `vocabularies`. A recipe brings every patch of its history. Raises
    NotFound for an unknown name, HistoriesDiverged when a recipe of the same name has another history there, BlobMissing or
    BlobCorrupt when something cannot be read. Whatever stops it, the destination lists only what it holds. What is there
    already and damaged is replaced; `check` looks for damage also in large blobs behind a URL, which reads them all. A tag
    of an OCI registry that holds something else than patches is moved only with `overwrite`. `beside` gives what a commit on
    the Hub has beside them.

    With a `signer`, all that its key has signed there is on its signed list. Raises Untrusted when the place shows an older
    list than this registry saw there, unless `accept_older`.
    """
    return send(
        registry,
        OciLayout.at(destination, check=check, overwrite=overwrite, beside=beside),
        patches=patches,
        recipes=recipes,
        signer=signer,
        vocabularies=vocabularies,
        remember=True,
        accept_older=accept_older,
        progress=progress,
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
        layout = OciLayout(archive)
        layout.begin()
        return send(
            registry,
            layout,
            patches=patches,
            recipes=recipes,
            signer=signer,
            vocabularies=vocabularies,
            workers=1,  # the order of an archive's files decides its bytes
        )


def send(
    registry: Registry,
    layout: OciLayout,
    *,
    patches: Iterable[str] = (),
    recipes: Iterable[str] = (),
    signer: Signer | None = None,
    vocabularies: Path | None = None,
    remember: bool = False,
    accept_older: bool = False,
    workers: int = WORKERS,
    progress: Progress = silent,
) -> Sent:
    """See `push`; whether to `remember` the counter of the signed list, which only a place that changes has.

    `workers` patches are sent at a time, and no more than those are in memory.
    """
    asked = Selection.by(patches, recipes)
    found = registry.patches() if asked.everything else map(registry.patch, asked.patches)
    wanted = {record.id: record for record in found}
    names = registry.recipe_names() if asked.everything else asked.recipes
    records = [record_of(registry, name) for name in names]
    for each in records:
        wanted.update((id, registry.patch(id)) for id in each.patches if id not in wanted)
    layout.is_there()  # refuses what is there and is no layout
    sender = _Sender(layout, signer)
    listed = layout.listed()
    if remember and signer is not None:
        sender.counter = seen_counter(registry.folder, layout.where, signer.public)
        if listed:  # a place that is empty was begun anew
            known = sender.known_list(listed)
            counters = {signer.public.hex(): known.counter if known else 0}
            refuse_older(registry.folder, layout.where, counters, accept_older)
    with suppress(BadLayout):  # what is damaged there may be mended now, and is looked at again in the end
        sender.compare(records, listed)
    ordered = [wanted[id] for id in sorted(wanted)]
    sender.patches(PatchFiles(registry.blobs), ordered, workers, progress)
    for each in records:
        sender.recipe(each)
    for document, name, data in _vocabularies(vocabularies) if asked.everything and vocabularies else ():
        sender.vocabulary(document, name, data)
    newer = sender.finish(records)
    if remember and signer is not None:
        remember_counters(registry.folder, layout.where, {signer.public.hex(): sender.counter})
    sent = tuple(each.name for each in records if each.name not in newer)
    return Sent(layout.where, tuple(sorted(wanted)), sent, tuple(sorted(newer)), sender.written, sender.nbytes)


class _Sender:
    """One push: what was written so far, and what index.json shall list in the end."""

    def __init__(self, layout: OciLayout, signer: Signer | None) -> None:
        self.layout, self.signer, self.counter = layout, signer, 0
        self.written = self.nbytes = 0
        self._documents: dict[str, Document] = {}
        self._entries: list[Descriptor] = []
        self._puts: dict[str, Future[None] | None] = {}
        """By digest what is being put, and None for what was: many patches have one base, and some have arrays in common."""
        self._lock = threading.Lock()
        self._put(Descriptor.of(NOTHING, "").digest, len(NOTHING), [NOTHING])

    def compare(self, records: Iterable[Record], listed: Iterable[Descriptor]) -> set[str]:
        """The names of the recipes that are newer where they are sent. Raises HistoriesDiverged."""
        there, newer = {each.annotations.get(NAME): each for each in listed if each.artifact_type == RECIPE}, set[str]()
        for record in records:
            if record.name in there:
                theirs = recipe_at(self.layout, there[record.name]).record
                ours = record.revisions, record.fingerprint
                if compare_histories(record.name, *ours, theirs.revisions, theirs.fingerprint) == "updated":
                    newer.add(record.name)
        return newer

    def patches(self, files: PatchFiles, records: Sequence[PatchRecord], workers: int, progress: Progress) -> None:
        """Send patches, some at a time. The first that cannot be sent stops the rest."""
        sending: deque[Future[None]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for step, record in enumerate(records, 1):
                    progress(step, len(records), f"patch {record.id[:12]} ({record.concept})")
                    sending.append(pool.submit(self.patch, files, record))
                    if len(sending) >= 2 * workers:
                        sending.popleft().result()
                while sending:
                    sending.popleft().result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def patch(self, files: PatchFiles, record: PatchRecord) -> None:
        """Send one patch: its arrays, its manifest, its document."""
        with bytes_of_patch(record.id, record.concept):
            manifest, whole = _manifest(files, record)
            for array in manifest.arrays:
                # Read only when it is asked for, which it is not when it is there already.
                parts = (part for _ in (0,) for part in _array(files, array.name, array.digest, array.label, whole))
                self._put(array.digest, len(array.label) + array.nbytes, parts)
            self._put(manifest.id, len(manifest.raw), [manifest.raw])
            document = patch_document(manifest)
            self._base(manifest.content["subject"]["fingerprint"])
            self._documents[manifest.id] = document
            concept = str(manifest.content["concept"]["name"])
            self._entries += self._list(
                document, {REF: manifest.id, NAME: concept, CREATED: record.solved_at.isoformat()}
            )

    def recipe(self, record: Record) -> None:
        """Send one recipe, whose patches have been sent."""
        self._base(record.fingerprint)
        self._put(record.digest, len(record.raw), [record.raw])
        of_record = record_document(record.raw, record.fingerprint)
        self._put_document(of_record)
        marks = {NAME: record.name, REVISIONS: str(len(record.revisions))}
        if REFERENCE.fullmatch(record.name):
            marks[REF] = record.name
        self._entries += self._list(recipe_document(of_record, [self._documents[id] for id in record.patches]), marks)

    def vocabulary(self, document: Document, name: str, data: bytes) -> None:
        """Send a kept vocabulary."""
        self._put(Descriptor.of(data, "").digest, len(data), [data])
        self._entries += self._list(document, {NAME: name})

    def finish(self, records: Sequence[Record]) -> set[str]:
        """List all that was sent, beside what is listed already; return the names of the recipes that are newer there."""
        newer: set[str] = set()

        def merged(before: list[Descriptor]) -> Iterable[Descriptor]:
            newer.update(self.compare(records, before))
            ours = [
                each for each in self._entries if each.artifact_type != RECIPE or each.annotations[NAME] not in newer
            ]
            return _merged(before, [*ours, *self._signed_list(before, ours)])

        self.layout.update(merged)
        return newer

    def _signed_list(self, before: Sequence[Descriptor], ours: Sequence[Descriptor]) -> list[Descriptor]:
        """The list of this push's key, and the signature over it: what it named `before`, and `ours`."""
        if self.signer is None:
            return []
        known = self.known_list(before)
        members = _by_slot(
            [*(known.members if known else ()), *(each for each in ours if each.artifact_type != SIGNATURE)]
        )
        if known and {each.digest: each for each in members} == {each.digest: each for each in known.members}:
            self.counter = known.counter
            return []
        self.counter = max(self.counter, known.counter if known else 0) + 1
        document = list_document(self.signer.public, self.counter, members)
        return self._list(document, {KEY: self.signer.public.hex(), COUNTER: str(self.counter)})

    def known_list(self, before: Sequence[Descriptor]) -> SignedList | None:
        """The list that this push's key has there; None also for one that was damaged or altered."""
        assert self.signer is not None
        with suppress(BadLayout, Untrusted):
            return signed_list(self.layout, before, self.signer.public)
        return None

    def _list(self, document: Document, marks: dict[str, str]) -> list[Descriptor]:
        """Send a document, and the signature over it; what the index shall list of both."""
        self._put_document(document)
        described = document.descriptor
        entries = [Descriptor(described.media_type, described.digest, described.size, described.artifact_type, marks)]
        if self.signer is not None:
            signature = self.signer.sign(described.digest)
            self._put(Descriptor.of(signature, "").digest, len(signature), [signature])
            signed = signature_document(signature, described)
            self._put_document(signed)
            where = signed.descriptor
            entries.append(
                Descriptor(where.media_type, where.digest, where.size, SIGNATURE, {SUBJECT: described.digest})
            )
        return entries

    def _base(self, fingerprint: str) -> None:
        self._put_document(base_document(fingerprint))

    def _put(self, digest: str, size: int, parts: Iterable[bytes | memoryview]) -> None:
        self._once(digest, lambda: self.layout.put(digest, size, parts))

    def _put_document(self, document: Document) -> None:
        self._once(document.descriptor.digest, lambda: self.layout.put_document(document))

    def _once(self, digest: str, put: Callable[[], int]) -> None:
        """Put what was not put yet, and count it; wait if somebody else is just doing that."""
        with self._lock:
            ours = digest not in self._puts
            putting = self._puts.setdefault(digest, Future())
        if not ours:
            if putting is not None:
                putting.result()
            return
        assert putting is not None
        try:
            nbytes = put()
        except BaseException as error:
            putting.set_exception(error)
            raise
        with self._lock:
            self._puts[digest] = None
            self.written += nbytes > 0
            self.nbytes += nbytes
        putting.set_result(None)


def _merged(before: Iterable[Descriptor], ours: Iterable[Descriptor]) -> Iterable[Descriptor]:
    """What a layout lists when `ours` has come to what was there `before`."""
    every = _by_slot([*before, *ours])
    digests = {each.digest for each in every}
    # The signature of a recipe or list that has another document now is over nothing that is listed.
    return (each for each in every if each.artifact_type != SIGNATURE or each.annotations.get(SUBJECT) in digests)


def _by_slot(entries: Iterable[Descriptor]) -> list[Descriptor]:
    """Each document once, and of a recipe's and a key's only the last; a patch with the earliest time that is known."""
    slots: dict[tuple[str, str], Descriptor] = {}
    for entry in entries:
        owner = {RECIPE: NAME, SIGNED_LIST: KEY}.get(entry.artifact_type, "")
        slot = (entry.artifact_type, entry.annotations.get(owner, entry.digest))
        known = slots.get(slot)
        if known and known.digest == entry.digest and known.created and entry.created and known.created < entry.created:
            entry = replace(entry, annotations={**entry.annotations, CREATED: known.annotations[CREATED]})
        slots[slot] = entry
    return list(slots.values())


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


def _vocabularies(folder: Path) -> Iterable[tuple[Document, str, bytes]]:
    """For each encoded vocabulary of a folder that is whole, by name: its document, its name and its bytes.

    They are hours of a large text encoder's work, and nothing that cannot be done again: they go with everything, not with
    chosen patches.
    """
    for file in sorted(folder.glob("*.safetensors")):
        if DIGEST.fullmatch(file.stem):
            data = file.read_bytes()
            yield vocabulary_document(data), file.stem, data
