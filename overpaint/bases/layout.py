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

from overpaint.errors import OverpaintError


class UnknownLayout(OverpaintError):
    """A folder whose architecture no layout describes."""


@dataclass(frozen=True)
class Component:
    """One model of a pipeline: the stem of its weight files, and a prefix that newer libraries drop from its names.

    Canonical names carry the prefix: `text_encoder/text_model.encoder...`, whether the file spells it or not.
    """

    weights: str
    inner_prefix: str = ""

    def canonical(self, key: str) -> str:
        """The canonical spelling of a key of this component's file or module."""
        if self.inner_prefix and not key.startswith((self.inner_prefix, "text_projection.")):
            return self.inner_prefix + key
        return key


@dataclass(frozen=True)
class Layout:
    """An architecture: its components and, by text encoder, glob patterns of the projections that read its output."""

    name: str
    pipelines: tuple[str, ...]
    components: dict[str, Component]
    text_readers: dict[str, tuple[str, ...]]

    def readers(self, encoder: str, names: Iterable[str]) -> list[str]:
        """The canonical names among `names` that read `encoder`, sorted."""
        patterns = self.text_readers[encoder]
        return sorted(n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns))


@cache
def layouts() -> tuple[Layout, ...]:
    """Every layout that ships with the package."""
    found = []
    for entry in sorted(files("overpaint.bases").joinpath("layouts").iterdir(), key=lambda e: e.name):
        raw: dict[str, Any] = json.loads(entry.read_text("utf-8"))
        found.append(
            Layout(
                name=raw["name"],
                pipelines=tuple(raw["pipelines"]),
                components={k: Component(**v) for k, v in raw["components"].items()},
                text_readers={k: tuple(v) for k, v in raw["text_readers"].items()},
            )
        )
    return tuple(found)


def layout_of(folder: Path) -> Layout:
    """The layout of a diffusers folder, by its `model_index.json`.

    Raises OverpaintError when the folder is missing or has no readable index, UnknownLayout when no layout fits.
    """
    index = folder / "model_index.json"
    if not folder.is_dir():
        raise OverpaintError(f"no base at {folder}: it is not a folder; name a diffusers folder, or `emoji`")
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
