"""What can be asked of a base, and what a judge has to distinguish in the pictures.

A set of prompts names classes by head ("object", "style") and makes the questions: a sentence, its seed, and what a faithful
picture of it shows. An embedded base is asked for what its catalogue has, in sentences that training never saw; any other
base for the registry's concepts, beside a few common things that speak for everything else.

A catalogue is what a base that ships with the package knows: objects, styles, backgrounds and the sentences that name them. The
words are data (`catalogue.json` in the base's folder), so that training, judging and the demo speak of the same things.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any

from overpaint.bases.base import EMOJI
from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import checked_seed, checked_texts, shown

OBJECT, STYLE = "object", "style"
SPREAD = 10_000
"""Seeds set aside for each object or style."""


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


@dataclass(frozen=True)
class CatalogueScene:
    """A sentence, what a faithful picture of it shows (None where the sentence leaves it open), and its seed."""

    prompt: str
    scene: Scene
    seed: int


def object_scenes(
    objects: Sequence[str], per_object: int, *, held_out: bool, seed0: int = 0, words: Catalogue | None = None
) -> list[CatalogueScene]:
    """`per_object` prompts for each object, object by object.

    `held_out` takes the templates that training never saw. Raises NotFound on a word that the catalogue lacks.
    """
    words, prompts = words or catalogue(), []
    for name in objects:
        place = _place(name, words.objects, "object")
        for i in range(_checked(per_object)):
            kind, turn = i % 3, place + i // 3
            scene = Scene(
                name,
                words.styles[turn % len(words.styles)] if kind == 1 else None,
                words.backgrounds[turn % len(words.backgrounds)] if kind == 2 else None,
            )
            prompts.append(
                CatalogueScene(_caption(words, scene, 2 * place + i // 3, held_out), scene, seed0 + SPREAD * place + i)
            )
    return prompts


def style_scenes(
    styles: Sequence[str], per_style: int, *, held_out: bool, seed0: int = 0, words: Catalogue | None = None
) -> list[CatalogueScene]:
    """`per_style` prompts that name each style, style by style; the objects rotate.

    Raises NotFound on a word that the catalogue lacks.
    """
    words, prompts = words or catalogue(), []
    for style in styles:
        place = _place(style, words.styles, "style")
        for i in range(_checked(per_style)):
            scene = Scene(words.objects[(7 * place + i) % len(words.objects)], style)
            prompts.append(
                CatalogueScene(_caption(words, scene, place + i, held_out), scene, seed0 + SPREAD * place + i)
            )
    return prompts


def _caption(words: Catalogue, scene: Scene, turn: int, held_out: bool) -> str:
    """The sentence number `turn` for the object's own name; synonyms are a test of their own."""
    assert scene.object is not None
    sentences = words.captions(scene, held_out=held_out)
    names = 1 if held_out else len(words.names[scene.object])
    return sentences[turn % (len(sentences) // names)]


def _place(word: str, known: Sequence[str], kind: str) -> int:
    if word not in known:
        raise NotFound(f"this base knows no {kind} {word!r}; choose from {', '.join(known)}")
    return known.index(word)


def _checked(count: int) -> int:
    if not 1 <= count <= SPREAD:
        raise OverpaintError(f"between 1 and {SPREAD} prompts can be made for each word; got {count}")
    return count


@dataclass(frozen=True)
class EvalPrompt:
    """A sentence, the seed of its picture, and the class by head that a faithful picture of it shows.

    Raises OverpaintError for a sentence that is no text, and as `checked_seed`.
    """

    prompt: str
    seed: int
    shows: Mapping[str, str] = field(hash=False)

    def __post_init__(self) -> None:
        checked_prompt(self.prompt)
        checked_seed(self.seed)


def checked_prompt(prompt: str) -> str:
    """`prompt` if tokenizers and files can take it. Raises OverpaintError."""
    try:
        prompt.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise OverpaintError(f"a prompt is a text of whole characters; got {shown(prompt)}") from error
    return prompt


def head_of(concept: Concept) -> str:
    """The head of a judge that recognises a concept."""
    return STYLE if concept.kind == "style" else OBJECT


class PromptSet:
    """Classes by head with the words for each, and the questions about them. `prompts` is for each kind of set to say."""

    def __init__(
        self, classes: Mapping[str, Mapping[str, tuple[str, ...]]], labels: Mapping[str, Sequence[str]]
    ) -> None:
        self.classes, self._labels = classes, labels

    def names(self, head: str) -> tuple[str, ...]:
        """The classes of a head."""
        return tuple(self.classes[head])

    def labels(self, head: str, name: str) -> list[str]:
        """Sentences that say what a picture of a class is, for judges that compare pictures with text."""
        return [label.format(name) for label in self._labels[head]]

    def class_of(self, concept: Concept) -> tuple[str, str]:
        """The head and the class that a concept is judged by. Raises NotFound with the classes there are."""
        head = head_of(concept)
        for name, words in self.classes[head].items():
            if concept.name.casefold() in {word.casefold() for word in (name, *words)}:
                return head, name
        known = ", ".join(self.classes[head])
        raise NotFound(f"no judge here recognises the {head} {concept.name!r} (known: {known}); name another judge")

    def prompts(self, head: str, name: str, count: int, seed: int = 0) -> list[EvalPrompt]:
        """`count` questions for a class; those of one class do not depend on which others are asked."""
        raise NotImplementedError

    def synonym_prompts(self, name: str, count: int, seed: int = 0) -> list[EvalPrompt]:
        """`count` questions that call an object by each of its other names; empty where it has none."""
        raise NotImplementedError

    def grid(self, styles: Sequence[str], objects: Sequence[str], count: int, seed: int = 0) -> list[EvalPrompt]:
        """`count` questions for every object in every style."""
        raise NotImplementedError


class EmojiPrompts(PromptSet):
    """The catalogue of an embedded base, by default `emoji`, in templates that training never saw."""

    def __init__(self, words: Catalogue | None = None) -> None:
        self._words = words = words or catalogue()
        styles: dict[str, tuple[str, ...]] = {style: (style, f"{style} style") for style in words.styles}
        classes = {OBJECT: dict(words.names), STYLE: styles}
        super().__init__(classes, {OBJECT: ("a {}", "a picture of a {}", "an emoji of a {}"), STYLE: ("{} style",)})

    def prompts(self, head: str, name: str, count: int, seed: int = 0) -> list[EvalPrompt]:
        scenes = object_scenes if head == OBJECT else style_scenes
        return [_question(scene) for scene in scenes([name], count, held_out=True, seed0=seed, words=self._words)]

    def synonym_prompts(self, name: str, count: int, seed: int = 0) -> list[EvalPrompt]:
        prompts, words = [], self._words
        for i, word in enumerate(words.names[name][1:]):
            first = seed + SPREAD * (1000 + 10 * words.objects.index(name) + i)
            for j in range(count):
                sentence = words.held_out_templates[OBJECT][j % len(words.held_out_templates[OBJECT])]
                prompts.append(EvalPrompt(sentence.format(a=article(word), o=word), first + j, {OBJECT: name}))
        return prompts

    def grid(self, styles: Sequence[str], objects: Sequence[str], count: int, seed: int = 0) -> list[EvalPrompt]:
        prompts, words = [], self._words
        for style in styles:
            for name in objects:
                sentences = words.captions(Scene(name, style), held_out=True)
                # As in UnlearnCanvas, all questions of one turn share one seed.
                for i in range(count):
                    turn = (words.objects.index(name) + i) % len(sentences)
                    prompts.append(EvalPrompt(sentences[turn], seed + i, {OBJECT: name, STYLE: style}))
        return prompts


class ListedPrompts(PromptSet):
    """The concepts of a registry and a few common things beside them, for any base."""

    def __init__(self, concepts: Iterable[Concept]) -> None:
        words = _asking()
        classes: dict[str, dict[str, tuple[str, ...]]] = {OBJECT: {}, STYLE: {}}
        for concept in concepts:
            classes[head_of(concept)][concept.name] = concept.words
        for head, others in words["others"].items():
            taken = {word.casefold() for known in classes[head].values() for word in known}
            classes[head] |= {other: (other,) for other in others if other.casefold() not in taken}
        super().__init__(classes, words["labels"])

    def prompts(self, head: str, name: str, count: int, seed: int = 0) -> list[EvalPrompt]:
        place = self.names(head).index(name)
        first = seed + SPREAD * (place + (0 if head == OBJECT else 500))
        return [EvalPrompt(*self._sentence(head, name, place, i), first + i, {head: name}) for i in range(count)]

    def _sentence(self, head: str, name: str, place: int, turn: int) -> tuple[str]:
        sentences = _asking()["sentences"][head]
        sentence = sentences[turn % len(sentences)]
        if head == OBJECT:
            return (sentence.format(name),)
        objects = _asking()["others"][OBJECT]
        return (sentence.format(objects[(place + turn) % len(objects)], name),)

    def synonym_prompts(self, name: str, count: int, seed: int = 0) -> list[EvalPrompt]:
        place, sentences = self.names(OBJECT).index(name), _asking()["sentences"][OBJECT]
        return [
            EvalPrompt(
                sentences[j % len(sentences)].format(word), seed + SPREAD * (1000 + 10 * place + i) + j, {OBJECT: name}
            )
            for i, word in enumerate(word for word in self.classes[OBJECT][name] if word != name)
            for j in range(count)
        ]

    def grid(self, styles: Sequence[str], objects: Sequence[str], count: int, seed: int = 0) -> list[EvalPrompt]:
        sentences = _asking()["sentences"][STYLE]
        return [
            EvalPrompt(sentences[i % len(sentences)].format(name, style), seed + i, {OBJECT: name, STYLE: style})
            for style in styles
            for name in objects
            for i in range(count)
        ]


def read_prompts(path: Path, prompt_set: PromptSet) -> dict[tuple[str, str], list[EvalPrompt]]:
    """Questions of one's own by (head, class), from a CSV file with the columns prompt and concept, and if wanted seed.

    Raises NotFound for a concept that the set does not know, OverpaintError for a file that is not such a list.
    """
    try:
        rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OverpaintError(f"cannot read the prompts in {path} ({error}); name a CSV file") from error
    if not rows or not {"prompt", "concept"} <= rows[0].keys():
        raise OverpaintError(
            f"{path} has no rows with the columns prompt and concept; put these names in its first line"
        )
    by_class: dict[tuple[str, str], list[EvalPrompt]] = {}
    for line, row in enumerate(rows, 2):
        head, name = _class_named(prompt_set, row["concept"] or "", f"line {line} of {path}")
        seed = (row.get("seed") or str(line)).strip()
        if not seed.isdecimal():
            raise OverpaintError(f"line {line} of {path} has the seed {seed!r}; a seed is a whole number from 0 on")
        by_class.setdefault((head, name), []).append(EvalPrompt(row["prompt"] or "", int(seed), {head: name}))
    return by_class


def _class_named(prompt_set: PromptSet, word: str, where: str) -> tuple[str, str]:
    for kind in ("object", "style"):
        try:
            return prompt_set.class_of(Concept(word or "?", kind))
        except NotFound:
            continue
    known = ", ".join(name for head in prompt_set.classes for name in prompt_set.names(head))
    raise NotFound(f"{where} asks for {word!r}, which nobody here can judge; known are: {known}")


def _question(asked: CatalogueScene) -> EvalPrompt:
    scene = asked.scene
    named = {OBJECT: scene.object, STYLE: scene.style}
    return EvalPrompt(asked.prompt, asked.seed, {head: name for head, name in named.items() if name is not None})


@cache
def _asking() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(files(__package__).joinpath("asking.json").read_text("utf-8"))
    return raw
