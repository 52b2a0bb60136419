"""Grid: every object in every style, for each patch alone (UnlearnCanvas, Zhang et al., NeurIPS 2024).

UA is the share of the erased concept's pictures that are no longer taken for it, IRA the accuracy of the other concepts of
its kind, CRA that of the other kind, each averaged over the patches. Beside them: retention in the prompt (the object of
pictures whose style was erased, and the reverse) and the probability that the judge still gives the erased concept.

Differences to the published protocol: the judge and the sampler are this base's, guidance is the base's own, there is no
class without a style, and the objects are a part of the catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overpaint.evaluation.context import ACCURACY, EvalContext, EvaluatedPatch
from overpaint.evaluation.metrics import Mean, Measurement, average, found, unlearning_accuracy
from overpaint.evaluation.prompts import OBJECT, STYLE, EvalPrompt

HEADS = (STYLE, OBJECT)


@dataclass(frozen=True)
class Grid:
    """How many objects stand in the grid (the erased ones among them), and how many seeds each cell has."""

    objects: int = 20
    seeds: int = 1

    def run(self, context: EvalContext) -> list[Measurement]:
        asked = context.prompt_set.grid(self._styles(context), self._objects(context), self.seeds, context.seed)
        context.image_generator.expect(len(asked) * (1 + len(context.held)))
        base = {head: context.on_base(asked, head, f"the {head}s of the grid") for head in HEADS}
        rows = [base[head].accuracy(context.seed).found(f"base: {head}s", ACCURACY) for head in HEADS]
        each = [self._alone(context, held, asked) for held in context.held]
        for held, means in zip(context.held, each, strict=True):
            rows += [_named(f"{held.concept.name} ({held.solver})", name, one) for name, one in means.items()]
        for name in each[0]:
            rows.append(_named("average of the patches", name, average([means[name] for means in each])))
        return rows

    def _styles(self, context: EvalContext) -> list[str]:
        return [style for style in context.prompt_set.names(STYLE) if style in context.judge.heads.get(STYLE, ())]

    def _objects(self, context: EvalContext) -> list[str]:
        """The erased objects, and others spread over the catalogue."""
        erased = [name for head, name in context.erased() if head == OBJECT]
        others = context.others(OBJECT)
        wanted = min(len(others), max(2, self.objects - len(erased)))
        return [*erased, *(others[i * len(others) // wanted] for i in range(wanted))]

    def _alone(self, context: EvalContext, held: EvaluatedPatch, asked: Sequence[EvalPrompt]) -> dict[str, Mean]:
        """UA, IRA, CRA and what belongs to them, with one patch alone on the base."""
        head, name = context.class_of(held.concept)
        other = STYLE if head == OBJECT else OBJECT
        seen = {each: context.verdicts([held.term], asked, each) for each in HEADS}
        own = [i for i, q in enumerate(asked) if q.shows[head] == name]
        classes = sorted({q.shows[head] for q in asked} - {name})
        within = [seen[head].only([i for i, q in enumerate(asked) if q.shows[head] == each]) for each in classes]
        erased = seen[head].only(own)
        return {
            "UA": _complement(erased.accuracy(context.seed)),
            "IRA": average([each.accuracy(context.seed) for each in within]),
            "CRA": seen[other].accuracy(context.seed),
            "retention in the prompt": seen[other].only(own).accuracy(context.seed),
            "probability of the erased concept": erased.certainty(context.seed),
        }


def _complement(accuracy: Mean) -> Mean:
    return Mean(
        unlearning_accuracy(accuracy.draws), accuracy.n, None if accuracy.hits is None else accuracy.n - accuracy.hits
    )


def _named(subject: str, metric: str, value: Mean) -> Measurement:
    return value.found(subject, metric) if value.hits is not None else found(subject, metric, value.draws, value.n)
