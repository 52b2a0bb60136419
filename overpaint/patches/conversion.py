"""A base in the other container: a folder as a single file, a single file as a folder, without a copy on the disk.

The converted base is one more base, whose files are not there yet; a build writes them. Names, values and digests are those
of the original. What the way back would give is compared with what went in before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.checkpoint import ResolvedCheckpoint, TensorLocation, WeightFiles
from overpaint.bases.key_mapping import KeyMapping, SingleFile, single_file_of
from overpaint.bases.safetensors_file import DTYPES
from overpaint.bases.virtual_checkpoint import DATA_START, VirtualCheckpoint, entries_at_offsets
from overpaint.core.errors import OverpaintError
from overpaint.patches.formats.dialects import ldm_modules

Form = Literal["single-file", "diffusers"]
FORMS: tuple[Form, ...] = ("single-file", "diffusers")
_CONFIGURATION = (".json", ".txt", ".model")


class NotConvertible(OverpaintError):
    """A base that the other container has no keys for."""


@dataclass(frozen=True)
class RenamedCheckpoint(VirtualCheckpoint):
    """Some tensors of a base as another file would hold them: the places that each key has there, from the top."""

    base: Base | None = field(default=None, compare=False, repr=False)
    held: Mapping[str, tuple[tuple[str, bool], ...]] = field(default_factory=dict, compare=False, repr=False)

    def stored(self, key: str) -> Iterator[Tensor]:
        assert self.base is not None
        for name, turned in self.held[key]:
            value = self.base.tensor(name)
            yield value.T if turned else value


def form_of(base: Base) -> Form:
    """Which of the two containers a base comes in."""
    return "single-file" if base.is_single_file else "diffusers"


def converted(base: Base, form: Form) -> Base:
    """A base in a container of that form, which is the other one than its own. Nothing is written.

    Its files have paths from the place at which it will be built; a single file has the path `.`. Raises NotConvertible
    when the layout has no single file for it.
    """
    single = _single_form(base) if form == "single-file" else None
    parts = list(_single_parts(base, single) if single else _folder_parts(base))
    opened = ResolvedCheckpoint(base.layout, tuple(parts), form=single)
    places = opened.places()
    if {n: p.shape for n, p in places.items()} != {n: p.shape for n, p in base.places.items()}:
        odd = sorted(places.keys() ^ base.places.keys())
        raise NotConvertible(
            f"{odd[0] if odd else 'a tensor'} of the base at {base.path} has no place in a {form} of {base.layout.name}; "
            "build it in the form it has"
        )
    view = Base(Path(), base.layout, places, {part.container.path: part.container for part in parts}, form=single)
    view._digests.update(base._digests)
    return view


def configuration(base: Base) -> dict[str, Path | bytes]:
    """What a folder of a single-file base holds beside the weights, by relative path: files to copy, and the new index.

    Components that are not there, such as a safety checker, leave the index. Raises NotFound without configuration.
    """
    folder, absent = base.config_folder, base.absent_components
    named = {name for name, value in base.index.items() if isinstance(value, list)} - set(absent)
    files: dict[str, Path | bytes] = {"model_index.json": index_bytes(base.mended_index)}
    for file in sorted(folder.glob("*/*")):
        inside = file.relative_to(folder)
        if file.suffix in _CONFIGURATION and ".index." not in file.name and inside.parts[0] in named:
            files[inside.as_posix()] = file
    return files


def index_bytes(index: Mapping[str, Any]) -> bytes:
    """A pipeline's index as diffusers writes it."""
    return (json.dumps(index, indent=2) + "\n").encode()


def _single_form(base: Base) -> SingleFile:
    form = single_file_of(base.layout.single_files, base.places)
    if form is None:
        raise NotConvertible(f"there are no single files of {base.layout.name}; build {base.path} as a folder")
    return form


def _folder_parts(base: Base) -> Iterator[WeightFiles]:
    for component, rules in base.layout.components.items():
        keys: dict[str, tuple[str, ...]] = {name: (name,) for name in _names(base, component)}
        path = Path(component) / f"{rules.weights}.safetensors"
        yield WeightFiles(component, _renamed(base, path, {component: (keys, None)}), keys)


def _single_parts(base: Base, form: SingleFile) -> Iterator[WeightFiles]:
    written = {}
    for component, mapping in form.mappings.items():
        names = _names(base, component)
        keys = _numbered_through(mapping, names) if mapping.level_end else mapping.keys(names)
        written[component] = (keys, mapping)
    container = _renamed(base, Path(), written)
    for component, mapping in form.mappings.items():
        yield WeightFiles(component, container, mapping.names(container.entries), mapping)


def _names(base: Base, component: str) -> list[str]:
    start = f"{component}/"
    return [name.removeprefix(start) for name in base.names if name.startswith(start)]


def _numbered_through(mapping: KeyMapping, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Keys of a U-Net, whose blocks are numbered through."""
    modules = ldm_modules({name.rpartition(".")[0] for name in names})
    split = ((name, *name.rpartition(".")) for name in names)
    return {f"{mapping.prefix}{modules[m]}.{attribute}": (name,) for name, m, _, attribute in split if m in modules}


def _renamed(
    base: Base, path: Path, written: Mapping[str, tuple[Mapping[str, tuple[str, ...]], KeyMapping | None]]
) -> RenamedCheckpoint:
    held: dict[str, tuple[tuple[str, bool], ...]] = {}
    described: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for component, (keys, mapping) in written.items():
        for key, names in keys.items():
            places = [base.places.get(f"{component}/{name}") for name in names]
            whole = [place for place in places if place is not None]
            if len(whole) < len(names) or len({(p.entry.dtype, p.shape) for p in whole}) > 1:
                continue  # `converted` notices that its tensors are missing
            turned = mapping is not None and mapping.is_transposed(key) and len(whole[0].shape) == 2
            held[key] = tuple((f"{component}/{name}", turned) for name in names)
            shape = _stored_shape(whole, turned)
            if mapping is not None and mapping.is_convolution(key) and len(shape) == 2:
                shape = (*shape, 1, 1)
            described.append((key, DTYPES[whole[0].entry.dtype], shape))
    return RenamedCheckpoint(path, entries_at_offsets(described), {"format": "pt"}, DATA_START, (), base, held)


def _stored_shape(stack: list[TensorLocation], turned: bool) -> tuple[int, ...]:
    shape = stack[0].shape[::-1] if turned else stack[0].shape
    return (shape[0] * len(stack), *shape[1:]) if len(stack) > 1 else shape
