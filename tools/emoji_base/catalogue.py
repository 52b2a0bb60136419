"""The words the bases know: objects, styles, backgrounds, and the sentences that name them (`catalogue.json`)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

Colour: TypeAlias = tuple[int, int, int]

PATH = Path(__file__).with_name("catalogue.json")
EMOJI = Path(__file__).parents[2] / "overpaint" / "bases" / "emoji" / "model" / "overpaint.json"

ASKED: tuple[tuple[tuple[str, ...], float], ...] = (
    (("object",), 0.30),
    (("object", "style"), 0.26),
    (("object", "background"), 0.16),
    (("object", "style", "background"), 0.22),
    (("style",), 0.03),
    (("background",), 0.03),
)
"""What a training caption names, and how often."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows, or what a caption asks for; None where the caption leaves it open."""

    object: str | None = None
    style: str | None = None
    background: str | None = None

    def allows(self, other: Scene) -> bool:
        """Whether a picture of `other` satisfies a caption that asks for this scene."""
        pairs = ((self.object, other.object), (self.style, other.style), (self.background, other.background))
        return all(wanted is None or wanted == shown for wanted, shown in pairs)


@dataclass(frozen=True)
class Catalogue:
    """The vocabulary of the bases.

    `drawings` maps an object to its CLDR short name, `artwork` a style to its source set, `duotones` a style to the two
    RGB values its darks and lights are redrawn in, `colours` a background to its RGB value, `names` an object to itself
    and its synonyms.
    """

    drawings: dict[str, str]
    groups: dict[str, str]
    names: dict[str, tuple[str, ...]]
    artwork: dict[str, str]
    duotones: dict[str, tuple[Colour, Colour]]
    colours: dict[str, Colour]
    templates: dict[str, tuple[str, ...]]
    held_out_templates: dict[str, tuple[str, ...]]

    @property
    def objects(self) -> tuple[str, ...]:
        return tuple(self.drawings)

    @property
    def styles(self) -> tuple[str, ...]:
        return tuple(self.artwork)

    @property
    def backgrounds(self) -> tuple[str, ...]:
        return tuple(self.colours)

    def scenes(self) -> Iterator[Scene]:
        """Every drawing on every background."""
        for name in self.objects:
            for style in self.styles:
                for background in self.backgrounds:
                    yield Scene(name, style, background)


@cache
def catalogue() -> Catalogue:
    """The catalogue beside this file."""
    raw: dict[str, Any] = json.loads(PATH.read_text("utf-8"))
    objects, styles = raw["objects"], raw["styles"]
    return Catalogue(
        drawings={name: entry["drawing"] for name, entry in objects.items()},
        groups={name: entry["group"] for name, entry in objects.items()},
        names={name: (name, *entry.get("synonyms", ())) for name, entry in objects.items()},
        artwork={name: entry["artwork"] for name, entry in styles.items()},
        duotones={
            name: (_colour(entry["duotone"][0]), _colour(entry["duotone"][1]))
            for name, entry in styles.items()
            if "duotone" in entry
        },
        colours={name: _colour(rgb) for name, rgb in raw["backgrounds"].items()},
        templates={kind: tuple(items) for kind, items in raw["templates"].items()},
        held_out_templates={kind: tuple(items) for kind, items in raw["held_out_templates"].items()},
    )


SMALL_OBJECTS = (
    *("cat", "dog", "fox", "panda", "frog", "penguin", "fish", "owl", "butterfly", "apple", "banana", "pizza"),
    *("hamburger", "strawberry", "mushroom", "icecream", "cake", "car", "bus", "truck", "bicycle", "rocket"),
    *("rose", "cactus", "sun", "moon", "robot", "ghost", "skull", "pistol", "dagger", "bomb", "cigarette", "key"),
    *("umbrella", "house", "balloon", "crown", "guitar", "hat"),
)
SMALL_STYLES = ("flat", "clay", "ink", "blueprint")


@cache
def small() -> Catalogue:
    """What the `emoji-dit` base learns of the catalogue: fewer objects and styles, so that two cores train it in an hour."""
    whole = catalogue()
    objects = [name for name in whole.objects if name in SMALL_OBJECTS]
    return replace(
        whole,
        drawings={name: whole.drawings[name] for name in objects},
        groups={name: whole.groups[name] for name in objects},
        names={name: whole.names[name] for name in objects},
        artwork={name: whole.artwork[name] for name in SMALL_STYLES},
    )


def write_words(folder: Path, words: Catalogue, settings: dict[str, Any]) -> None:
    """Write into a base's folder what it knows of the catalogue, and `overpaint.json`: settings, and sentences for solvers.

    The sentences are those of the package's `emoji` base, without those that name a style or an object that is not known.
    """
    raw: dict[str, Any] = json.loads(PATH.read_text("utf-8"))
    known = {
        "objects": {name: entry for name, entry in raw["objects"].items() if name in words.objects},
        "styles": {name: entry for name, entry in raw["styles"].items() if name in words.styles},
    }
    (folder / PATH.name).write_text(json.dumps({**raw, **known}, indent=1), "utf-8")
    whole = catalogue()
    unknown = {word for names in whole.names.values() for word in names} | set(whole.styles)
    unknown -= {word for name in words.objects for word in words.names[name]} | set(words.styles)
    sentences = {
        kind: [each for each in listed if not unknown & set(re.findall(r"\w+", str(each)))]
        for kind, listed in json.loads(EMOJI.read_text("utf-8"))["sentences"].items()
    }
    (folder / EMOJI.name).write_text(json.dumps({**settings, "sentences": sentences}, indent=1), "utf-8")


def _colour(rgb: Sequence[int]) -> Colour:
    return rgb[0], rgb[1], rgb[2]


def article(noun: str) -> str:
    """The indefinite article of an English noun, by its first letter ("unicorn" is the exception)."""
    return "an" if noun[0] in "aeiou" and not noun.startswith("uni") else "a"


def captions(scene: Scene, *, held_out: bool = False) -> list[str]:
    """Every sentence that asks for `scene`, over templates and synonyms.

    With `held_out`, the templates that training never saw, and the object's own name only.
    """
    words = catalogue()
    templates = words.held_out_templates if held_out else words.templates
    if scene.object is None:
        if scene.style is not None:
            return [t.format(s=scene.style) for t in words.templates["style_only"]]
        return [t.format(b=scene.background) for t in words.templates["background_only"]] if scene.background else [""]
    names = words.names[scene.object][:1] if held_out else words.names[scene.object]
    found = [t.format(a=article(n), o=n) for n in names for t in templates["object"]]
    if scene.style is not None:
        found = [t.format(x=x, s=scene.style) for x in found for t in templates["style"]]
    if scene.background is not None:
        found = [t.format(x=x, b=scene.background) for x in found for t in templates["background"]]
    return found


def random_caption(shown: Scene, rng: random.Random) -> tuple[str, Scene]:
    """A training caption for a picture of `shown`, and what it asks for."""
    keep = rng.choices([k for k, _ in ASKED], weights=[w for _, w in ASKED])[0]
    asked = Scene(
        object=shown.object if "object" in keep else None,
        style=shown.style if "style" in keep else None,
        background=shown.background if "background" in keep else None,
    )
    return rng.choice(captions(asked)), asked
