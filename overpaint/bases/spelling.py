"""How a single-file checkpoint spells a component's tensors: rules that are data, read into diffusers' names.

A rule is a pair of templates. `{i}` stands for a number, `{1+i}` for a number counted from one, `{rest}` for anything,
any other name for a word. U-Net blocks are numbered through in such a file, so the canonical side may ask for `{block}`
and `{layer}`, the quotient and remainder of `{at}` by the blocks per level; and decoder levels are numbered from the
other end, so it may ask for `{mirror}`, `{i}` counted from the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

_HOLE = re.compile(r"\{(?:(\d+)\+)?(\w+)\}")
_NUMBERS = ("at", "i", "j")


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
        found = self._pattern.fullmatch(key)
        if found is None:
            return None
        values: dict[str, str | int] = {}
        for hole, text in found.groupdict().items():
            values[hole] = int(text) - self._counted_from[hole] if hole in _NUMBERS else text
        return None if any(value == -1 for value in values.values()) else values

    def numbers(self, keys: Iterable[str]) -> set[int]:
        """What stands in the one numeric hole, over all keys that fit."""
        matches = (self.match(key) for key in keys)
        return {int(value) for found in matches if found for hole, value in found.items() if hole in _NUMBERS}


@dataclass(frozen=True)
class Spelling:
    """One component in a single file.

    `prefix` starts its keys; `blocks` are rules for whole keys, the first that fits counts (none: the keys are
    diffusers' own); `parts` are replacements within what they give. The first key like `level_end` has the number of
    blocks per level; without one there is a single level, whose blocks `level_count` counts. `mirrored` counts the
    decoder's levels. `copies` are glob patterns of keys that hold the component a second time.
    """

    prefix: str
    blocks: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    level_end: str = ""
    level_count: str = ""
    mirrored: str = ""
    copies: tuple[str, ...] = ()

    @cached_property
    def _rules(self) -> list[tuple[Template, str]]:
        return [(Template(written), canonical) for written, canonical in self.blocks]

    def names(self, keys: Iterable[str]) -> dict[str, str]:
        """diffusers' name of each key of this component, by key; keys that no rule names are left out."""
        local = {key: key.removeprefix(self.prefix) for key in keys if key.startswith(self.prefix)}
        if not self.blocks:
            return local
        ends = Template(self.level_end).numbers(local.values())
        per_level = min(ends, default=1 + max(Template(self.level_count).numbers(local.values()), default=0))
        levels = 1 + max(Template(self.mirrored).numbers(local.values()), default=0)
        found = {key: self._name(text, max(per_level, 1), levels) for key, text in local.items()}
        return {key: name for key, name in found.items() if name is not None}

    def _name(self, key: str, per_level: int, levels: int) -> str | None:
        for template, canonical in self._rules:
            found = template.match(key)
            if found is not None:
                block, layer = divmod(int(found.get("at", 0)), per_level)
                mirror = levels - 1 - int(found.get("i", 0))
                name = canonical.format(**{**found, "block": block, "layer": layer, "mirror": mirror})
                for old, new in self.parts:
                    name = name.replace(old, new)
                return name
        return None
