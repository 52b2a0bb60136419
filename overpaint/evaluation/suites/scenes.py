"""Scenes: six concepts erased, restored and erased again in four orders (SRS-ME, Zhao et al., after SepME).

In Scene 1 all six are erased, then c0 and c1 restored, then c2; Scene 2 does the same with c3, c4 and c5; in Scene 3 concepts
are restored and erased in turn; Scene 4 erases three and goes on. After every step the erased, the restored and the regular
concepts (never erased) are judged, their pictures compared with the base's for the same seeds, and every weight of the live
pipeline compared bit for bit with a composition of the applied patches, as if the restored ones had never been applied; at the
end of a scene all are restored, and the weights must be the base's. A concept's prompts name no other erased one, so that its
own patch decides about its pictures. With twelve patches or more, each c is two.

Differences to the paper: pictures per concept are fewer, distances are in the judge's features and not Inception's, and
pictures are compared by their difference and PSNR instead of LPIPS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from overpaint.core.errors import OverpaintError
from overpaint.core.sampling import evenly_spaced
from overpaint.evaluation.context import (
    ACCURACY,
    CHANGE,
    DISTANCE,
    ON_BASE,
    SHARE,
    WRONG,
    EvalContext,
    EvaluatedPatch,
    Verdicts,
)
from overpaint.evaluation.metrics import Measurement, differences, frechet_distance, mean, measured, psnr
from overpaint.evaluation.prompts import OBJECT, EvalPrompt
from overpaint.evaluation.suites import Suite

CONCEPTS = 6
SCENES: tuple[tuple[str, ...], ...] = (
    ("012345", "2345", "345"),
    ("012345", "0125", "012"),
    ("024", "24", "124", "14", "134", "13", "135"),
    ("012", "12", "1234", "234", "2345", "345"),
)
"""Which of c0 to c5 are erased after each step."""
Prompts = dict[tuple[str, str], list[EvalPrompt]]


@dataclass(frozen=True)
class Scenes(Suite):
    """How many pictures are judged of each concept after each step, and how many regular concepts there are."""

    pictures: int = 6
    regular: int = 3

    def run(self, context: EvalContext) -> list[Measurement]:
        groups = _groups(context.patches)
        members = [patch for group in groups for patch in group]
        prompts: Prompts = {key: context.prompts_alone(*key, self.pictures) for key in context.erased(members)}
        regular = self._regular(context)
        steps = {step for scene in SCENES for step in scene}
        context.image_generator.expect(sum(map(len, (*prompts.values(), *regular.values()))) * (1 + len(steps)))
        rows = []
        for number, scene in enumerate(SCENES, 1):
            erased_before: set[str] = set()
            for time, step in enumerate(scene):
                erased_before |= set(step)
                applied = [patch for i in step for patch in groups[int(i)]]
                removed = [patch for i in sorted(erased_before - set(step)) for patch in groups[int(i)]]
                where = f"scene {number}, t{time}"
                rows.append(context.wrong_tensors(context.terms(applied), f"{where}: weights"))
                for label, judged in (
                    ("erased", {key: prompts[key] for key in context.erased(applied)}),
                    ("restored", {key: prompts[key] for key in context.erased(removed)}),
                    ("regular", regular),
                ):
                    if judged:
                        rows += _judged(context, applied, judged, f"{where}: {label}")
            rows.append(context.wrong_tensors([], f"scene {number}, all restored: weights"))
        return [*rows, *_worst(rows)]

    def _regular(self, context: EvalContext) -> Prompts:
        names = evenly_spaced(context.others(OBJECT), self.regular)
        prompts = {(OBJECT, name): context.neutral_prompts(OBJECT, name, self.pictures) for name in names}
        return {key: some for key, some in prompts.items() if some}


def _groups(patches: Sequence[EvaluatedPatch]) -> list[list[EvaluatedPatch]]:
    """The patches that stand for c0 to c5."""
    if len(patches) < CONCEPTS:
        raise OverpaintError(f"the scenes need {CONCEPTS} patches, as in the paper; this recipe has {len(patches)}")
    each = len(patches) // CONCEPTS
    return [list(patches[i * each : (i + 1) * each]) for i in range(CONCEPTS)]


def _judged(
    context: EvalContext, applied: Sequence[EvaluatedPatch], prompts: Prompts, subject: str
) -> list[Measurement]:
    """Accuracy, distance and change of the pictures of some concepts while `applied` are."""
    terms, before, after = context.terms(applied), [], []
    for (head, name), some in prompts.items():
        before.append(context.on_base(some, head, name))
        after.append(context.verdicts(terms, some, head))
    compare = context.compared if subject.endswith(": erased") else context.preserved
    rows = compare(subject, Verdicts.joined(before), Verdicts.joined(after))
    every = [prompt for some in prompts.values() for prompt in some]
    pictures, originals = context.image_generator.draw(terms, every), context.image_generator.draw((), every)
    sentences = [prompt.prompt for prompt in every]
    far = frechet_distance(context.judge.features(pictures), context.judge.features(originals))
    rows.append(Measurement(subject, DISTANCE, far, len(every)))
    for metric, values in ((CHANGE, differences(pictures, originals)), ("PSNR, dB", psnr(pictures, originals))):
        rows.append(measured(subject, metric, mean(values, sentences, context.seed).draws, len(every)))
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
