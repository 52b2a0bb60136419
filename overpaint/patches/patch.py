"""A patch: a delta with its provenance, as one safetensors file whose manifest's digest is the patch's id."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.digests import canonical_json, combined_digest, dtype_name, raw_bytes, tensor_digest
from overpaint.concepts import Concept
from overpaint.errors import OverpaintError
from overpaint.patches.delta import Delta, delta_from

FORMAT = 1
MANIFEST_LIMIT = 8 << 20
_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


class BadPatch(OverpaintError):
    """A file that is no patch, is damaged, or is of a newer format."""


class WrongBase(OverpaintError):
    """A patch meets a base it was not solved for."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A delta and the canonical manifest that says what it erases, from which base, and how it was made."""

    manifest: dict[str, Any]
    delta: Delta

    @cached_property
    def id(self) -> str:
        """sha256 of the canonical manifest, which names every array's digest."""
        return hashlib.sha256(canonical_json(self.manifest)).hexdigest()

    @property
    def concept(self) -> Concept:
        return Concept.from_json(self.manifest["concept"])

    @cached_property
    def blob(self) -> bytes:
        """The file: a safetensors container, arrays sorted by name, the manifest in its header. Same patch, same bytes."""
        tensors = self.delta.tensors()
        header: dict[str, Any] = {"__metadata__": {"overpaint": canonical_json(self.manifest).decode()}}
        offset = 0
        for name in sorted(tensors):
            size = tensors[name].numel() * tensors[name].element_size()
            header[name] = {
                "dtype": _CODES[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        head = canonical_json(header)
        head += b" " * (-len(head) % 8)
        return b"".join([struct.pack("<Q", len(head)), head, *(bytes(raw_bytes(tensors[n])) for n in sorted(tensors))])

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
    """What a delta was solved against: a digest over the touched tensors and, for information, over the whole base."""
    touched = base.digests(delta.targets(base))
    return {"fingerprint": base.fingerprint, "tensors": combined_digest(touched), "count": len(touched)}


def make_patch(base: Base, concept: Concept, delta: Delta, solver: dict[str, Any]) -> Patch:
    """A patch of `delta` with its provenance. `solver` is JSON: its name, settings and seed."""
    arrays = {
        name: {"dtype": dtype_name(t.dtype), "shape": list(t.shape), "digest": tensor_digest(name, t)}
        for name, t in _stored(delta).items()
    }
    manifest = {
        "format": FORMAT,
        "kind": delta.kind,
        "concept": concept.as_json(),
        "solver": solver,
        "subject": subject(base, delta),
        "arrays": arrays,
    }
    return Patch(manifest, delta)


def read_patch(blob: bytes) -> Patch:
    """Read a patch file and check every digest in it. Raises BadPatch."""
    manifest = _manifest(blob)
    try:
        tensors = safetensors.torch.load(blob)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadPatch(f"the patch file is damaged ({error}); take it from its source again") from error
    if set(tensors) != set(manifest["arrays"]):
        raise BadPatch("the patch file's arrays are not those its manifest lists; take it from its source again")
    for name, tensor in tensors.items():
        if tensor_digest(name, tensor) != manifest["arrays"][name]["digest"]:
            raise BadPatch(
                f"the array {name} of the patch file does not match its digest; take it from its source again"
            )
    return Patch(manifest, delta_from(manifest["kind"], tensors))


def _manifest(blob: bytes) -> dict[str, Any]:
    if len(blob) < 8 or not 2 <= (length := struct.unpack("<Q", blob[:8])[0]) <= min(len(blob) - 8, MANIFEST_LIMIT):
        raise BadPatch(f"this is no patch file: {len(blob)} bytes without a plausible safetensors header")
    try:
        manifest: dict[str, Any] = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["overpaint"])
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadPatch("this safetensors file has no Overpaint manifest; it is not a patch") from error
    if version != FORMAT:
        raise BadPatch(f"this patch has format {version}; this program reads format {FORMAT}: upgrade Overpaint")
    missing = {"kind", "concept", "solver", "subject", "arrays"} - set(manifest)
    if missing:
        raise BadPatch(f"the patch's manifest lacks {', '.join(sorted(missing))}; take it from its source again")
    return manifest


def _stored(delta: Delta) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in delta.tensors().items()}
