"""An architecture as data: its tensors, and the text inputs by which a prompt reaches them (`layouts/*.json`)."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from overpaint.bases.key_mapping import SingleFile, frozen
from overpaint.core.errors import OverpaintError


class UnknownLayout(OverpaintError):
    """A folder or file whose architecture no layout describes."""


@dataclass(frozen=True)
class Component:
    """One model of a pipeline, and how its tensors' names and shapes have been written over the years.

    `weights` is the stem of its files. Canonical names carry `inner_prefix`, which newer libraries drop
    (`text_encoder/text_model.encoder...`), and today's words for what `renames` lists. `buffers` are glob patterns of
    what older files store although it follows from the configuration; `matrices`, of what some store as 1 x 1 convolutions.
    `model` is the class of transformers that computes it, for text encoders whose output is not caught; `unread`, patterns of
    what a text encoder has and no prompt needs. An `optional` component may be missing.
    """

    weights: str
    model: str = ""
    inner_prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    optional: bool = False

    def canonical(self, key: str) -> str:
        """The canonical name of a key of this component's file or module."""
        for old, new in self.renames:
            key = key.replace(old, new)
        if self.inner_prefix and not key.startswith((self.inner_prefix, "text_projection.")):
            return self.inner_prefix + key
        return key

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor is no weight, so that files of one model may differ in having it."""
        return _fits(name, self.buffers)

    def is_unread(self, name: str) -> bool:
        """Whether no prompt needs this tensor of a text encoder."""
        return _fits(name, self.unread)

    def shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The canonical shape of a tensor that a file stores as `stored`; the bytes are the same."""
        return stored[:2] if stored[2:] == (1, 1) and _fits(name, self.matrices) else stored


LAST, PENULTIMATE, POOLED, PROJECTION = "last", "penultimate", "pooled", "projection"
"""The output of a text input; `projection`: whatever the pipeline's own code brings to the projection."""


@dataclass(frozen=True)
class TextInput:
    """One way by which a prompt enters the denoiser: the output of a text encoder, and the projections that read it.

    `encoder` is a component, `tokenizer` a folder of the pipeline; `output` is the last hidden state, the one
    before it, or the pooled embedding. `projections` are glob patterns of canonical names. Text inputs may stand
    side by side in the input columns of a projection: this one owns as many as the tensor `width` is long (all that are
    left when it names none), after those of the text inputs in `after`.
    """

    encoder: str
    projections: tuple[str, ...]
    tokenizer: str = "tokenizer"
    output: str = LAST
    width: str = ""
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """An architecture: its components, and its text inputs by name.

    `pipelines` are the classes of such a pipeline. Where `by_channels` names some too, the one that draws is found by the
    input channels of the tensor `input`: they alone distinguish an inpainting model.
    `single_files` are the ways of keeping such a pipeline in one file; none: there is no such file of this architecture.
    `read_by` are the tools that load LoRAs of a diffusion transformer by diffusers' names (`formats.dialects.READERS`).
    Where prompts are caught, `norms` are the parameters through which they pass before a projection, and `arguments` what the
    pipeline is called with: small pictures, few frames, no guidance.
    """

    name: str
    pipelines: tuple[str, ...]
    components: dict[str, Component]
    text_inputs: dict[str, TextInput]
    single_files: tuple[SingleFile, ...] = ()
    input: str = ""
    by_channels: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    read_by: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Layout:
        """As `layouts/*.json` and docs/adding-a-layout.md write it."""
        whole: dict[str, Any] = frozen(raw)
        return cls(
            components={name: Component(**rules) for name, rules in whole.pop("components").items()},
            text_inputs={name: TextInput(**rules) for name, rules in whole.pop("text_inputs").items()},
            single_files=tuple(SingleFile.from_json(form) for form in whole.pop("single_files", ())),
            **{key: value for key, value in whole.items() if key != "about"},
        )

    @property
    def is_caught(self) -> bool:
        """Whether prompts are caught where the pipeline hands them to the denoiser."""
        return any(text_input.output == PROJECTION for text_input in self.text_inputs.values())

    def encoders(self, names: Iterable[str]) -> list[str]:
        """The text encoders of which a base with tensors of these names has any."""
        there = {name.partition("/")[0] for name in names}
        return [name for name in self.components if name.startswith("text_encoder") and name in there]

    def projections(self, text_input: str, names: Iterable[str]) -> list[str]:
        """The canonical names among `names` that read a text input, sorted."""
        patterns = self.text_inputs[text_input].projections
        return sorted(name for name in names if _fits(name, patterns))


@cache
def layouts() -> tuple[Layout, ...]:
    """Every layout that ships with the package."""
    entries = sorted(files("overpaint.bases").joinpath("layouts").iterdir(), key=lambda entry: entry.name)
    return tuple(Layout.from_json(json.loads(entry.read_text("utf-8"))) for entry in entries)


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a diffusers folder's `model_index.json`. Raises OverpaintError when it is missing or damaged."""
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
        content = json.loads(index.read_text("utf-8"))
        if isinstance(content, dict) and isinstance(content.get("_class_name"), list):
            raise UnknownLayout(
                f"{folder} names a pipeline that comes as a program of its own; code that comes with a model is never run: use a "
                "folder that names a class of diffusers"
            )
        if not isinstance(content, dict) or not isinstance(content["_class_name"], str):
            raise ValueError("it names no class")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise OverpaintError(f"{index} is not a diffusers index ({error}); download the base again") from error
    return content


def layout_of(folder: Path) -> Layout:
    """The layout of a diffusers folder, by its `model_index.json`.

    Raises OverpaintError when the folder is missing or has no readable index, UnknownLayout when no layout fits.
    """
    kind = read_index(folder)["_class_name"]
    for layout in layouts():
        if kind in (*layout.pipelines, *layout.by_channels.values()):
            return layout
    known = ", ".join(p for layout in layouts() for p in layout.pipelines)
    raise UnknownLayout(
        f"{folder} holds a {kind[:80]}, an architecture without a layout; known are: {known}. "
        "docs/adding-a-layout.md says how to add one"
    )
