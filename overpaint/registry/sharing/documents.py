"""Patches, recipes and what goes with them as documents of the OCI image format. `docs/sharing.md` specifies them.

A patch's document follows from its manifest alone, so a patch has one document and one digest of it everywhere, and what
is received is compared with what it should be.

A recipe's document names its record: the recipe with its whole history as one JSON, which can be merged into a registry.
Histories only grow. One that continues another may take its place; two that went different ways are refused, because neither
may be thrown away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from typing import Any, get_args

from overpaint.core.encoding import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.core.names import checked_name, checked_note, checked_number, checked_tag, sought_name
from overpaint.registry.history import MergeOutcome
from overpaint.registry.records import Action, PatchChange, RecipeEntry, Revision, TagRecord
from overpaint.registry.registry import Registry
from overpaint.registry.store import DIGEST, BadManifest, Manifest, read_json

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
PATCH = "application/vnd.overpaint.patch.v1"
PATCH_MANIFEST = "application/vnd.overpaint.patch.manifest.v1+json"
ARRAY = "application/vnd.overpaint.array.v1"
BASE = "application/vnd.overpaint.base.v1"
RECIPE = "application/vnd.overpaint.recipe.v1"
RECORD = "application/vnd.overpaint.recipe.record.v1+json"
SIGNATURE = "application/vnd.overpaint.signature.v1"
SIGNATURE_BLOB = "application/vnd.overpaint.signature.v1+json"
SIGNED_LIST = "application/vnd.overpaint.signed-list.v1"
VOCABULARY = "application/vnd.overpaint.vocabulary.v1"
MOMENTS = "application/vnd.overpaint.vocabulary.moments.v1"

FINGERPRINT = "org.overpaint.base.fingerprint"
NAME = "org.overpaint.name"
SUBJECT = "org.overpaint.subject"
REF = "org.opencontainers.image.ref.name"
CREATED = "org.opencontainers.image.created"
KEY = "org.overpaint.key"
COUNTER = "org.overpaint.counter"
REVISIONS = "org.overpaint.revisions"

MARK = canonical_json({"imageLayoutVersion": "1.0.0"})
"""The content of the file `oci-layout`."""
INDEX_LIMIT = 128 << 20
"""The most bytes that a list of documents may have."""


class BadLayout(OverpaintError):
    """A shared folder, URL or archive whose content contradicts itself or this program's reading of the format."""


@dataclass(frozen=True)
class Descriptor:
    """What points at a blob: its media type, digest (64 hexadecimal digits) and size in bytes, and what it is about."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def created(self) -> datetime | None:
        """The moment that the annotation of this name gives, in UTC and never one to come; None if it gives none."""
        try:
            found = datetime.fromisoformat(self.annotations[CREATED].replace("Z", "+00:00")).astimezone(timezone.utc)
        except (KeyError, ValueError, OverflowError):
            return None
        return min(found, datetime.now(timezone.utc))

    @classmethod
    def of(cls, data: bytes, media_type: str, artifact_type: str = "", **rest: Any) -> Descriptor:
        """The descriptor of these bytes."""
        return cls(media_type, hashlib.sha256(data).hexdigest(), len(data), artifact_type, **rest)

    def as_json(self) -> dict[str, Any]:
        """The JSON object of the OCI format."""
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": f"sha256:{self.digest}", "size": self.size}
        if self.artifact_type:
            found["artifactType"] = self.artifact_type
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        return found

    @classmethod
    def from_json(cls, value: Any, where: str) -> Descriptor:
        """Read one. Raises BadLayout."""
        if not isinstance(value, dict):
            raise BadLayout(f"{where} has something that is no descriptor; nothing was taken from it")
        media_type, digest, size = (value.get(key) for key in ("mediaType", "digest", "size"))
        artifact_type, annotations = value.get("artifactType", ""), value.get("annotations") or {}
        if not isinstance(digest, str) or not digest.startswith("sha256:") or not DIGEST.fullmatch(digest[7:]):
            raise BadLayout(f"{where} has a digest that is not sha256: and 64 hexadecimal digits: {_short(digest)}")
        if type(size) is not int or size < 0:
            raise BadLayout(f"{where} gives {digest} the size {_short(size)}, which is no number of bytes")
        if not isinstance(media_type, str) or not isinstance(artifact_type, str) or not _is_text_map(annotations):
            raise BadLayout(f"{where} describes {digest} in a way the OCI image format does not know")
        return cls(media_type, digest[7:], size, artifact_type, annotations)


@dataclass(frozen=True)
class Document:
    """A document to be shared: its bytes and what points at them."""

    data: bytes
    descriptor: Descriptor


def patch_document(manifest: Manifest) -> Document:
    """The document of a patch. Its config is the patch's manifest, so the config's digest is the patch's id."""
    fingerprint = str(manifest.content["subject"]["fingerprint"])
    layers = [
        Descriptor(ARRAY, array.digest, len(array.label) + array.nbytes, annotations={NAME: array.name}).as_json()
        for array in manifest.arrays
    ]
    return _document(
        PATCH,
        config=Descriptor.of(manifest.raw, PATCH_MANIFEST),
        layers=layers,
        subject=base_document(fingerprint).descriptor,
        annotations={FINGERPRINT: fingerprint},
    )


def base_document(fingerprint: str) -> Document:
    """The document that stands for a base: it says the fingerprint, and nothing else."""
    return _document(BASE, annotations={FINGERPRINT: fingerprint})


def record_document(record: bytes, fingerprint: str) -> Document:
    """The document of a recipe's record, which is its config."""
    return _document(RECIPE, config=Descriptor.of(record, RECORD), subject=base_document(fingerprint).descriptor)


def recipe_document(record: Document, patches: Iterable[Document]) -> Document:
    """The document of a recipe: its record, and every patch that its history names."""
    members = sorted((each.descriptor for each in patches), key=lambda each: each.digest)
    return _index(RECIPE, [record.descriptor, *members])


def list_document(key: bytes, counter: int, members: Iterable[Descriptor]) -> Document:
    """The document of a key's signed list: what `index.json` shall list of what the key has signed, word for word."""
    members = sorted(members, key=lambda each: (each.artifact_type, each.digest))
    return _index(SIGNED_LIST, members, {KEY: key.hex(), COUNTER: str(counter)})


def vocabulary_document(data: bytes) -> Document:
    """The document of a vocabulary."""
    return _document(VOCABULARY, layers=[Descriptor.of(data, MOMENTS).as_json()])


def signature_document(signature: bytes, signed: Descriptor) -> Document:
    """The document of a detached signature over another document."""
    subject = Descriptor(signed.media_type, signed.digest, signed.size)
    return _document(SIGNATURE, layers=[Descriptor.of(signature, SIGNATURE_BLOB).as_json()], subject=subject)


def read_document(data: bytes, where: str) -> dict[str, Any]:
    """The JSON of a document. Raises BadLayout."""
    try:
        content = read_json(data, where)
    except BadManifest as error:
        raise BadLayout(str(error)) from error
    if content.get("schemaVersion") != 2:
        raise BadLayout(f"{where} has no schemaVersion 2, so it is not a document of the OCI image format")
    return content


def members_of(content: Mapping[str, Any], where: str) -> list[Descriptor]:
    """What a document of the OCI index format lists, each once. Raises BadLayout."""
    listed = content.get("manifests")
    if not isinstance(listed, list):
        raise BadLayout(f"{where} lists no manifests; nothing was taken from it")
    members = [Descriptor.from_json(each, where) for each in listed]
    # What is listed again, word for word, would only be read again.
    return list(
        {(each.digest, each.artifact_type, *sorted(each.annotations.items())): each for each in members}.values()
    )


NOTHING = b"{}"
"""The blob that a document names where the format wants a blob and there is nothing to say."""


def _index(artifact_type: str, members: Iterable[Descriptor], annotations: Mapping[str, str] | None = None) -> Document:
    content: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": INDEX,
        "artifactType": artifact_type,
        "manifests": [each.as_json() for each in members],
    }
    if annotations is not None:
        content["annotations"] = dict(annotations)
    data = canonical_json(content)
    return Document(data, Descriptor.of(data, INDEX, artifact_type))


def _document(
    artifact_type: str,
    *,
    config: Descriptor | None = None,
    layers: list[dict[str, Any]] | None = None,
    subject: Descriptor | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Document:
    nothing = Descriptor.of(NOTHING, EMPTY)
    content: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact_type,
        "config": (config or nothing).as_json(),
        "layers": layers if layers is not None else [nothing.as_json()],
    }
    if subject is not None:
        content["subject"] = subject.as_json()
    if annotations is not None:
        content["annotations"] = dict(annotations)
    data = canonical_json(content)
    return Document(data, Descriptor.of(data, MANIFEST, artifact_type))


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for pair in value.items() for each in pair)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


RECORD_FORMAT = 1
RECORD_LIMIT = 64 << 20
"""The most bytes that a record may have."""


class BadRecipeRecord(OverpaintError):
    """A recipe's record that contradicts itself."""


@dataclass(frozen=True)
class Record:
    """A recipe: its name, the fingerprint of its base, its revisions from 1 on, its tags; `raw` is all that as JSON."""

    raw: bytes
    name: str
    base: str
    fingerprint: str
    created_at: datetime
    revisions: tuple[Mapping[str, Any], ...]
    tags: tuple[Mapping[str, Any], ...]

    @property
    def digest(self) -> str:
        """sha256 of the JSON."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def patches(self) -> list[str]:
        """The ids of all patches that the history names, sorted."""
        return sorted({change["patch"] for revision in self.revisions for change in revision["changes"]})


def record_of(registry: Registry, name: str) -> Record:
    """The record of a recipe. Raises NotFound."""
    recipe = registry.history(name)
    content = {
        "format": RECORD_FORMAT,
        "name": recipe.name,
        "base": {"name": recipe.base.name, "layout": recipe.base.layout, "fingerprint": recipe.base.fingerprint},
        "created_at": recipe.created_at.isoformat(),
        "revisions": [_revision_json(each) for each in recipe.revisions],
        "tags": [
            {"tag": tag.tag, "revision": tag.revision, "who": tag.who, "at": tag.at.isoformat()} for tag in recipe.tags
        ],
    }
    return read_record(canonical_json(content))


def _revision_json(revision: Revision) -> dict[str, Any]:
    changes = [
        {
            "patch": change.patch,
            "strength_before": change.before and change.before.strength,
            "strength_after": change.after and change.after.strength,
            "until_before": change.before and change.before.until and change.before.until.isoformat(),
            "until_after": change.after and change.after.until and change.after.until.isoformat(),
        }
        for change in revision.changes
    ]
    plain = ("number", "action", "source", "why", "who", "digest_before", "digest_after")
    return {**{key: getattr(revision, key) for key in plain}, "at": revision.at.isoformat(), "changes": changes}


def _revision(content: Mapping[str, Any]) -> Revision:
    changes = tuple(
        PatchChange(change["patch"], *(_entry_of(change, when) for when in ("before", "after")))
        for change in content["changes"]
    )
    plain = ("number", "action", "source", "why", "who", "digest_before", "digest_after")
    return Revision(**{key: content[key] for key in plain}, at=moment(content["at"]), changes=changes)


def _entry_of(change: Mapping[str, Any], when: str) -> RecipeEntry | None:
    strength = change[f"strength_{when}"]
    return None if strength is None else RecipeEntry(change["patch"], strength, day(change[f"until_{when}"]))


def read_record(raw: bytes) -> Record:
    """Read a record. Raises BadRecipeRecord for one that is not in its canonical form or does not make sense."""
    try:
        content = read_json(raw, "the recipe's record")
        if content.get("format") != RECORD_FORMAT:
            raise BadRecipeRecord(
                f"a recipe of format {content.get('format')!r} is newer than this program; upgrade Overpaint"
            )
        if canonical_json(content) != raw:
            raise BadRecipeRecord("the recipe's record is not in its canonical form; take it from its source again")
        record = Record(
            raw=raw,
            name=sought_name(content["name"], "recipe"),
            base=sought_name(content["base"]["name"], "base"),
            fingerprint=checked_name(content["base"]["fingerprint"], "fingerprint"),
            created_at=moment(content["created_at"]),
            revisions=tuple(content["revisions"]),
            tags=tuple(content["tags"]),
        )
        _check_history(record)
        for tag in record.tags:
            checked_note(tag["who"], "the name of who did it")
            moment(tag["at"])
            if (
                tag["tag"] != checked_tag(tag["tag"])
                or type(tag["revision"]) is not int
                or not 0 <= tag["revision"] <= len(record.revisions)
            ):
                raise BadRecipeRecord(f"the recipe {record.name!r} has a tag {tag['tag']!r} that cannot be")
    except (BadManifest, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BadRecipeRecord(f"the recipe's record cannot be read ({error}); take it from its source again") from error
    return record


def _check_history(record: Record) -> None:
    """Every revision has its number, and begins with what the one before it left."""
    now: dict[str, tuple[float, str | None]] = {}
    for number, revision in enumerate(record.revisions, 1):
        if revision["number"] != number or revision["action"] not in get_args(Action):
            raise BadRecipeRecord(
                f"revision {number} of the recipe {record.name!r} is missing or does what no revision does"
            )
        moment(revision["at"])
        for key in ("why", "who", "source", "digest_before", "digest_after"):
            checked_note(revision[key] or "", f"the {key} of a revision")
        if len({change["patch"] for change in revision["changes"]}) != len(revision["changes"]):
            raise BadRecipeRecord(f"revision {number} of the recipe {record.name!r} changes one patch twice")
        for change in revision["changes"]:
            patch = change["patch"]
            before = _state(change["strength_before"], change["until_before"])
            after = _state(change["strength_after"], change["until_after"])
            if not DIGEST.fullmatch(patch) or now.get(patch) != before:
                raise BadRecipeRecord(
                    f"revision {number} of the recipe {record.name!r} does not continue what went before it"
                )
            now.pop(patch, None)
            if after is not None:
                now[patch] = after


def _state(strength: Any, until: Any) -> tuple[float, str | None] | None:
    if strength is None:
        return None
    try:
        number = checked_number(strength, "a strength of the record")
    except OverpaintError as error:
        raise BadRecipeRecord(str(error)) from None
    day(until)
    return number, until


def moment(text: str) -> datetime:
    """A moment as records have it: ISO, in UTC. Raises BadRecipeRecord."""
    found = datetime.fromisoformat(text)
    if found.tzinfo is None or found.astimezone(timezone.utc).isoformat() != text:
        raise BadRecipeRecord(f"{text} is not a moment in UTC; take the record from its source again")
    return found


def day(text: str | None) -> date | None:
    """A day as records have it, or None. Raises ValueError."""
    return None if text is None else date.fromisoformat(text)


def merge_recipe(registry: Registry, record: Record, base: str, name: str | None = None) -> MergeOutcome:
    """Make the recipe of a record on the base of that name, or let the one that is there catch up with the record.

    `name` is another name for it here. Its patches must be in the registry. Raises HistoriesDiverged when the recipe
    that is there has another history, NotFound for an unknown base.
    """
    revisions = [_revision(each) for each in record.revisions]
    called = name or record.name
    tags = [
        TagRecord(each["tag"], "recipe", called, each["revision"], each["who"], moment(each["at"]))
        for each in record.tags
    ]
    return registry.merge_history(called, base, revisions, tags, record.created_at)
