"""Scenes: six concepts erased, restored and erased again in four orders (SRS-ME, Zhao et al., after SepME).

In Scene 1 all six are erased, then c0 and c1 restored, then c2; Scene 2 does the same with c3, c4 and c5; in Scene 3 concepts
are restored and erased in turn; Scene 4 erases three and goes on. After every step the erased, the restored and the regular
concepts (never erased) are judged, their pictures compared with the base's for the same seeds, and every weight of the live
pipeline compared bit for bit with a composition of the patches that are on, as if the restored ones had never been erased; at
the end of a scene all are restored, and the weights must be the base's. A concept is asked about in sentences that name no other
erased one, so that its own patch decides about its pictures. With twelve patches or more, each c is two.

Differences to the paper: pictures per concept are fewer, distances are in the judge's features and not Inception's, and
pictures are compared by their difference and PSNR instead of LPIPS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import (
    ACCURACY,
    CHANGE,
    DISTANCE,
    ON_BASE,
    SHARE,
    WRONG,
    EvalContext,
    EvaluatedPatch,
    joined,
    touched,
    unequal,
)
from overpaint.evaluation.metrics import Measurement, differences, found, frechet_distance, mean, psnr
from overpaint.evaluation.prompts import OBJECT, EvalPrompt

CONCEPTS = 6
SCENES: tuple[tuple[str, ...], ...] = (
    ("012345", "2345", "345"),
    ("012345", "0125", "012"),
    ("024", "24", "124", "14", "134", "13", "135"),
    ("012", "12", "1234", "234", "2345", "345"),
)
"""Which of c0 to c5 are erased after each step."""
Asked = dict[tuple[str, str], list[EvalPrompt]]


@dataclass(frozen=True)
class Scenes:
    """How many pictures are judged of each concept after each step, and how many regular concepts there are."""

    pictures: int = 6
    regular: int = 3

    def run(self, context: EvalContext) -> list[Measurement]:
        groups = _groups(context.held)
        asked: Asked = {
            key: context.alone(*key, self.pictures)
            for key in context.erased(held for group in groups for held in group)
        }
        regular = self._regular(context)
        context.image_generator.expect(
            sum(map(len, (*asked.values(), *regular.values()))) * (1 + len({s for t in SCENES for s in t}))
        )
        rows = []
        for number, steps in enumerate(SCENES, 1):
            ever: set[str] = set()
            for time, step in enumerate(steps):
                ever |= set(step)
                on = [held for i in step for held in groups[int(i)]]
                back = [held for i in sorted(ever - set(step)) for held in groups[int(i)]]
                where = f"scene {number}, t{time}"
                rows.append(_bits(context, on, where))
                for label, wanted in (
                    ("erased", {key: asked[key] for key in context.erased(on)}),
                    ("restored", {key: asked[key] for key in context.erased(back)}),
                    ("regular", regular),
                ):
                    if wanted:
                        rows += _judged(context, on, wanted, f"{where}: {label}")
            rows.append(_bits(context, (), f"scene {number}, all restored"))
        return [*rows, *_worst(rows)]

    def _regular(self, context: EvalContext) -> Asked:
        names = context.others(OBJECT)
        chosen = [names[i * len(names) // self.regular] for i in range(min(self.regular, len(names)))]
        asked = {(OBJECT, name): context.neutral(OBJECT, name, self.pictures) for name in chosen}
        return {key: questions for key, questions in asked.items() if questions}


def _groups(held: Sequence[EvaluatedPatch]) -> list[list[EvaluatedPatch]]:
    """The patches that stand for c0 to c5."""
    if len(held) < CONCEPTS:
        raise OverpaintError(
            f"the scenes are played with {CONCEPTS} patches, as in the paper; this recipe has {len(held)}"
        )
    each = len(held) // CONCEPTS
    return [list(held[i * each : (i + 1) * each]) for i in range(CONCEPTS)]


def _bits(context: EvalContext, on: Sequence[EvaluatedPatch], where: str) -> Measurement:
    """The live pipeline goes on from the step before; its weights must be those of a composition from the base."""
    context.image_generator.overlay.set(context.terms(on))
    names = touched(context.base, context.terms())
    wrong = unequal(context.image_generator.pipe, context.base, context.terms(on), names)
    return Measurement(f"{where}: weights", WRONG, float(len(wrong)), len(names))


def _judged(context: EvalContext, on: Sequence[EvaluatedPatch], asked: Asked, subject: str) -> list[Measurement]:
    """Accuracy, distance and change of the pictures of some concepts while `on` is erased."""
    terms, seen, before = context.terms(on), [], []
    for (head, name), questions in asked.items():
        before.append(context.on_base(questions, head, name))
        seen.append(context.verdicts(terms, questions, head))
    compare = context.compared if subject.endswith(": erased") else context.kept
    rows = compare(subject, joined(before), joined(seen))
    questions = [question for some in asked.values() for question in some]
    pictures, originals = context.image_generator.draw(terms, questions), context.image_generator.draw((), questions)
    prompts = [question.prompt for question in questions]
    far = frechet_distance(context.judge.features(pictures), context.judge.features(originals))
    rows.append(Measurement(subject, DISTANCE, far, len(questions)))
    for metric, values in ((CHANGE, differences(pictures, originals)), ("PSNR, dB", psnr(pictures, originals))):
        rows.append(found(subject, metric, mean(values, prompts, context.seed).draws, len(questions)))
    return rows


def _worst(rows: Iterable[Measurement]) -> Iterable[Measurement]:
    """Over all scenes and steps: the most that is left of what was erased, the least of what was not."""
    every = list(rows)
    for label, metric, worst in (
        ("erased", ACCURACY, max),
        ("restored", SHARE, min),
        ("restored", CHANGE, max),
        ("regular", SHARE, min),
        ("weights", WRONG, max),
    ):
        values = [row.value for row in every if row.subject.endswith(f": {label}") and row.metric == metric]
        if values:
            yield Measurement(f"all scenes, worst step: {label}", metric, worst(values), len(values))
    base = [row.value for row in every if row.metric == ON_BASE]
    yield Measurement("all scenes: base", ACCURACY, float(np.mean(base)), len(base))
