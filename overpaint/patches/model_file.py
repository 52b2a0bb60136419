"""Build into one file of a model: a copy of a file that another program keeps, with the tensors replaced that patches change.

Programs other than diffusers keep a diffusion transformer as one file, named as the code it was published with names its
layers, alone or with encoders and autoencoder beside it, or as GGUF with most of it quantised. Nothing of such a file is
converted. The tensors that patches change are looked up under every name that they may have there and held against the base's
own; every other byte is copied. A file that would still hold what a patch erases is refused as far as that can be seen: one with
a second copy of a changed matrix in its shape, or one whose record says that it was built from the base before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.checkpoint import LoneShard, TensorLocation, refuse_lone_shard
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import (
    DTYPES,
    FLOATS,
    BrokenFile,
    SafetensorsFile,
    file_stamp,
    raw_bytes,
    tensor_digest,
)
from overpaint.core.atomic import atomic_output, refuse_taken
from overpaint.core.encoding import TensorEntry, combined_digest
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import typed_path
from overpaint.core.reporting import Progress, silent
from overpaint.patches.build import (
    UNKNOWN,
    Built,
    Rewrite,
    copy_file,
    read_record,
    record_of,
    refuse_inside,
    with_digests,
    write_all,
)
from overpaint.patches.compose import Term, plan
from overpaint.patches.delta import BadDelta, all_finite, identical
from overpaint.patches.duplicate_weights import CopyDetector
from overpaint.patches.formats.dialects import TRANSFORMERS, UNET, ldm_unet_modules, native_modules, split

DENOISERS = (UNET, *TRANSFORMERS)
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
"""What stands before the names of a denoiser's tensors in files of other programs."""
GGUF = ".gguf"
SUFFIXES = (".safetensors", ".sft", GGUF)


class OtherModel(OverpaintError):
    """A file that does not hold what patches change, or not as the base has it."""


class GgufFile(SafetensorsFile):
    """A GGUF file as tensors at their places; quantised ones have a dtype that is none of safetensors', and cannot be read."""

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read a file's header. Raises BrokenFile for a damaged one, OverpaintError without the package gguf."""
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise OverpaintError("to build a GGUF file, run `pip install gguf`") from error
        stamp = file_stamp(path.stat())
        try:
            tensors = GGUFReader(path).tensors
        except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
            raise BrokenFile(f"{path} is no whole GGUF file ({error}); get it again") from error
        entries = {
            tensor.name: TensorEntry(
                tensor.tensor_type.name,
                tuple(int(size) for size in reversed(tensor.shape)),
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in tensors
        }
        by_place = sorted(entries.items(), key=lambda item: (item[1].start, item[1].size))
        for (_, one), (name, following) in pairwise(by_place):
            if following.start < one.start + one.size:  # to write one would change the other
                raise BrokenFile(f"{path} is no whole GGUF file ({name} overlaps the tensor before it); get it again")
        return cls(path, entries, {}, 0, stamp)


@dataclass(frozen=True)
class _Place:
    """Where a file keeps a tensor of the base."""

    name: str
    key: str
    file: SafetensorsFile

    @property
    def entry(self) -> TensorEntry:
        return self.file.entries[self.key]

    @property
    def is_changeable(self) -> bool:
        """Whether its numbers have room for a change."""
        return self.entry.dtype in DTYPES and DTYPES[self.entry.dtype] in FLOATS

    def stored(self, value: Tensor) -> Tensor:
        """A value of the base, or one that was composed on it, as the file holds it."""
        return value.to(DTYPES[self.entry.dtype]).reshape(self.entry.shape)

    @property
    def located(self) -> TensorLocation:
        """The same for writing the file anew; nothing is turned or reshaped there."""
        return TensorLocation(self.file.path, self.key, self.entry, self.entry.shape)

    def rounds(self, base: Base) -> bool:
        """Whether values in the base's dtype lose digits in the file."""
        own, theirs = DTYPES[self.entry.dtype], DTYPES[base.places[self.name].entry.dtype]
        return torch.promote_types(own, theirs) != own

    def holds(self, value: Tensor) -> bool:
        """Whether the file has exactly this value, rounded to its dtype."""
        is_as_large = self.entry.size == value.numel() * DTYPES[self.entry.dtype].itemsize
        return is_as_large and identical(self.file.tensor(self.key), self.stored(value))


@own_torch_settings()
def build_file(
    base: Base,
    terms: Iterable[Term],
    original: Path,
    out: Path,
    *,
    record: Mapping[str, Any] | None = None,
    notice: Callable[[str], None] = lambda text: None,
    progress: Progress = silent,
) -> Built:
    """Write a copy of the file `original`, which holds the base's denoiser, to the new file `out` with `terms` baked in.

    `original` is a safetensors file in the model's own names or in those of diffusers, or GGUF. Its tensors may have another
    dtype than the base's where they are the base's, rounded to it; the new ones are composed on the base and rounded alike.
    `record` goes into the header as `build` does it; a GGUF file has no room for one. The digest that is returned is that of
    the composition on the base.

    Raises NotFound when there is no such file, AlreadyExists when `out` is there, OtherModel when a changed tensor is not in
    the file, is there twice, is quantised there or is not the base's, or when the file was built with patches that are not in
    the base, BadDelta when a sum overflows the file's dtype, BrokenFile when the file changes meanwhile. Then nothing is
    written.
    """
    original, out, terms = typed_path(original), typed_path(out), list(terms)
    _refuse_names(base, original, out)
    composition = plan(base, terms)
    is_gguf = original.suffix.lower() == GGUF
    file = (GgufFile if is_gguf else SafetensorsFile).open(original)
    # With nothing to change, what reads the prompt is held against the base all the same.
    places = _places(base, composition.names or base.projections(), file, notice)
    places = {name: place for name, place in places.items() if name in composition.stacks}
    digests, steps = base.digests(base.names), itertools.count(1)

    def value(name: str) -> Tensor:
        """A composed tensor as the file holds it; its digest on the base is noted."""
        composed = composition.tensor(name)
        digests[name] = tensor_digest(name, composed)
        progress(next(steps), len(places), "composing")
        stored = places[name].stored(composed)
        if not all_finite(stored):
            key, dtype = places[name].key, places[name].entry.dtype
            raise BadDelta(
                f"{key} overflows {dtype}, in which {original.name} has it; lower the strengths of the patches"
            )
        return stored

    for name in composition.stacks.keys() - places.keys():  # of the other denoiser, whose file is another
        digests[name] = tensor_digest(name, composition.tensor(name))
    with atomic_output(out) as scratch:
        if is_gguf or not places:
            _write_in_place(original, scratch, places, value)
        else:
            _write_safetensors(file, scratch, places, value, record_of(base, terms, record or {}), digests)
        base.check_digests(composition.names)
        if file_stamp(original.stat()) != file.stamp:
            raise BrokenFile(f"{original} changed while it was read; nothing was built: build again")
    if rounded := sorted({place.entry.dtype for place in places.values() if place.rounds(base)}):
        notice(f"{original.name} is in {', '.join(rounded)}: what was composed on the base is rounded to that")
    return Built(out, combined_digest(digests), ())


def _refuse_names(base: Base, original: Path, out: Path) -> None:
    if not original.is_file():
        raise NotFound(f"there is no file {original}; name the one to build from")
    try:
        refuse_lone_shard(original)
    except LoneShard:
        raise OtherModel(
            f"{original.name} is one shard of several, a part of the model; name a file of all of it, or build a diffusers folder"
        ) from None
    if original.suffix.lower() not in SUFFIXES:
        raise OverpaintError(
            f"{original.name} ends in none of {', '.join(SUFFIXES)}; name a file of one of these, or convert it first"
        )
    if out.suffix.lower() != original.suffix.lower():
        raise OverpaintError(
            f"{out.name} would be a copy of {original.name}: let its name end in {original.suffix}, too"
        )
    refuse_inside(base, out)
    refuse_taken(out)


def _places(
    base: Base, names: Iterable[str], file: SafetensorsFile, notice: Callable[[str], None]
) -> dict[str, _Place]:
    """Where the file has each changed tensor of one denoiser; a base may have two, in two files of the same names.

    Raises OtherModel where one of them is not there, or is not the base's.
    """
    by_component: dict[str, list[str]] = {}
    for name in names:
        by_component.setdefault(name.partition("/")[0], []).append(name)
    if others := [component for component in by_component if component not in DENOISERS]:
        raise OtherModel(
            f"the patches change {', '.join(others)}, and only a denoiser can be built from a file of another program; build "
            "the whole pipeline instead"
        )
    first = None
    for component, changed in by_component.items():
        keys = _keys(base, component, file)
        places = {name: [_Place(name, key, file) for key in keys.get(name, ())] for name in changed}
        refusal = _refusal(base, file.path, places)
        if refusal is None:
            for other in by_component.keys() - {component}:
                notice(f"{file.path.name} is the base's {component}; build its {other} from a file of its own as well")
            found = {name: place for name, [place] in places.items()}
            _refuse_remains(base, file, found, {key for each in keys.values() for key in each})
            return found
        first = first or refusal
    raise OtherModel(first or f"the base at {base.path} has no denoiser that such a file could hold")


def _refusal(base: Base, original: Path, places: Mapping[str, list[_Place]]) -> str | None:
    """Why the changes cannot be made to the file, if they cannot."""
    for name, found in places.items():
        if not found:
            return (
                f"{original.name} has no tensor of its own for {name}: it is of another model than {base.path}, or keeps that "
                "layer as a part of a larger one; build a diffusers folder instead"
            )
        place, *more = found
        if more:
            return _twice(original, more[0].key, name)
        if not place.is_changeable:
            return (
                f"{original.name} has {place.key} as {place.entry.dtype}, which has no room for a change; take a file that has "
                "it in 16 bits or more"
            )
        if not place.holds(base.tensor(name)):
            return f"{place.key} of {original.name} is not {name} of the base at {base.path}; take a file of that base"
    return None


def _twice(original: Path, key: str, name: str) -> str:
    return (
        f"{key} of {original.name} is a second copy of {name}, which would still hold the unpatched weights; take a file "
        "without it"
    )


def _keys(base: Base, component: str, file: SafetensorsFile) -> dict[str, list[str]]:
    """By canonical name, each key under which the file has a tensor of the component: of all that it may have there."""
    native = dict(ldm_unet_modules(base) if component == UNET else native_modules(base, component))
    keys: dict[str, list[str]] = {}
    for name in (name for name in base.names if name.startswith(f"{component}/")):
        module, attribute = split(name)
        names = dict.fromkeys([module.partition("/")[2], *([native[module]] if module in native else [])])
        possible = (f"{prefix}{each}.{attribute}" for each in names for prefix in PREFIXES)
        if found := [key for key in possible if key in file.entries]:
            keys[name] = found
    return keys


def _refuse_remains(base: Base, file: SafetensorsFile, places: Mapping[str, _Place], own: Collection[str]) -> None:
    """Raise OtherModel where the file would still hold what is erased, or holds patches of which the base knows nothing.

    `own` are the keys of the denoiser's tensors, of which none is a copy.
    """
    record = read_record(file)
    if record is not None and record["patches"] and record["digest"] != base.fingerprint:
        raise OtherModel(
            f"{file.path.name} was built with patches that the base at {base.path} does not have; take the file that it was "
            "built from, and a recipe with all patches"
        )
    copies = CopyDetector(base, places)
    for key in file.entries.keys() - set(own):
        if file.entries[key].dtype in DTYPES and (copied := copies.copied_by(file, key)):
            raise OtherModel(_twice(file.path, key, copied))


def _write_safetensors(
    file: SafetensorsFile,
    target: Path,
    places: Mapping[str, _Place],
    value: Callable[[str], Tensor],
    record: Mapping[str, Any],
    digests: Mapping[str, str],
) -> None:
    """With a record of the composition, whose `digests` are those on the base once every `value` was asked for."""
    rewrite = Rewrite(file, {name: place.located for name, place in places.items()})
    unknown = with_digests(record, dict.fromkeys(places, UNKNOWN), dict.fromkeys(digests, UNKNOWN))
    written = rewrite.write(target, unknown, value)
    rewrite.write_record(target, with_digests(record, written, digests))


def _write_in_place(original: Path, target: Path, places: Mapping[str, _Place], value: Callable[[str], Tensor]) -> None:
    """As GGUF needs it, whose header says where in the file each tensor begins."""
    copy_file(original, target)
    with target.open("r+b", buffering=0) as writer:
        for name, place in places.items():
            write_all(writer, raw_bytes(value(name)), place.entry.start)
