"""A patch: a delta with its provenance, as one safetensors file whose manifest's digest is the patch's id.

`docs/patch-format.md` is the specification. Reading names what is wrong with which array, and never asks for more memory
than the file is long.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.layout import LAST, PENULTIMATE
from overpaint.bases.safetensors_file import DTYPES, dtype_name, raw_bytes, tensor_digest
from overpaint.core.concepts import Concept, universe_of
from overpaint.core.encoding import (
    KEY,
    BadHeader,
    TensorEntry,
    canonical_json,
    combined_digest,
    header_bytes,
    header_length,
    json_digest,
    read_header,
    read_object,
)
from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import html_table
from overpaint.patches.delta import BadDelta, Delta, TextMap, delta_from, newest_format

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def uncovered_inputs(base: Base, delta: Delta) -> tuple[str, ...]:
    """The text inputs that a delta leaves as they are although it changes another, in the base's order.

    A text input is covered when a change reaches a projection that reads it, in the columns that belong to it, or its text
    encoder. A change that reaches no text input at all works inside the denoiser, whatever comes in, and leaves none
    uncovered.
    """
    covered = {text_input for part in delta.parts for text_input in base.text_inputs if _covers(base, text_input, part)}
    return tuple(text_input for text_input in base.text_inputs if text_input not in covered) if covered else ()


def untouched_inputs(base: Base, changed: Iterable[str]) -> tuple[str, ...]:
    """The same by the names of changed tensors alone, where text inputs that share their projections count alike."""
    names = set(changed)
    covered = {text_input for text_input in base.text_inputs if names & _reaching(base, text_input)}
    return tuple(text_input for text_input in base.text_inputs if text_input not in covered) if covered else ()


def _covers(base: Base, text_input: str, part: Delta) -> bool:
    if isinstance(part, TextMap):
        return part.encoder == text_input
    behind = set(part.targets(base)) & _reaching(base, text_input)
    return any(_moves(base, text_input, part, name) for name in behind)


def _reaching(base: Base, text_input: str) -> set[str]:
    """The tensors that read a text input, and those of its text encoder that decide it."""
    return {*base.projections(text_input), *_deciding(base, text_input)}


def _moves(base: Base, text_input: str, part: Delta, name: str) -> bool:
    """Whether the change of a projection is in the columns of a text input; that of any other tensor counts as it is."""
    if name not in base.projections(text_input):
        return True
    return part.reaches(name, base.columns(text_input, name))


def _deciding(base: Base, text_input: str) -> list[str]:
    """The text encoder's tensors that decide a text input: for a penultimate state not the last layer's."""
    spec = base.text_input(text_input)
    names = [name for name in base.names if name.startswith(f"{spec.encoder}/")]
    if spec.output == LAST:
        return [name for name in names if "text_projection" not in name]
    if spec.output == PENULTIMATE:
        last = max((int(match[1]) for name in names if (match := _LAYER.search(name))), default=0)
        after = ("text_projection", "final_layer_norm", f".layers.{last}.")
        return [name for name in names if not any(word in name for word in after)]
    return names


HEADER_LIMIT = 24 << 20
"""Bytes. The manifest's 8 MB, with every quotation mark escaped, and the list of arrays."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class BadPatch(OverpaintError):
    """A file that is no patch, is damaged, or is of a newer format."""


def file_of(manifest: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> bytes:
    """The one file of a manifest and its arrays: arrays by name, without holes, the header padded to eight bytes."""
    slots = [(name, _CODES[arrays[name].dtype], tuple(arrays[name].shape)) for name in sorted(arrays)]
    head = header_bytes({KEY: canonical_json(manifest).decode()}, slots)
    return b"".join([head, *(raw_bytes(arrays[name]) for name in sorted(arrays))])


def described(arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a manifest lists about arrays: dtype, shape and digest by name."""
    return {
        name: {"dtype": dtype_name(a.dtype), "shape": list(a.shape), "digest": tensor_digest(name, a)}
        for name, a in arrays.items()
    }


def parse(blob: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the arrays of a patch file, every array checked against the manifest. Raises BadPatch."""
    if len(blob) < 8:
        raise BadPatch(f"this is no patch file: it has {len(blob)} bytes, and a header alone has more")
    length = header_length(blob)
    if length > HEADER_LIMIT:
        raise BadPatch(
            f"this is no patch file: its header would have {length} bytes, and at most {HEADER_LIMIT} are read"
        )
    if length > len(blob) - 8:
        raise _damaged(f"its header has {length} bytes, the whole file {len(blob)}; it is cut short")
    try:
        metadata, entries = read_header(blob[8 : 8 + length], len(blob))
        if KEY not in metadata:
            raise BadPatch("this safetensors file has no Overpaint manifest; it is not a patch")
        manifest = read_object(metadata[KEY].encode("utf-8", "surrogatepass"), "its manifest")
    except BadHeader as error:
        raise _damaged(str(error)) from error
    return manifest, {name: _array(memoryview(blob), entries[name]) for name in sorted(entries)}


def check_arrays(listed: Any, arrays: Mapping[str, Tensor]) -> None:
    """Raise BadPatch unless the arrays are exactly those that a manifest lists."""
    if not isinstance(listed, dict) or not listed:
        raise _damaged("its manifest lists no arrays")
    for name in sorted(set(listed) ^ set(arrays)):
        missing = "the file has no such array" if name in listed else "its manifest does not list it"
        raise _damaged(f"array {_short(name)}: {missing}")
    for name, array in arrays.items():
        wanted, actual = listed[name], described({name: array})[name]
        for what in ("dtype", "shape", "digest"):
            given = wanted.get(what) if isinstance(wanted, dict) else None
            if given != actual[what]:
                raise _damaged(
                    f"array {_short(name)} does not match its {what}: the manifest says {_short(str(given))}, "
                    f"the file has {_short(str(actual[what]))}"
                )


def _array(data: memoryview, entry: TensorEntry) -> Tensor:
    """A copy of an array, aligned as PyTorch aligns."""
    flat = torch.empty(entry.size, dtype=torch.uint8, device="cpu")
    target: Any = flat.numpy()
    memoryview(target)[:] = data[entry.start : entry.start + entry.size]
    return flat.view(DTYPES[entry.dtype]).reshape(entry.shape)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:100]}..."


def _damaged(why: str) -> BadPatch:
    return BadPatch(f"the patch file is damaged ({why}); take it from its source again")


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

    def __repr__(self) -> str:
        return f"<Patch {self.id[:12]}: {self.concept.name} by {self.manifest['solver'].get('name')}, {self.nbytes:,} bytes>"

    def _repr_html_(self) -> str:
        subject, solver = self.manifest["subject"], self.manifest["solver"]
        rows = [
            ("concept", self.concept.name),
            ("solver", solver.get("name")),
            *solver.get("settings", {}).items(),
            ("seed", solver.get("seed")),
            ("kind", self.delta.kind),
            ("bytes", f"{self.nbytes:,}"),
            ("tensors it changes", subject["count"]),
            ("base fingerprint", subject["fingerprint"][:12]),
        ]
        return html_table(f"Patch {self.id[:12]}", ["what", "value"], rows)

    @cached_property
    def id(self) -> str:
        """sha256 of the canonical manifest, which names every array's digest."""
        return json_digest(self.manifest)

    @property
    def concept(self) -> Concept:
        """What the patch erases."""
        return Concept.from_json(self.manifest["concept"])

    @property
    def universe(self) -> tuple[Concept, ...]:
        """The other concepts that its solver knew of and preserved, as the manifest lists them."""
        return tuple(map(Concept.from_json, universe_of(self.manifest)[1:]))

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
        actual = subject(base, self.delta)
        if actual["tensors"] != wanted["tensors"]:
            raise WrongBase(
                f"patch {self.id[:12]} ({self.concept.name}) was solved for the base {wanted['fingerprint'][:12]}, and its "
                f"{wanted['count']} tensors are not those of the base {actual['fingerprint'][:12]}; solve it for this base"
            )


def subject(base: Base, delta: Delta) -> dict[str, Any]:
    """What a delta was solved against: a digest over the touched tensors and, for information, over the whole base.

    Where it covers some of the base's text inputs and not others, those others are named too.
    """
    touched = base.digests(delta.targets(base))
    summary = {"fingerprint": base.fingerprint, "tensors": combined_digest(touched), "count": len(touched)}
    left = uncovered_inputs(base, delta)
    return {**summary, "open_doors": list(left)} if left else summary


def make_patch(base: Base, concept: Concept, delta: Delta, solver: dict[str, Any]) -> Patch:
    """A patch of `delta` with its provenance. `solver` is JSON: its name, settings and seed.

    Raises BadDelta when the delta does not fit the base.
    """
    manifest = {
        "format": delta.format,
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
    if version > (newest := newest_format()):
        raise BadPatch(f"this patch has format {version}; this program reads up to format {newest}: upgrade Overpaint")
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
