"""The weight files of a base: found, opened, matched with a layout, read, and hashed on every core there is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from overpaint.bases.layout import KeyMapping, Layout, SingleFile, UnknownLayout, layout_of, layouts, read_index
from overpaint.bases.safetensors_file import PICKLE_SUFFIXES, PickledCheckpoint, SafetensorsFile, is_key, raw_bytes
from overpaint.core.encoding import DTYPE_NAMES, TensorEntry, tensor_label
from overpaint.core.errors import OverpaintError
from overpaint.core.executors import available_cores
from overpaint.core.reporting import Progress, silent

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")


class BrokenBase(OverpaintError):
    """A base with a file missing, or one that contradicts itself."""


class LoneShard(UnknownLayout):
    """One file of a model that is kept in several, given as if it were the whole."""


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor is stored, and the canonical shape it has.

    `key` is what its file calls it, or the stack that it is a part of; `entry` has its own bytes there, which are those of
    its transpose where the file keeps it so.
    """

    file: Path
    key: str
    entry: TensorEntry
    shape: tuple[int, ...]
    transposed: bool = False

    def canonical(self, stored: Tensor) -> Tensor:
        """A tensor as read from `entry` in its canonical form."""
        return stored.T.contiguous() if self.transposed else stored.reshape(self.shape)

    def stored(self, value: Tensor) -> Tensor:
        """A canonical tensor in the form whose bytes the file has."""
        return value.T.contiguous() if self.transposed else value.reshape(self.entry.shape)


def read_tensors(
    places: Mapping[str, TensorLocation], containers: Mapping[Path, SafetensorsFile], memory: Tensor | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Tensors one at a time in their canonical shapes, file by file, under the names they are given here; `memory` is that of
    `SafetensorsFile.read`."""
    by_file: dict[Path, dict[str, TensorEntry]] = {}
    for name, place in places.items():
        by_file.setdefault(place.file, {})[name] = place.entry
    for file, wanted in by_file.items():
        for name, stored in containers[file].read(wanted, memory):
            yield name, places[name].canonical(stored)


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of one component that one file holds: by key, diffusers' names of what it holds from the top."""

    component: str
    container: SafetensorsFile
    names: dict[str, tuple[str, ...]]
    mapping: KeyMapping | None = None

    def entries(self) -> Iterator[tuple[str, str, TensorEntry, bool]]:
        """Key, diffusers' name and bytes of each tensor, and whether they are those of its transpose."""
        for key, names in self.names.items():
            turned = self.mapping is not None and self.mapping.is_transposed(key)
            for name, entry in zip(names, self._stacked(key, len(names)), strict=True):
                yield key, name, entry, turned and len(entry.shape) == 2

    def _stacked(self, key: str, count: int) -> Iterator[TensorEntry]:
        whole = self.container.entries[key]
        rows = whole.shape[0] if whole.shape else 0
        if count == 1:
            yield whole
        elif rows % count or not rows:
            raise BrokenBase(
                f"{self.container.path} has {key} of shape {list(whole.shape)}, which is no stack of {count} tensors; "
                "get the base again"
            )
        else:
            size = whole.size // count
            for number in range(count):
                shape = (rows // count, *whole.shape[1:])
                yield TensorEntry(whole.dtype, shape, whole.start + number * size, size)


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """What was found at a path: the layout, the files in use, the suffix of a folder's files where it is not plain, and the
    form of a single file."""

    layout: Layout
    parts: tuple[WeightFiles, ...]
    variant: str | None = None
    form: SingleFile | None = None

    def places(self) -> dict[str, TensorLocation]:
        """Every weight of every component by canonical name, sorted. Raises BrokenBase when one is there twice."""
        locations: dict[str, TensorLocation] = {}
        for part in self.parts:
            rules = self.layout.components[part.component]
            for key, local, entry, turned in part.entries():
                name = rules.canonical(local)
                if rules.is_buffer(name):
                    continue
                path = f"{part.component}/{name}"
                if not _NAME.fullmatch(name):
                    raise BrokenBase(
                        f"{part.container.path} has {key[:80]!r}, which is no name of a weight; get it again"
                    )
                if path in locations:
                    raise BrokenBase(
                        f"{part.container.path} holds {path} twice, as {locations[path].key} and as {key}; "
                        "take away the one that is not meant"
                    )
                shape = entry.shape[::-1] if turned else rules.shape(name, entry.shape)
                locations[path] = TensorLocation(part.container.path, key, entry, shape, turned)
        return dict(sorted(locations.items()))


def open_folder(folder: Path) -> ResolvedCheckpoint:
    """A diffusers folder: one weight file or an index of shards per component, plain or of one variant.

    Raises OverpaintError for a folder that is missing, unknown, incomplete or damaged.
    """
    layout = layout_of(folder)
    index = read_index(folder)
    parts, variants = [], set()
    shared = shared_variant(_variants_in(folder / name, each.weights) for name, each in layout.components.items())
    for name, component in layout.components.items():
        if (index.get(name) or [None])[0] is None and layout.is_caught:
            if component.optional:
                continue
            raise BrokenBase(f"the pipeline at {folder} has no {name}, which it needs; get the whole base")
        variant, files = weight_files(folder / name, component.weights, shared)
        variants.add(variant)
        for file in files:
            container = SafetensorsFile.open(file)
            parts.append(WeightFiles(name, container, {key: (key,) for key in container.entries}))
    return ResolvedCheckpoint(layout, tuple(parts), max(variants) or None)


def open_single_file(file: Path) -> ResolvedCheckpoint:
    """A checkpoint with all components in one file, with the keys of one of the layouts' single files.

    Raises BrokenFile when it is damaged or would have to run a program, UnknownLayout when no layout has such files,
    LoneShard for one shard of several.
    """
    if file.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise UnknownLayout(
            f"{file} is not a checkpoint known here; name a diffusers folder, or a file that ends in .safetensors or .ckpt"
        )
    refuse_lone_shard(file)
    container = open_weights(file)
    lacking = []
    for layout in layouts():
        for form in layout.single_files:
            without = form.lacking(container.entries)
            if not without:
                parts = [WeightFiles(c, container, s.names(container.entries), s) for c, s in form.mappings.items()]
                without = [form.mappings[part.component].prefix for part in parts if not part.names]
                if not without:
                    return ResolvedCheckpoint(layout, tuple(parts), form=form)
            lacking.append(f"{form.about} (it lacks keys that begin with {' and '.join(without)})")
    raise UnknownLayout(
        f"{file} is a checkpoint of an architecture without a layout; known are: {'; '.join(lacking)}. "
        "docs/adding-a-layout.md says how to add one"
    )


def open_weights(file: Path) -> SafetensorsFile:
    """A weight file of any kind known here. Raises BrokenFile."""
    return PickledCheckpoint.open(file) if file.suffix in PICKLE_SUFFIXES else SafetensorsFile.open(file)


def shared_variant(offered: Iterable[list[str]]) -> str:
    """Of the variants that each component has, the one to read: the first that all have, as diffusers loads a pipeline by one."""
    sets = [set(variants) for variants in offered if variants]
    return min(set.intersection(*sets), default="") if sets else ""


def _variants_in(folder: Path, stem: str) -> list[str]:
    return weight_variants([entry.name for entry in folder.iterdir()], stem) if folder.is_dir() else []


def weight_files(source: Path, stem: str, preferred: str = "") -> tuple[str, list[Path]]:
    """The files of one model's weights, and their variant (`fp16`; "" for plain ones).

    `source` is the folder in which their names begin with `stem`, an index of shards (`.safetensors.index.json`), or the
    one file that holds everything. The `preferred` variant goes before others, plain weights before those, and one file
    before shards.

    Raises LoneShard for one shard of several, BrokenBase for a folder without such weights and for a damaged index.
    """
    if source.name.endswith(".json"):
        stem, found, suffix = source.name.partition(".safetensors.index")
        if not found:
            raise BrokenBase(f"{source} is no index of shards; name one that ends in .safetensors.index.json")
        return suffix.removesuffix(".json").removeprefix("."), _shards(source)
    if source.is_file():
        refuse_lone_shard(source)
        return "", [source]
    if not source.is_dir():
        raise BrokenBase(f"there is no folder {source}; download the model again")
    for variant in sorted(_variants_in(source, stem), key=lambda each: (each != preferred, each)):
        whole = source / f"{stem}{variant}.safetensors"
        files = [whole] if whole.is_file() else _shards(source / f"{stem}.safetensors.index{variant}.json")
        return variant.removeprefix("."), files
    raise BrokenBase(f"{source} has no {stem}.safetensors; a model in another format has to be converted first")


def refuse_lone_shard(file: Path) -> None:
    """Raise LoneShard when a file's name, or an index beside it, says that it is one shard of several."""
    match = _SHARD.search(file.name)
    count = int(match[1]) if match else 1
    for index in [] if match else file.parent.glob("*.safetensors.index*.json"):
        with suppress(BrokenBase):  # another model's index, damaged or not
            shards = _shards(index)
            count = max(count, len(shards) if file in shards else 1)
    if count > 1:
        raise LoneShard(
            f"{file} is one of {count} shards, a part of the model; name its folder, or the .safetensors.index.json beside it"
        )


def weight_variants(names: Iterable[str], stem: str) -> list[str]:
    """What a component's files add to the stem of its weights, the one to read first: "" for plain ones, `.fp16`..."""
    known = list(names)
    variants = {name[len(stem) : -len(".safetensors")] for name in known if _is_whole(name, stem)}
    variants |= {_variant_of_index(name) for name in known if name.startswith(f"{stem}.safetensors.index.")}
    return sorted(variants)


def _is_whole(name: str, stem: str) -> bool:
    """Whether a file is a component's weights in one piece, plain or a variant: `model.safetensors`, `model.fp16...`."""
    middle = name[len(stem) : -len(".safetensors")]
    return (
        name.startswith(stem)
        and name.endswith(".safetensors")
        and (not middle or (middle[0] == "." and "-of-" not in middle))
    )


def _variant_of_index(name: str) -> str:
    """`""` for `model.safetensors.index.json`, `".fp16"` for `model.safetensors.index.fp16.json`."""
    return name.rpartition(".safetensors.index")[2].removesuffix(".json")


def _shards(index: Path) -> list[Path]:
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        # A name with a folder in it could point anywhere.
        if not shards or any(Path(name).name != name or not is_key(name) for name in shards):
            raise ValueError("a shard is not a file beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenBase(f"{index} is not an index of shards ({error}); download the model again") from error
    return [index.parent / name for name in sorted(shards)]


BATCH = 32 << 20
"""Bytes that a thread takes at a time, if they are several tensors'. With fewer in all, no threads are started."""


def digests_of(
    places: Mapping[str, TensorLocation],
    containers: Mapping[Path, SafetensorsFile],
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, str]:
    """The digest of each tensor by canonical name, as `tensor_digest` gives it. Memory holds one window per thread.

    `threads`: None for as many as this process has cores. Raises BrokenFile when a file has become shorter.
    """
    batches = list(_batches(places))

    def digest(names: list[str]) -> dict[str, str]:
        return _digests({name: places[name] for name in names}, containers[places[names[0]].file])

    def merged(parts: Iterable[dict[str, str]]) -> dict[str, str]:
        digests: dict[str, str] = {}
        for part in parts:
            digests.update(part)
            progress(len(digests), len(places), "reading the base")
        return digests

    if threads == 1 or len(batches) < 2:
        return merged(map(digest, batches))
    # hashlib lets go of the interpreter while it works.
    with ThreadPoolExecutor(threads or available_cores()) as pool:
        return merged(pool.map(digest, batches))


def _batches(places: Mapping[str, TensorLocation]) -> Iterator[list[str]]:
    """The names in file order, cut where the file changes or enough bytes are together."""
    batch: list[str] = []
    size = 0
    for name in sorted(places, key=lambda name: (str(places[name].file), places[name].entry.start)):
        if batch and (size >= BATCH or places[name].file != places[batch[0]].file):
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += places[name].entry.size
    if batch:
        yield batch


def _digests(places: Mapping[str, TensorLocation], container: SafetensorsFile) -> dict[str, str]:
    sums = {n: hashlib.sha256(tensor_label(n, DTYPE_NAMES[p.entry.dtype], p.shape)) for n, p in places.items()}
    straight = {name: place.entry for name, place in places.items() if not place.transposed}
    with closing(container.passing(straight)) as passing:
        for name, piece in passing:
            sums[name].update(piece)
    # What its file keeps the other way round is read whole.
    turned = {name: place.entry for name, place in places.items() if place.transposed}
    for name, stored in container.read(turned):
        sums[name].update(raw_bytes(places[name].canonical(stored)))
    return {name: found.hexdigest() for name, found in sums.items()}
