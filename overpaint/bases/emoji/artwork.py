"""Pictures to train on: one drawing per (style, object), scaled, shifted, turned and laid on a colour.

The vendors' bounding boxes differ in size, which a style classifier would learn instead of the style; every drawing is
therefore cropped to its own box before it is placed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from overpaint.bases.emoji.catalogue import Colour, Scene, catalogue

SIZE = 64
"""Edge of a picture, in pixels."""


@dataclass(frozen=True)
class Artwork:
    """The drawings the catalogue names: (style, object) -> an RGBA image cropped to its bounding box."""

    drawings: dict[tuple[str, str], Image.Image]

    @classmethod
    def load(cls, folder: Path) -> Artwork:
        """Read `emoji64.npz` and `emoji64.json`.

        Raises FileNotFoundError when the folder lacks them and ValueError when a style lacks an object.
        """
        index = json.loads((folder / "emoji64.json").read_text("utf-8"))
        with np.load(folder / "emoji64.npz") as arrays:
            rgba, complete = arrays["rgba"], arrays["ok"]
        words, found = catalogue(), {}
        for style, source in words.artwork.items():
            row = index["styles"].index(source)
            for name, drawing in words.drawings.items():
                column = index["names"].index(drawing)
                if not complete[row, column]:
                    raise ValueError(f"{source} has no drawing of {drawing!r}; choose another object or style")
                picture = Image.fromarray(rgba[row, column])
                if tones := words.duotones.get(style):
                    picture = duotone(picture, *tones)
                found[style, name] = picture.crop(picture.getchannel("A").getbbox())
        return cls(found)

    def render(self, scene: Scene, rng: np.random.Generator) -> Image.Image:
        """One augmented picture of a fully specified scene, RGB, `SIZE` x `SIZE`."""
        words = catalogue()
        if scene.object is None or scene.style is None or scene.background is None:
            raise ValueError(f"a picture needs an object, a style and a background; got {scene}")
        drawing = self.drawings[scene.style, scene.object]
        extent = SIZE * rng.uniform(0.78, 0.88)
        scale = extent / max(drawing.size)
        drawing = drawing.resize(
            (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale))), Image.Resampling.LANCZOS
        )
        drawing = drawing.rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC, expand=True)
        x, y = (round((SIZE - edge) / 2 + rng.uniform(-2, 2)) for edge in drawing.size)
        canvas = Image.new("RGB", (SIZE, SIZE), words.colours[scene.background])
        canvas.paste(drawing, (x, y), drawing)
        return canvas

    def pool(self, variations: int, seed: int) -> tuple[NDArray[np.uint8], list[Scene]]:
        """`variations` pictures of every scene: uint8 [n, SIZE, SIZE, 3] and what each shows."""
        rng = np.random.default_rng(seed)
        scenes = [scene for scene in catalogue().scenes() for _ in range(variations)]
        pictures = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
        for i, scene in enumerate(scenes):
            pictures[i] = np.asarray(self.render(scene, rng))
        return pictures, scenes


def duotone(picture: Image.Image, dark: Colour, light: Colour) -> Image.Image:
    """An RGBA drawing in two inks: black becomes `dark`, white `light`, the rest lies between by its luminance."""
    toned = ImageOps.colorize(picture.convert("L"), dark, light)
    toned.putalpha(picture.getchannel("A"))
    return toned
