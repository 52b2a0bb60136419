"""What to ask the embedded base when it is judged: sentences over its catalogue, the same ones every time.

A third of an object's prompts name the object alone, a third a style too, a third a background too; styles, backgrounds
and templates rotate. An object's prompts and seeds do not depend on which other objects are asked for, so that
the same pictures come up before and after something is erased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from overpaint.bases.emoji.catalogue import Scene, captions, catalogue
from overpaint.errors import NotFound, OverpaintError

SPREAD = 10_000
"""Seeds set aside for each object or style."""


@dataclass(frozen=True)
class EvalPrompt:
    """A sentence, what a faithful picture of it shows (None where the sentence leaves it open), and its seed."""

    prompt: str
    scene: Scene
    seed: int


class Trial(NamedTuple):
    """A sentence, the class that a judge's head should find in its picture, and the picture's seed."""

    prompt: str
    truth: str
    seed: int


def object_scenes(objects: Sequence[str], per_object: int, *, held_out: bool, seed0: int = 0) -> list[EvalPrompt]:
    """`per_object` prompts for each object, object by object.

    `held_out` takes the templates that training never saw. Raises NotFound on a word that the catalogue lacks.
    """
    words, found = catalogue(), []
    for name in objects:
        place = _place(name, words.objects, "object")
        for i in range(_checked(per_object)):
            kind, turn = i % 3, place + i // 3
            scene = Scene(
                name,
                words.styles[turn % len(words.styles)] if kind == 1 else None,
                words.backgrounds[turn % len(words.backgrounds)] if kind == 2 else None,
            )
            found.append(EvalPrompt(_caption(scene, 2 * place + i // 3, held_out), scene, seed0 + SPREAD * place + i))
    return found


def style_scenes(styles: Sequence[str], per_style: int, *, held_out: bool, seed0: int = 0) -> list[EvalPrompt]:
    """`per_style` prompts that name each style, style by style; the objects rotate.

    Raises NotFound on a word that the catalogue lacks.
    """
    words, found = catalogue(), []
    for style in styles:
        place = _place(style, words.styles, "style")
        for i in range(_checked(per_style)):
            scene = Scene(words.objects[(7 * place + i) % len(words.objects)], style)
            found.append(EvalPrompt(_caption(scene, place + i, held_out), scene, seed0 + SPREAD * place + i))
    return found


def object_prompts(objects: Sequence[str], per_object: int, *, held_out: bool, seed0: int = 0) -> list[Trial]:
    """`object_scenes` as (prompt, object, seed), for the judge's object head."""
    scenes = object_scenes(objects, per_object, held_out=held_out, seed0=seed0)
    return [Trial(found.prompt, found.scene.object or "", found.seed) for found in scenes]


def style_prompts(styles: Sequence[str], per_style: int, *, held_out: bool, seed0: int = 0) -> list[Trial]:
    """`style_scenes` as (prompt, style, seed), for the judge's style head."""
    scenes = style_scenes(styles, per_style, held_out=held_out, seed0=seed0)
    return [Trial(found.prompt, found.scene.style or "", found.seed) for found in scenes]


def _caption(scene: Scene, turn: int, held_out: bool) -> str:
    """The sentence number `turn` for the object's own name; synonyms are a test of their own."""
    assert scene.object is not None
    sentences = captions(scene, held_out=held_out)
    names = 1 if held_out else len(catalogue().names[scene.object])
    return sentences[turn % (len(sentences) // names)]


def _place(word: str, known: Sequence[str], kind: str) -> int:
    if word not in known:
        raise NotFound(f"the embedded base knows no {kind} {word!r}; choose from {', '.join(known)}")
    return known.index(word)


def _checked(count: int) -> int:
    if not 1 <= count <= SPREAD:
        raise OverpaintError(f"between 1 and {SPREAD} prompts can be made for each word; got {count}")
    return count
