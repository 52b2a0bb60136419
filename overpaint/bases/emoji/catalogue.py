"""What the embedded base knows: objects, styles, backgrounds and the sentences that name them.

The words are data (`catalogue.json`), so that training, judging and the demo speak of the same things.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias

Colour: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """What a picture shows, or what a caption asks for; None where the caption leaves it open."""

    object: str | None = None
    style: str | None = None
    background: str | None = None

    def allows(self, other: Scene) -> bool:
        """Whether a picture of `other` satisfies a caption that asks for this scene."""
        return all(
            wanted is None or wanted == shown
            for wanted, shown in (
                (self.object, other.object),
                (self.style, other.style),
                (self.background, other.background),
            )
        )


@dataclass(frozen=True)
class Catalogue:
    """The vocabulary of the embedded base.

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
    """The catalogue that ships with the package."""
    raw: dict[str, Any] = json.loads(files(__package__).joinpath("catalogue.json").read_text("utf-8"))
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


def _colour(rgb: Sequence[int]) -> Colour:
    return rgb[0], rgb[1], rgb[2]


def article(noun: str) -> str:
    """The indefinite article of an English noun, by its first letter."""
    return "an" if noun[0] in "aeiou" else "a"


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
    texts = [t.format(a=article(n), o=n) for n in names for t in templates["object"]]
    if scene.style is not None:
        texts = [t.format(x=x, s=scene.style) for x in texts for t in templates["style"]]
    if scene.background is not None:
        texts = [t.format(x=x, b=scene.background) for x in texts for t in templates["background"]]
    return texts


def random_caption(shown: Scene, rng: random.Random) -> tuple[str, Scene]:
    """A training caption for a picture of `shown`, and what it asks for.

    Six in ten name the object and one more attribute or both; one in twenty names the style or the background alone.
    """
    keep = rng.choices(
        [
            ("object",),
            ("object", "style"),
            ("object", "background"),
            ("object", "style", "background"),
            ("style",),
            ("background",),
        ],
        weights=[0.33, 0.25, 0.15, 0.20, 0.04, 0.03],
    )[0]
    asked = Scene(**{name: getattr(shown, name) for name in keep})
    return rng.choice(captions(asked)), asked
