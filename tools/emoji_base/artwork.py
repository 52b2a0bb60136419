"""Pictures to train on: one drawing per (style, object), scaled, shifted, turned and laid on a colour.

The vendors' bounding boxes differ in size, which a style classifier would learn instead of the style; every drawing is
therefore cropped to its own box before it is placed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tools.emoji_base.catalogue import Colour, catalogue

SIZE = 64
"""Edge of a picture, in pixels."""


@dataclass(frozen=True)
class Placement:
    """How much a drawing's place varies: its longer edge as a share of the picture, shift in pixels, turn in degrees."""

    smallest: float
    largest: float
    shift: float
    turn: float


WIDE = Placement(0.78, 0.88, 2.0, 4.0)
"""For what must recognise or encode pictures."""
NARROW = Placement(0.82, 0.88, 1.0, 3.0)
"""For what must draw them: seeds still give different pictures, and edges stay sharp."""


@dataclass(frozen=True)
class Artwork:
    """Drawings by (style, object): RGBA images cropped to their bounding boxes."""

    drawings: Mapping[tuple[str, str], Image.Image]

    @classmethod
    def load(cls, folder: Path) -> Artwork:
        """The catalogue's drawings from `emoji64.npz` and `emoji64.json`.

        Raises FileNotFoundError when the folder lacks them and ValueError when a style lacks an object.
        """
        return cls(_cut(folder, catalogue().drawings))

    @classmethod
    def strangers(cls, folder: Path) -> Artwork:
        """The drawings that show nothing of the catalogue: neither CLDR name nor tags mention a word of it."""
        index = json.loads((folder / "emoji64.json").read_text("utf-8"))
        words = catalogue()
        known = {word for names in words.names.values() for word in names}
        known |= {word for drawing in words.drawings.values() for word in drawing.lower().split()} - {"face", "soft"}
        with np.load(folder / "emoji64.npz") as arrays:
            rows = [index["styles"].index(source) for source in words.artwork.values()]
            complete = arrays["ok"][rows].all(0)
        chosen = {}
        for i, name in enumerate(index["names"]):
            said = " ".join([name, *index["tags"][i]]).lower().replace("-", " ").split()
            if complete[i] and name not in words.drawings.values() and not known & set(said):
                chosen[name] = name
        return cls(_cut(folder, chosen))

    def render(
        self, style: str, name: str, colour: Colour, placement: Placement, rng: np.random.Generator
    ) -> Image.Image:
        """One augmented picture, RGB, `SIZE` x `SIZE`."""
        drawing = self.drawings[style, name]
        scale = SIZE * rng.uniform(placement.smallest, placement.largest) / max(drawing.size)
        edges = max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale))
        drawing = drawing.resize(edges, Image.Resampling.LANCZOS)
        drawing = drawing.rotate(rng.uniform(-placement.turn, placement.turn), Image.Resampling.BICUBIC, expand=True)
        x, y = (round((SIZE - edge) / 2 + rng.uniform(-placement.shift, placement.shift)) for edge in drawing.size)
        canvas = Image.new("RGB", (SIZE, SIZE), colour)
        canvas.paste(drawing, (x, y), drawing)
        return canvas


def _cut(folder: Path, wanted: Mapping[str, str]) -> dict[tuple[str, str], Image.Image]:
    """`wanted` maps a name to a CLDR short name; the result is keyed by (style, name)."""
    index = json.loads((folder / "emoji64.json").read_text("utf-8"))
    with np.load(folder / "emoji64.npz") as arrays:
        rgba: NDArray[np.uint8] = arrays["rgba"]
        complete: NDArray[np.bool_] = arrays["ok"]
    words, found = catalogue(), {}
    columns = {name: i for i, name in enumerate(index["names"])}
    for style, source in words.artwork.items():
        row = index["styles"].index(source)
        for name, drawing in wanted.items():
            column = columns[drawing]
            if not complete[row, column]:
                raise ValueError(f"{source} has no drawing of {drawing!r}; choose another object or style")
            picture = Image.fromarray(rgba[row, column])
            if tones := words.duotones.get(style):
                picture = duotone(picture, *tones)
            found[style, name] = picture.crop(picture.getchannel("A").getbbox())
    return found


def duotone(picture: Image.Image, dark: Colour, light: Colour) -> Image.Image:
    """An RGBA drawing in two inks: black becomes `dark`, white `light`, the rest lies between by its luminance."""
    toned = ImageOps.colorize(picture.convert("L"), dark, light)
    toned.putalpha(picture.getchannel("A"))
    return toned
