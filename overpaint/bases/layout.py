"""An architecture as data: its tensors, the text inputs by which a prompt reaches them (`layouts/*.json`), and how a
single-file checkpoint names a component's tensors (`spellings/*.json`).

A rule of a spelling is a pair of templates, the file's and diffusers'. `{i}` stands for a number, `{1+i}` for a number
counted from one, `{rest}` for anything, any other name for a word. U-Net blocks are numbered through in such a file, so the
canonical side may ask for `{block}` and `{layer}`, the quotient and remainder of `{at}` by the blocks per level; and decoder
levels are numbered from the other end, so it may ask for `{mirror}`, `{i}` counted from the last. Where the canonical side is
a list, the file keeps its tensors stacked in one, in equal parts from the first row down.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from overpaint.core.errors import OverpaintError
from overpaint.core.names import checked_number, shown

_HOLE = re.compile(r"\{(?:(\d+)\+)?(\w+)\}")
_NUMBERS = ("at", "i", "j", "mirror")


@dataclass(frozen=True)
class Template:
    """One side of a rule, as found in a layout."""

    text: str

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        parts, end = [], 0
        for hole in _HOLE.finditer(self.text):
            kind = "[0-9]{1,4}" if hole[2] in _NUMBERS else ".+" if hole[2] == "rest" else r"\w+"
            parts += [re.escape(self.text[end : hole.start()]), f"(?P<{hole[2]}>{kind})"]
            end = hole.end()
        return re.compile("".join(parts) + re.escape(self.text[end:]))

    @cached_property
    def _counted_from(self) -> dict[str, int]:
        return {hole[2]: int(hole[1] or 0) for hole in _HOLE.finditer(self.text)}

    def match(self, key: str) -> dict[str, str | int] | None:
        """What stands in the holes, numbers counted from zero; None when the key is another."""
        match = self._pattern.fullmatch(key)
        if match is None:
            return None
        values: dict[str, str | int] = {}
        for hole, text in match.groupdict().items():
            values[hole] = int(text) - self._counted_from[hole] if hole in _NUMBERS else text
        return None if any(value == -1 for value in values.values()) else values

    def filled(self, values: Mapping[str, str | int]) -> str:
        """The text with these values in its holes, numbers counted from zero."""
        text = self.text
        for hole in _HOLE.finditer(self.text):
            value = values[hole[2]]
            text = text.replace(hole[0], value if isinstance(value, str) else str(value + int(hole[1] or 0)))
        return text

    def numbers(self, keys: Iterable[str]) -> set[int]:
        """What stands in the one numeric hole, over all keys that fit."""
        matches = (self.match(key) for key in keys)
        return {int(value) for found in matches if found for hole, value in found.items() if hole in _NUMBERS}


@dataclass(frozen=True)
class KeyMapping:
    """One component in a single file.

    `prefix` starts its keys; `blocks` are rules for whole keys, the first that fits counts (none: the keys are
    diffusers' own); `parts` are replacements within what they give. The first key like `level_end` has the number of
    blocks per level; without one there is a single level, whose blocks `level_count` counts. `mirrored` counts the
    decoder's levels. The others are glob patterns of keys without the prefix: `transposed` of matrices that the file keeps
    the other way round, `convolutions` of those that it keeps as 1 x 1 convolutions, `unused` of tensors that the pipeline
    does without; and, of whole keys, `copies` of what holds the component a second time.
    """

    prefix: str
    blocks: tuple[tuple[str, str | tuple[str, ...]], ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    level_end: str = ""
    level_count: str = ""
    mirrored: str = ""
    transposed: tuple[str, ...] = ()
    convolutions: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()

    @cached_property
    def _rules(self) -> list[tuple[Template, tuple[str, ...]]]:
        return [(Template(written), (name,) if isinstance(name, str) else name) for written, name in self.blocks]

    def names(self, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """By key, diffusers' names of what it holds: one, or those of a stack from the top. Other keys are left out."""
        local = {key: key.removeprefix(self.prefix) for key in keys if key.startswith(self.prefix)}
        local = {key: text for key, text in local.items() if not _fits(text, self.unused)}
        if not self.blocks:
            return {key: (text,) for key, text in local.items()}
        ends = Template(self.level_end).numbers(local.values())
        per_level = min(ends, default=1 + max(Template(self.level_count).numbers(local.values()), default=0))
        levels = 1 + max(Template(self.mirrored).numbers(local.values()), default=0)
        matched = {key: self._names(text, max(per_level, 1), levels) for key, text in local.items()}
        return {key: names for key, names in matched.items() if names}

    def _names(self, key: str, per_level: int, levels: int) -> tuple[str, ...]:
        for template, canonical in self._rules:
            match = template.match(key)
            if match is not None:
                block, layer = divmod(int(match.get("at", 0)), per_level)
                mirror = levels - 1 - int(match.get("i", 0))
                holes = {**match, "block": block, "layer": layer, "mirror": mirror}
                return tuple(self._with_parts(name.format(**holes)) for name in canonical)
        return ()

    def _with_parts(self, name: str) -> str:
        for old, new in self.parts:
            name = name.replace(old, new)
        return name

    def keys(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The way back: the keys that hold tensors of these names, for a component whose blocks are not numbered through.

        Names that no rule gives are left out.
        """
        remaining = list(names)
        if not self.blocks:
            return {self.prefix + name: (name,) for name in remaining}
        names_by_key: dict[str, tuple[str, ...]] = {}
        rules = [(written, [Template(side) for side in canonical]) for written, canonical in self._rules]
        matches = (sides[0].match(name) for _, sides in rules for name in remaining)
        levels = 1 + max((int(values.get("mirror", 0)) for values in matches if values), default=0)
        for written, sides in rules:
            for name in list(remaining):
                values = sides[0].match(name)
                if values is not None:
                    stack = tuple(side.filled(values) for side in sides)
                    mirrored = {"i": levels - 1 - int(values["mirror"])} if "mirror" in values else {}
                    names_by_key[self.prefix + self._without_parts(written.filled({**values, **mirrored}))] = stack
                    remaining = [other for other in remaining if other not in stack]
        return names_by_key

    def _without_parts(self, key: str) -> str:
        for old, new in self.parts:
            key = key.replace(new, old)
        return key

    def is_transposed(self, key: str) -> bool:
        """Whether the file keeps the matrix of this key the other way round than diffusers does."""
        return bool(self.transposed) and _fits(key.removeprefix(self.prefix), self.transposed)

    def is_convolution(self, key: str) -> bool:
        """Whether the file keeps the matrix of this key as a 1 x 1 convolution."""
        return bool(self.convolutions) and _fits(key.removeprefix(self.prefix), self.convolutions)


@dataclass(frozen=True)
class SingleFile:
    """One way of storing a whole pipeline in a file: what such a file is called, how it names the tensors of each
    component, and which published folder has the configuration and tokenizer that it lacks: `config`, or by input channels
    one of `configs`.

    `holds` is a canonical name that a base must have to be written so; empty: any base of the layout.
    """

    about: str
    config: str
    mappings: Mapping[str, KeyMapping]
    holds: str = ""
    configs: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> SingleFile:
        """As a layout writes it: each component names its rules (`spelling`) and may add to them or replace some."""
        components: Mapping[str, Any] = raw["components"]
        mappings = {
            name: KeyMapping(**{**_rules_of(own["spelling"]), **{k: v for k, v in own.items() if k != "spelling"}})
            for name, own in components.items()
        }
        return cls(raw["about"], raw["config"], mappings, raw.get("holds", ""), raw.get("configs", {}))

    def lacking(self, keys: Collection[str]) -> list[str]:
        """The prefixes that keys of such a file have and none of these has."""
        prefixes = [mapping.prefix for mapping in self.mappings.values()]
        return [prefix for prefix in prefixes if not any(key.startswith(prefix) for key in keys)]


def single_file_of(forms: Iterable[SingleFile], names: Collection[str]) -> SingleFile | None:
    """How a base that holds tensors of these names is written to one file; None where there is no such file."""
    fitting = [form for form in forms if not form.holds or form.holds in names]
    return max(fitting, key=lambda form: bool(form.holds), default=None)


@cache
def transformer_names(layout: str, code: str) -> KeyMapping | None:
    """How code for a diffusion transformer names its layers: that of its own publication (`native`), or another (`xlabs`)."""
    rules = _rules_of(code)
    return KeyMapping("", rules[layout]) if layout in rules else None


def _rules_of(name: str) -> dict[str, Any]:
    file = files("overpaint.bases").joinpath("spellings").joinpath(f"{name}.json")
    rules: dict[str, Any] = frozen(json.loads(file.read_text("utf-8")))
    return rules


def frozen(value: Any) -> Any:
    """JSON with tuples for lists."""
    if isinstance(value, list | tuple):
        return tuple(frozen(item) for item in value)
    return {key: frozen(item) for key, item in value.items()} if isinstance(value, dict) else value


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class UnknownLayout(OverpaintError):
    """A folder or file whose architecture no layout describes."""


@dataclass(frozen=True)
class Component:
    """One model of a pipeline, and how its tensors' names and shapes have been written over the years.

    `weights` is the stem of its files. Canonical names carry `inner_prefix`, which newer libraries drop
    (`text_encoder/text_model.encoder...`), and today's words for what `renames` lists. `buffers` are glob patterns of
    what older files store although it follows from the configuration; `matrices`, of what some store as 1 x 1 convolutions.
    `model` is the class of transformers that computes it, for text encoders whose output is not caught; `unread`, patterns of
    what a text encoder has and no prompt needs. With `feed_forward_norm`, a text encoder has a norm behind the feed-forward part
    of each layer. An `optional` component may be missing.
    """

    weights: str
    model: str = ""
    inner_prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    feed_forward_norm: bool = False
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
    `read_by` are the tools that load LoRAs by diffusers' names (`formats.dialects.READERS`), where prompts are caught.
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


def read_extras(folder: Path) -> dict[str, Any]:
    """What `overpaint.json` in a base declares: `guidance`, `prompt_length` in tokens, `size` in pixels, `sentences`; or nothing.

    `sentences` has lists: under `object` and `style` pairs of a sentence with one `{}` and the same without, under `neutral`
    sentences with one. Raises OverpaintError where one of these is something else; other keys are passed over.
    """
    file = folder / "overpaint.json"
    if not file.is_file():
        return {}
    try:
        extras = json.loads(file.read_text("utf-8"))
        if not isinstance(extras, dict):
            raise ValueError("it is no JSON object")
        if "guidance" in extras:
            checked_number(extras["guidance"], "`guidance`")
        for key, least, most in (("prompt_length", 1, 100_000), ("size", 8, 16_384)):
            value = extras.get(key, least)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"`{key}` is a whole number from {least} to {most}; got {shown(value)}")
        _check_sentences(extras.get("sentences", {}))
    except (OSError, ValueError, RecursionError, OverpaintError) as error:
        raise OverpaintError(f"{file} cannot be used ({error}); mend it, or get the base again") from error
    return extras


def _check_sentences(sentences: Any) -> None:
    if not isinstance(sentences, dict):
        raise ValueError(f"`sentences` is an object; got {shown(sentences)}")
    for kind in ("object", "style", "neutral"):
        listed = sentences.get(kind, [["{}", ""]] if kind != "neutral" else ["{}"])
        pairs = [[each, ""] for each in listed] if kind == "neutral" and isinstance(listed, list) else listed
        if not isinstance(pairs, list) or not pairs:
            raise ValueError(f"`sentences` has a list under {kind!r}; got {shown(listed)}")
        for pair in pairs:
            texts = isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            if not texts or "{}" not in pair[0] or set("{}") & set(pair[0].replace("{}", "", 1)):
                raise ValueError(
                    f"a sentence under {kind!r} has one {{}}, and beside it the same without; got {shown(pair)}"
                )


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
