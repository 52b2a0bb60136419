"""Which files hold a base's weights, and what each of their tensors is called: a diffusers folder or a single file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overpaint.bases.container import Container, Entry
from overpaint.bases.layout import Layout, UnknownLayout, layout_of, layouts
from overpaint.errors import OverpaintError


class BrokenBase(OverpaintError):
    """A base with a file missing, or one that contradicts itself."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies (a safetensors file, its key and bytes there), and the canonical shape it has."""

    file: Path
    key: str
    entry: Entry
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """The tensors of one component that one file holds: diffusers' names by key."""

    component: str
    container: Container
    names: dict[str, str]


@dataclass(frozen=True)
class Opened:
    """What was found at a path: the layout, the files in use, and the suffix of a folder's files where it is not plain."""

    layout: Layout
    parts: tuple[Part, ...]
    variant: str | None = None

    def places(self) -> dict[str, Place]:
        """Every weight of every component by canonical name, sorted. Raises BrokenBase when one is there twice."""
        found: dict[str, Place] = {}
        for part in self.parts:
            rules = self.layout.components[part.component]
            for key, local in part.names.items():
                name = rules.canonical(local)
                if rules.is_buffer(name):
                    continue
                path, entry = f"{part.component}/{name}", part.container.entries[key]
                if path in found:
                    raise BrokenBase(
                        f"{part.container.path} holds {path} twice, as {found[path].key} and as {key}; "
                        "take away the one that is not meant"
                    )
                found[path] = Place(part.container.path, key, entry, rules.shape(name, entry.shape))
        return dict(sorted(found.items()))


def open_folder(folder: Path) -> Opened:
    """A diffusers folder: one weight file or an index of shards per component, plain or of one variant.

    Raises OverpaintError for a folder that is missing, unknown, incomplete or damaged.
    """
    layout = layout_of(folder)
    parts, variants = [], set()
    for name, component in layout.components.items():
        variant, files = _weight_files(folder / name, component.weights)
        variants.add(variant)
        for file in files:
            container = Container.open(file)
            parts.append(Part(name, container, {key: key for key in container.entries}))
    return Opened(layout, tuple(parts), max(variants) or None)


def open_single_file(file: Path) -> Opened:
    """A checkpoint with all components in one safetensors file, spelled as its layout's rules say.

    Raises BrokenFile when it is damaged, UnknownLayout when it is of no layout that has such files.
    """
    if file.suffix != ".safetensors":
        raise UnknownLayout(
            f"{file} is not a .safetensors file; convert it first (a pickle could run any program, so none is opened)"
        )
    container = Container.open(file)
    lacking = []
    for layout in layouts():
        parts = [
            Part(name, container, spelling.names(container.entries)) for name, spelling in layout.spellings.items()
        ]
        without = [layout.spellings[part.component].prefix for part in parts if not part.names]
        if parts and not without:
            return Opened(layout, tuple(parts))
        lacking += [f"{layout.name} would have keys that begin with {' and '.join(without)}"] if without else []
    raise UnknownLayout(f"{file} is a checkpoint of no known layout: {'; '.join(lacking)}")


def _weight_files(folder: Path, stem: str) -> tuple[str, list[Path]]:
    """The variant of a component's weights ("" for plain files) and the files: one, or the shards of an index."""
    if not folder.is_dir():
        raise BrokenBase(f"the base lacks its folder {folder}; download it again")
    names = sorted(entry.name for entry in folder.iterdir())
    variants = {name[len(stem) : -len(".safetensors")] for name in names if _is_whole(name, stem)}
    variants |= {_variant_of_index(name) for name in names if name.startswith(f"{stem}.safetensors.index.")}
    for variant in sorted(variants):
        plain = folder / f"{stem}{variant}.safetensors"
        return variant.removeprefix("."), [plain] if plain.is_file() else list(_shards(folder, stem, variant))
    raise BrokenBase(f"{folder} has no {stem}.safetensors; a base in another format has to be converted first")


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


def _shards(folder: Path, stem: str, variant: str) -> Iterator[Path]:
    index = folder / f"{stem}.safetensors.index{variant}.json"
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        # A name with a folder in it could point anywhere.
        if not shards or any(Path(name).name != name for name in shards):
            raise ValueError("a shard is not a file beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenBase(f"{index} is not an index of shards ({error}); download the base again") from error
    return (folder / name for name in sorted(shards))
