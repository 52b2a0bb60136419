"""The bases that ship with the package, and what they know: objects, styles, backgrounds and the sentences that name them.

The words are data (`catalogue.json` in the base's folder), so that training, judging and the demo speak of the same things.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

from overpaint.core.errors import OverpaintError
from overpaint.core.names import checked_texts, shown

EMOJI = Path(__file__).parent / "emoji" / "model"
EMBEDDED_BASES = {"emoji": EMOJI, "emoji-dit": Path(__file__).parent / "emoji-dit"}
"""A small Stable Diffusion, and a small Stable Diffusion 3, a diffusion transformer."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows, or what a caption asks for; None where the caption leaves it open."""

    object: str | None = None
    style: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Catalogue:
    """The vocabulary of a base. `names` maps an object to itself and its synonyms."""

    names: dict[str, tuple[str, ...]]
    styles: tuple[str, ...]
    backgrounds: tuple[str, ...]
    templates: dict[str, tuple[str, ...]]
    held_out_templates: dict[str, tuple[str, ...]]

    @property
    def objects(self) -> tuple[str, ...]:
        """The objects' own names."""
        return tuple(self.names)

    def captions(self, scene: Scene, *, held_out: bool = False) -> list[str]:
        """Every sentence that asks for `scene`, over templates and synonyms.

        With `held_out`, the templates that training never saw, and the object's own name only.
        """
        templates = self.held_out_templates if held_out else self.templates
        if scene.object is None:
            if scene.style is not None:
                return [t.format(s=scene.style) for t in self.templates["style_only"]]
            return (
                [t.format(b=scene.background) for t in self.templates["background_only"]] if scene.background else [""]
            )
        names = self.names[scene.object][:1] if held_out else self.names[scene.object]
        texts = [t.format(a=article(n), o=n) for n in names for t in templates["object"]]
        if scene.style is not None:
            texts = [t.format(x=x, s=scene.style) for x in texts for t in templates["style"]]
        if scene.background is not None:
            texts = [t.format(x=x, b=scene.background) for x in texts for t in templates["background"]]
        return texts


HOLES = {"object": "ao", "style": "xs", "background": "xb", "style_only": "s", "background_only": "b"}
"""What stands in braces in the templates of each kind: article, object, sentence, style, background."""


@cache
def catalogue(base: Path = EMOJI) -> Catalogue:
    """The catalogue in a base's folder; that of `emoji` where the folder has none. Raises OverpaintError for a damaged one."""
    file = base / "catalogue.json"
    file = file if file.is_file() else EMOJI / file.name
    try:
        raw: dict[str, Any] = json.loads(file.read_text("utf-8"))
        objects = raw["objects"].items()
        if not objects or "" in raw["objects"]:
            raise ValueError("its objects have no names")
        return Catalogue(
            names={name: (name, *checked_texts(entry.get("synonyms", ()), "synonyms")) for name, entry in objects},
            styles=checked_texts(raw["styles"], "styles"),
            backgrounds=checked_texts(raw["backgrounds"], "backgrounds"),
            templates=_templates(raw["templates"], HOLES),
            held_out_templates=_templates(raw["held_out_templates"], ("object", "style", "background")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverpaintError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise OverpaintError(f"{file} cannot be used ({why}); mend it, or get the base again") from error


def _templates(raw: dict[str, Any], kinds: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Sentences by what they ask for; in braces stand names alone, since a format could ask for a sentence of any length."""
    templates = {kind: checked_texts(raw[kind], f"the templates of {kind}") for kind in kinds}
    for kind, items in templates.items():
        for template in items:
            for _, name, layout, conversion in Formatter().parse(template):
                if layout or conversion or (name is not None and name not in HOLES[kind]):
                    raise ValueError(
                        f"a template of {kind} has {' and '.join(HOLES[kind])} in braces; got {shown(template)}"
                    )
        if not items:
            raise ValueError(f"it has no template of {kind}")
    return templates


def article(noun: str) -> str:
    """The indefinite article of an English noun, by its first letter ("unicorn" is the exception)."""
    return "an" if noun[0] in "aeiou" and not noun.startswith("uni") else "a"
