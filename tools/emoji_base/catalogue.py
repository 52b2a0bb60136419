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

from overpaint.bases.base import EMOJI
from overpaint.evaluation.prompts import Catalogue as Words
from overpaint.evaluation.prompts import Scene
from overpaint.evaluation.prompts import catalogue as words_of

Colour: TypeAlias = tuple[int, int, int]

PATH = Path(__file__).with_name("catalogue.json")
SETTINGS = EMOJI / "overpaint.json"

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
class Catalogue(Words):
    """What the package knows of the words, and where the pictures of them come from.

    `drawings` maps an object to its CLDR short name, `artwork` a style to its source set, `duotones` a style to the two
    RGB values its darks and lights are redrawn in, `colours` a background to its RGB value.
    """

    drawings: dict[str, str]
    groups: dict[str, str]
    artwork: dict[str, str]
    duotones: dict[str, tuple[Colour, Colour]]
    colours: dict[str, Colour]

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
        **vars(words_of(PATH.parent)),
        drawings={name: entry["drawing"] for name, entry in objects.items()},
        groups={name: entry["group"] for name, entry in objects.items()},
        artwork={name: entry["artwork"] for name, entry in styles.items()},
        duotones={
            name: (_colour(entry["duotone"][0]), _colour(entry["duotone"][1]))
            for name, entry in styles.items()
            if "duotone" in entry
        },
        colours={name: _colour(rgb) for name, rgb in raw["backgrounds"].items()},
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
        styles=SMALL_STYLES,
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
        for kind, listed in json.loads(SETTINGS.read_text("utf-8"))["sentences"].items()
    }
    (folder / SETTINGS.name).write_text(json.dumps({**settings, "sentences": sentences}, indent=1), "utf-8")


def _colour(rgb: Sequence[int]) -> Colour:
    return rgb[0], rgb[1], rgb[2]


def allows(asked: Scene, shown: Scene) -> bool:
    """Whether a picture of `shown` satisfies a caption that asks for a scene."""
    pairs = ((asked.object, shown.object), (asked.style, shown.style), (asked.background, shown.background))
    return all(wanted is None or wanted == there for wanted, there in pairs)


def captions(scene: Scene, *, held_out: bool = False) -> list[str]:
    """`Catalogue.captions` of the whole catalogue."""
    return catalogue().captions(scene, held_out=held_out)


def random_caption(shown: Scene, rng: random.Random) -> tuple[str, Scene]:
    """A training caption for a picture of `shown`, and what it asks for."""
    keep = rng.choices([k for k, _ in ASKED], weights=[w for _, w in ASKED])[0]
    asked = Scene(
        object=shown.object if "object" in keep else None,
        style=shown.style if "style" in keep else None,
        background=shown.background if "background" in keep else None,
    )
    return rng.choice(captions(asked)), asked
