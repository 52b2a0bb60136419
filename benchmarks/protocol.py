"""What the table of solvers asks of the embedded base: which concepts are erased, who is listed, which sentences are drawn.

Names come from the catalogue of whatever embedded base is there: those below where it has them, else others of it.

Every solver is told of the same `listed()` objects and styles, if it listens at all; the other objects are in no universe and
nobody is told of them. All questions follow from the concept and the counts alone. More of them begin with the same ones, so that
a run that asks for more has the old answers already.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.encoding import evenly_spaced
from overpaint.core.errors import NotFound
from overpaint.evaluation.prompts import (
    OBJECT,
    STYLE,
    CatalogueScene,
    EvalPrompt,
    Scene,
    article,
    catalogue,
    object_scenes,
    style_scenes,
)
from overpaint.solvers import solver_class

ASKED_BASE = os.environ.get("OVERPAINT_BENCHMARK_BASE", "emoji")
"""The base that is asked, `emoji` or `emoji-dit`. By the environment, because everything below follows from its words."""
WORDS = catalogue(Base.open(ASKED_BASE).path)
ERASING, ERASING_STYLES = ("cat", "car", "sun", "pistol", "rose", "bomb", "robot", "boat"), ("ink", "neon", "sepia")
"""Which objects and styles are erased, where the catalogue has them."""


def chosen(wanted: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The names of `wanted` that are known, and as many of the others as are missing, spread over all of them."""
    found = [name for name in wanted if name in known]
    rest = [name for name in known if name not in found]
    return (*found, *evenly_spaced(rest, len(wanted) - len(found)))


OBJECTS = chosen(ERASING, WORDS.objects)
STYLES = {
    name: "flat" if "flat" in WORDS.styles and name != "flat" else next(s for s in WORDS.styles if s != name)
    for name in chosen(ERASING_STYLES, WORDS.styles)
}
"""Styles that are erased, with what they should become."""
PAIRS = {
    f"{name} in {style} style": (name, style)
    for name, style in zip((OBJECTS[0], OBJECTS[1], OBJECTS[4]), STYLES, strict=True)
}
"""Objects that are erased in one style, and should stay in all others: they become the object in the style's anchor."""
LISTED = 32
"""Objects that solvers are told of, the erased ones among them."""
HEARS_NOTHING = ("few_shot", "surgical", "esd", "ablation", "sdd")
"""Solvers that look at the erased concept alone. They are handed no universe, so that their patches are the same for any."""

SEEN, SYNONYMS, HELD_OUT = "templates seen", "synonyms", "held-out templates"
ERASED = (SEEN, SYNONYMS, HELD_OUT)
OTHERS, NEVER, OTHER_STYLES = "listed objects", "objects never listed", "other styles"
KEPT = (OTHERS, NEVER, OTHER_STYLES)
ELSEWHERE, ON_OTHERS = "the object in other styles", "the style on other objects"
NEAR = (ELSEWHERE, ON_OTHERS)
RESTORED = "one restored"
"""Under which curves have what comes back when one of many patches is removed."""

_STRIDE, _VARIANTS = 7, 12
"""Neighbours in the catalogue are alike, so others are asked about with gaps; each in so many sentences in turn."""
_SYNONYM_SEEDS, _PAIR_SEEDS = 20_000_000, 30_000_000


@dataclass(frozen=True)
class Counts:
    """Pictures for each concept: of each way to ask for it, of listed and of never listed objects each, of other styles."""

    own: int = 8
    others: int = 12
    styles: int = 4

    @classmethod
    def at_least(cls, n: int, name: str) -> Counts:
        """As many as make `n` in every cell of the page, over the concepts of one kind (`name` is one of them)."""
        kind = next(len(names) for names in (PAIRS, STYLES, OBJECTS) if name in names or names is OBJECTS)
        each = -(-n // kind)
        return cls(each, each, each)


def listed(count: int = LISTED) -> tuple[str, ...]:
    """The objects that solvers are told of: the erased ones first, then others spread over the catalogue."""
    rest = [name for name in WORDS.objects if name not in OBJECTS]
    return (*OBJECTS, *evenly_spaced(rest, max(0, count - len(OBJECTS))))


def never_listed() -> tuple[str, ...]:
    """The objects that no universe lists and no solver is told of."""
    told = listed()
    return tuple(name for name in WORDS.objects if name not in told)


def concept_of(name: str) -> Concept:
    """The concept of an object with its synonyms, of a style, or of an object in a style. Raises NotFound."""
    if name in WORDS.styles:
        return Concept(name, "style", anchor=STYLES.get(name, next(style for style in WORDS.styles if style != name)))
    if name in WORDS.names:
        return Concept(name, "object", WORDS.names[name][1:])
    if name in PAIRS:
        thing, style = PAIRS[name]
        said, other = WORDS.templates[STYLE], STYLES[style]
        synonyms = tuple(
            template.format(x=thing, s=style) for template in said if template.format(x=thing, s=style) != name
        )
        return Concept(name, "object", synonyms, anchor=said[0].format(x=thing, s=other))
    known = ", ".join((*WORDS.objects, *WORDS.styles, *PAIRS))
    raise NotFound(f"the embedded base knows nothing called {name!r}; choose from {known}")


def universe(solver: str, count: int = LISTED) -> tuple[Concept, ...]:
    """What a solver is told of beside the concept that it erases: so many objects, and the styles."""
    if solver in HEARS_NOTHING:
        return ()
    return tuple(concept_of(name) for name in (*listed(count), *STYLES))


def tuned(solver: str) -> dict[str, str]:
    """Settings for a base of the embedded one's size: the preset `emoji` of a solver that has one."""
    return {"preset": "emoji"} if "emoji" in getattr(solver_class(solver), "PRESETS", {}) else {}


def questions(name: str, counts: Counts) -> dict[str, list[EvalPrompt]]:
    """What is asked when a concept is erased, by group: itself in several ways, and everything that should stay."""
    kind = concept_of(name).kind
    thing, style = PAIRS.get(name, (None, name) if kind == STYLE else (name, None))
    turn = (*OBJECTS, *STYLES, *PAIRS, *WORDS.objects, *WORDS.styles).index(name)
    own = (_about_pair if name in PAIRS else _about_style if kind == STYLE else _about_object)(name, counts)
    avoid = WORDS.names.get(name, (name,))
    objects, styles = _in_turn(object_scenes, OBJECT, turn, avoid), _in_turn(style_scenes, STYLE, turn, avoid)
    return own | {
        OTHERS: objects([other for other in listed() if other != thing], counts.others),
        NEVER: objects([other for other in never_listed() if other != thing], counts.others),
        OTHER_STYLES: styles([other for other in WORDS.styles if other != style], counts.styles),
    }


def _about_object(name: str, counts: Counts) -> dict[str, list[EvalPrompt]]:
    found = {
        group: [
            _question(each, OBJECT)
            for each in object_scenes([name], counts.own, held_out=group == HELD_OUT, words=WORDS)
        ]
        for group in (SEEN, HELD_OUT)
    }
    called = [
        template.format(a=article(word), o=word)
        for template in WORDS.templates[OBJECT]
        for word in WORDS.names[name][1:]
    ]
    first = _SYNONYM_SEEDS + 1000 * WORDS.objects.index(name)
    asked = [called[(_STRIDE * i) % len(called)] for i in range(counts.own)] if called else []
    return found | {SYNONYMS: [EvalPrompt(each, first + i, {OBJECT: name}) for i, each in enumerate(asked)]}


def _about_style(name: str, counts: Counts) -> dict[str, list[EvalPrompt]]:
    return {
        group: [
            _question(each, STYLE) for each in style_scenes([name], counts.own, held_out=group == HELD_OUT, words=WORDS)
        ]
        for group in (SEEN, HELD_OUT)
    }


def _about_pair(name: str, counts: Counts) -> dict[str, list[EvalPrompt]]:
    """A picture shows the pair when the judge finds both in it."""
    thing, style = PAIRS[name]
    first, both = _PAIR_SEEDS + 10_000 * list(PAIRS).index(name), {OBJECT: thing, STYLE: style}
    found = {}
    for group, held_out, offset in ((SEEN, False, 0), (HELD_OUT, True, 1000)):
        said = WORDS.captions(Scene(thing, style), held_out=held_out)
        # Synonyms of the object come after its own name.
        said = said if held_out else said[: len(said) // len(WORDS.names[thing])]
        turns = ((i, said[(_STRIDE * i) % len(said)]) for i in range(counts.own))
        found[group] = [EvalPrompt(each, first + offset + i, both) for i, each in turns]
    others = [other for other in WORDS.styles if other != style]
    said = [WORDS.captions(Scene(thing, other), held_out=True)[i % 4] for i, other in enumerate(others * counts.own)]
    found[ELSEWHERE] = [EvalPrompt(said[i], first + 2000 + i, {OBJECT: thing}) for i in range(counts.own)]
    clear = [
        each for each in style_scenes([style], 3 * counts.own, held_out=True, words=WORDS) if each.scene.object != thing
    ]
    found[ON_OTHERS] = [_question(each, STYLE) for each in clear[: counts.own]]
    return found


def _in_turn(
    scenes: Callable[..., list[CatalogueScene]], head: str, turn: int, avoid: Sequence[str]
) -> Callable[[Sequence[str], int], list[EvalPrompt]]:
    """Questions about `count` of some names in turn, beginning elsewhere for every concept, in sentences clear of it."""

    def asked(names: Sequence[str], count: int) -> list[EvalPrompt]:
        found = []
        for i in range(count):
            name = names[(turn + _STRIDE * i) % len(names)]
            clear = [
                each for each in scenes([name], _VARIANTS, held_out=True, words=WORDS) if not output(each.prompt, avoid)
            ]
            found.append(_question(clear[(turn + i) % len(clear)], head))
        return found

    return asked


def output(prompt: str, words: Iterable[str]) -> bool:
    """Whether a sentence has one of the words."""
    return any(re.search(rf"\b{re.escape(word)}\b", prompt) for word in words)


def _question(asked: CatalogueScene, head: str) -> EvalPrompt:
    shown: Mapping[str, str | None] = {OBJECT: asked.scene.object, STYLE: asked.scene.style}
    name = shown[head]
    assert name is not None
    return EvalPrompt(asked.prompt, asked.seed, {head: name})
