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

from overpaint.core.sampling import evenly_spaced
from overpaint.evaluation.context import ACCURACY, EvalContext, EvaluatedPatch
from overpaint.evaluation.metrics import Mean, Measurement, average, unlearning_accuracy
from overpaint.evaluation.prompts import OBJECT, STYLE, EvalPrompt
from overpaint.evaluation.suites import Suite

HEADS = (STYLE, OBJECT)


@dataclass(frozen=True)
class Grid(Suite):
    """How many objects the grid has (the erased ones among them), and how many seeds each cell has."""

    objects: int = 20
    seeds: int = 1

    def run(self, context: EvalContext) -> list[Measurement]:
        prompts = self._prompts(context)
        context.image_generator.expect(len(prompts) * (1 + len(context.patches)))
        base = {head: context.on_base(prompts, head, f"the {head}s of the grid") for head in HEADS}
        rows = [base[head].accuracy(context.seed).measurement(f"base: {head}s", ACCURACY) for head in HEADS]
        alone = [self._alone(context, patch, prompts) for patch in context.patches]
        for patch, means in zip(context.patches, alone, strict=True):
            subject = f"{patch.concept.name} ({patch.solver})"
            rows += [mean.measurement(subject, metric) for metric, mean in means.items()]
        for metric in alone[0]:
            whole = average([means[metric] for means in alone])
            rows.append(whole.measurement("average of the patches", metric))
        return rows

    def _prompts(self, context: EvalContext) -> list[EvalPrompt]:
        """The judge's styles times the erased objects and others spread over the catalogue."""
        styles = [style for style in context.prompt_set.names(STYLE) if style in context.judge.heads.get(STYLE, ())]
        erased = [name for head, name in context.erased() if head == OBJECT]
        others = evenly_spaced(context.others(OBJECT), max(2, self.objects - len(erased)))
        return context.prompt_set.grid(styles, [*erased, *others], self.seeds, context.seed)

    def _alone(self, context: EvalContext, patch: EvaluatedPatch, prompts: Sequence[EvalPrompt]) -> dict[str, Mean]:
        """UA, IRA, CRA and what belongs to them, with one patch alone on the base."""
        head, name = context.class_of(patch.concept)
        other = STYLE if head == OBJECT else OBJECT
        seen = {each: context.verdicts([patch.term], prompts, each) for each in HEADS}

        def showing(wanted: str) -> list[int]:
            return [i for i, prompt in enumerate(prompts) if prompt.shows[head] == wanted]

        erased = seen[head].only(showing(name))
        classes = sorted({prompt.shows[head] for prompt in prompts} - {name})
        return {
            "UA": _complement(erased.accuracy(context.seed)),
            "IRA": average([seen[head].only(showing(each)).accuracy(context.seed) for each in classes]),
            "CRA": seen[other].accuracy(context.seed),
            "retention in the prompt": seen[other].only(showing(name)).accuracy(context.seed),
            "probability of the erased concept": erased.mean_probability(context.seed),
        }


def _complement(accuracy: Mean) -> Mean:
    hits = None if accuracy.hits is None else accuracy.n - accuracy.hits
    return Mean(unlearning_accuracy(accuracy.draws), accuracy.n, hits)
