"""A patch: a delta with its provenance, as one safetensors file whose manifest's digest is the patch's id."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.digests import canonical_json, combined_digest
from overpaint.concepts import Concept
from overpaint.errors import OverpaintError
from overpaint.patches.delta import BadDelta, Delta, delta_from
from overpaint.patches.doors import open_doors
from overpaint.patches.patch_file import BadPatch, check_arrays, described, file_of, parse

__all__ = ["BadPatch", "Patch", "WrongBase", "make_patch", "read_patch", "subject"]

NEWEST = 2
_FORMATS = {"text-map": 1, "dense": 1, "low-rank": 2, "xor": 2, "sum": 2}
"""The first format that has a kind in today's form, so that older programs read whatever they can."""
_FIELDS: Mapping[str, type] = {"kind": str, "concept": dict, "solver": dict, "subject": dict, "arrays": dict}
_SUBJECT: Mapping[str, type] = {"fingerprint": str, "tensors": str, "count": int}


class WrongBase(OverpaintError):
    """A patch meets a base it was not solved for."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A delta and the canonical manifest that says what it erases, from which base, and how it was made.

    `arrays` are the delta's as they were stored; they need to be given only where an older format stored others.
    """

    manifest: dict[str, Any]
    delta: Delta
    arrays: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def id(self) -> str:
        """sha256 of the canonical manifest, which names every array's digest."""
        return hashlib.sha256(canonical_json(self.manifest)).hexdigest()

    @property
    def concept(self) -> Concept:
        """What the patch erases."""
        return Concept.from_json(self.manifest["concept"])

    @cached_property
    def blob(self) -> bytes:
        """The file: a safetensors container, arrays sorted by name, the manifest in its header. Same patch, same bytes."""
        return file_of(self.manifest, self.arrays or self.delta.tensors())

    @property
    def nbytes(self) -> int:
        """Size of the file, in bytes."""
        return len(self.blob)

    def check(self, base: Base) -> None:
        """Raise WrongBase unless the tensors this patch was solved against are the base's."""
        wanted = self.manifest["subject"]
        found = subject(base, self.delta)
        if found["tensors"] != wanted["tensors"]:
            raise WrongBase(
                f"patch {self.id[:12]} ({self.concept.name}) was solved for the base {wanted['fingerprint'][:12]}, and its "
                f"{wanted['count']} tensors are not those of the base {found['fingerprint'][:12]}; solve it for this base"
            )


def subject(base: Base, delta: Delta) -> dict[str, Any]:
    """What a delta was solved against: a digest over the touched tensors and, for information, over the whole base.

    Where it closes some of the base's doors and leaves others open, these are named too.
    """
    touched = base.digests(delta.targets(base))
    found = {"fingerprint": base.fingerprint, "tensors": combined_digest(touched), "count": len(touched)}
    left = open_doors(base, delta)
    return {**found, "open_doors": list(left)} if left else found


def make_patch(base: Base, concept: Concept, delta: Delta, solver: dict[str, Any]) -> Patch:
    """A patch of `delta` with its provenance. `solver` is JSON: its name, settings and seed.

    Raises BadDelta when the delta does not fit the base.
    """
    manifest = {
        "format": _FORMATS[delta.kind],
        "kind": delta.kind,
        "concept": concept.as_json(),
        "solver": solver,
        "subject": subject(base, delta),
        "arrays": described(delta.tensors()),
    }
    return Patch(manifest, delta)


def read_patch(blob: bytes) -> Patch:
    """Read a patch file and check every digest in it.

    Raises BadPatch for a file that is not a whole patch of a format this program reads; the message names the array.
    """
    manifest, arrays = parse(blob)
    _check_manifest(manifest)
    check_arrays(manifest["arrays"], arrays)
    try:
        return Patch(manifest, delta_from(manifest["kind"], arrays), arrays)
    except BadDelta as error:
        raise BadPatch(f"the patch cannot be used: {error}") from error


def _check_manifest(manifest: dict[str, Any]) -> None:
    version = manifest.get("format")
    if type(version) is not int or version < 1:
        raise BadPatch("the patch's manifest names no format; it is damaged: take it from its source again")
    if version > NEWEST:
        raise BadPatch(f"this patch has format {version}; this program reads up to format {NEWEST}: upgrade Overpaint")
    _check_fields(manifest, _FIELDS, "manifest")
    _check_fields(manifest["subject"], _SUBJECT, "subject")
    try:
        Concept.from_json(manifest["concept"])
    except (TypeError, AttributeError, OverpaintError) as error:
        raise BadPatch(f"the patch's concept is not one ({error}); take the patch from its source again") from error


def _check_fields(found: dict[str, Any], wanted: Mapping[str, type], where: str) -> None:
    for name, kind in wanted.items():
        if type(found.get(name)) is not kind:
            raise BadPatch(f"the patch's {where} lacks a proper {name!r}; take the patch from its source again")
