"""Which tensors an architecture has and which of them read the prompt, as data (`layouts/*.json`)."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from overpaint.bases.spelling import Spelling
from overpaint.errors import OverpaintError


class UnknownLayout(OverpaintError):
    """A folder or file whose architecture no layout describes."""


@dataclass(frozen=True)
class Component:
    """One model of a pipeline, and how its tensors' names and shapes have been written over the years.

    `weights` is the stem of its files. Canonical names carry `inner_prefix`, which newer libraries drop
    (`text_encoder/text_model.encoder...`), and today's words for what `renames` lists. `buffers` are glob patterns of
    what older files store although it follows from the configuration; `matrices`, of what some store as 1 x 1 convolutions.
    """

    weights: str
    inner_prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()

    def canonical(self, key: str) -> str:
        """The canonical spelling of a key of this component's file or module."""
        for old, new in self.renames:
            key = key.replace(old, new)
        if self.inner_prefix and not key.startswith((self.inner_prefix, "text_projection.")):
            return self.inner_prefix + key
        return key

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor is no weight, so that files of one model may differ in having it."""
        return _fits(name, self.buffers)

    def shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The canonical shape of a tensor that a file stores as `stored`; the bytes are the same."""
        return stored[:2] if stored[2:] == (1, 1) and _fits(name, self.matrices) else stored


@dataclass(frozen=True)
class Layout:
    """An architecture: its components and, by text encoder, glob patterns of the projections that read its output.

    `spellings` say how a single file spells each component (empty: there is no such file of this architecture), and
    `single_file_config` which published folder has the configuration and tokenizer that a single file lacks.
    """

    name: str
    pipelines: tuple[str, ...]
    components: dict[str, Component]
    text_readers: dict[str, tuple[str, ...]]
    spellings: dict[str, Spelling]
    single_file_config: str = ""

    def readers(self, encoder: str, names: Iterable[str]) -> list[str]:
        """The canonical names among `names` that read `encoder`, sorted."""
        patterns = self.text_readers[encoder]
        return sorted(name for name in names if _fits(name, patterns))


@cache
def layouts() -> tuple[Layout, ...]:
    """Every layout that ships with the package."""
    found = []
    for entry in sorted(files("overpaint.bases").joinpath("layouts").iterdir(), key=lambda e: e.name):
        raw: dict[str, Any] = _frozen(json.loads(entry.read_text("utf-8")))
        single = raw.get("single_file", {})
        found.append(
            Layout(
                name=raw["name"],
                pipelines=raw["pipelines"],
                components={k: Component(**v) for k, v in raw["components"].items()},
                text_readers=raw["text_readers"],
                spellings={k: Spelling(**v) for k, v in single.get("spellings", {}).items()},
                single_file_config=single.get("config", ""),
            )
        )
    return tuple(found)


def _frozen(value: Any) -> Any:
    """JSON with tuples for lists."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, dict) else value


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def layout_of(folder: Path) -> Layout:
    """The layout of a diffusers folder, by its `model_index.json`.

    Raises OverpaintError when the folder is missing or has no readable index, UnknownLayout when no layout fits.
    """
    index = folder / "model_index.json"
    if not folder.is_dir():
        raise OverpaintError(
            f"no base at {folder}: it is not a folder or a file; name a diffusers folder, a single-file "
            ".safetensors checkpoint, or `emoji`"
        )
    if not index.is_file():
        raise OverpaintError(
            f"{folder} has no model_index.json, so it is not a whole diffusers folder; download it again"
        )
    try:
        kind = json.loads(index.read_text("utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise OverpaintError(f"{index} is not a diffusers index ({error}); download the base again") from error
    for layout in layouts():
        if kind in layout.pipelines:
            return layout
    known = ", ".join(p for layout in layouts() for p in layout.pipelines)
    raise UnknownLayout(f"{folder} holds a {kind}, an architecture without a layout; known are: {known}")
