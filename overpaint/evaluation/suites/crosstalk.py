"""Cross-talk, measured: each patch alone, every concept drawn and judged, beside what `overpaint crosstalk` predicts.

For each pair, the share of the base's accuracy that is lost, and how far the pictures of the same seeds moved, relative to the
patch's own concept, which is what the closed form predicts. Rank correlations say whether the prediction can be believed;
where nothing was lost there is no order to compare, and none is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound
from overpaint.core.sampling import evenly_spaced
from overpaint.evaluation.context import EvalContext, EvaluatedPatch
from overpaint.evaluation.crosstalk import WARN_ABOVE, crosstalk
from overpaint.evaluation.metrics import Measurement, differences, rank_correlation
from overpaint.evaluation.prompts import OBJECT, EvalPrompt
from overpaint.evaluation.report_page import HeatMap, Numbers, Section, percent, plain
from overpaint.evaluation.suites import Suite

LOST, MOVED, PREDICTED = "accuracy lost", "relative change of the pictures", "predicted relative effect"
ALL_PAIRS, RANKED, PAIRS_LOST = "all pairs", "rank correlation of prediction and ", "pairs that lost accuracy"
BELIEVED = 0.7
"""A rank correlation from which the closed form may stand for the measurement."""


@dataclass(frozen=True)
class MeasuredPair:
    """What one patch did to another concept: lost accuracy, the pictures' change relative to its own, the prediction."""

    emitter: str
    receiver: str
    lost: float
    moved: float
    predicted: float


@dataclass(frozen=True)
class CrosstalkSuite(Suite):
    """How many pictures of each concept are judged, and how many unlisted objects are looked at beside the registry's."""

    pictures: int = 6
    unlisted: int = 4

    heading = "Cross-talk"

    def run(self, context: EvalContext) -> list[Measurement]:
        receivers = self._receivers(context)
        prompts = {name: self._neutral(context, concept) for name, concept in receivers.items()}
        context.image_generator.expect((1 + len(context.patches)) * sum(map(len, prompts.values())))
        where = context.image_generator.image_cache.folder
        predicted = crosstalk(
            context.base,
            [each.patch for each in context.patches],
            list(receivers.values()),
            cache=where.parent / "moments" if where else None,
            device=context.device,
        )
        pairs: list[MeasuredPair] = []
        for i, patch in enumerate(context.patches):
            ratios = dict(zip(predicted.concepts, predicted.ratios[i], strict=True))
            pairs += self._pairs(context, patch, receivers, prompts, ratios)
        return [*_rows(pairs, self.pictures), *_correlations(pairs)]

    def _receivers(self, context: EvalContext) -> dict[str, Concept]:
        """The concepts of the patches, those of the registry that can be judged, and a few that it does not list."""
        receivers = {patch.concept.name: patch.concept for patch in context.patches}
        for concept in context.known:
            try:
                context.class_of(concept)
            except NotFound:
                continue
            receivers.setdefault(concept.name, concept)
        classes = {context.class_of(concept)[1] for concept in receivers.values()}
        free = [name for name in context.others(OBJECT) if name not in classes]
        return receivers | {name: Concept(name) for name in evenly_spaced(free, self.unlisted)}

    def _neutral(self, context: EvalContext, concept: Concept) -> list[EvalPrompt]:
        """Prompts for a concept; of two concepts in one sentence nobody could say which was hurt."""
        prompts = context.prompts(*context.class_of(concept), self.pictures)
        others = [each for each in prompts if len(each.shows) == 1]
        return others or prompts

    def _pairs(
        self,
        context: EvalContext,
        patch: EvaluatedPatch,
        receivers: dict[str, Concept],
        prompts: dict[str, list[EvalPrompt]],
        ratios: dict[str, float],
    ) -> Iterable[MeasuredPair]:
        moved, lost = {}, {}
        for name, concept in receivers.items():
            head, _ = context.class_of(concept)
            before = context.on_base(prompts[name], head, name)
            after = context.verdicts([patch.term], prompts[name], head)
            lost[name] = 1 - float(after.right.mean() / before.right.mean())
            pictures = (
                context.image_generator.draw([patch.term], prompts[name]),
                context.image_generator.draw((), prompts[name]),
            )
            moved[name] = float(differences(*pictures).mean())
        own = max(moved[patch.concept.name], 1e-9)
        return [
            MeasuredPair(patch.concept.name, name, lost[name], moved[name] / own, ratios[name])
            for name in receivers
            if name != patch.concept.name
        ]

    @classmethod
    def section(cls, numbers: Numbers) -> Section:
        """Three matrices, how far prediction and measurement agree, and why where they do not."""
        ranked = _ranked(numbers)
        correlations = [f"{each.metric}: {each.value:.2f} over {each.n} pairs" for each in ranked]
        lost = numbers.get(ALL_PAIRS, PAIRS_LOST)
        text = "Rows are patches, each alone on the base; columns are concepts that it should leave alone. 0 is no effect.\n\n"
        if lost is not None:
            text += f"{plain(lost.value)} of {lost.n} pairs lost accuracy. "
        text += "; ".join(correlations) or "No pair differs from another, so that there is no order to compare."
        heats = (
            _matrix(numbers, LOST, "Share of the base's accuracy that is lost", "crosstalk-measured"),
            _matrix(numbers, MOVED, "Change of the pictures, relative to the patch's own concept"),
            _matrix(
                numbers,
                PREDICTED,
                "Predicted in closed form, relative to the patch's own concept",
                "crosstalk-predicted",
            ),
        )
        return Section(cls.heading, text + _doubt(numbers), heats=heats)


def _ranked(numbers: Numbers) -> list[Measurement]:
    """The rank correlations of a run."""
    return [each for each in numbers.measurements if each.subject == ALL_PAIRS and each.metric.startswith(RANKED)]


def _matrix(numbers: Numbers, metric: str, caption: str, file: str = "") -> HeatMap:
    """A matrix of the pairs "emitter -> receiver"."""
    pairs = [tuple(subject.split(" -> ")) for subject in numbers.subjects() if " -> " in subject]
    rows = tuple(dict.fromkeys(pair[0] for pair in pairs))
    columns = tuple(dict.fromkeys([*rows, *(pair[1] for pair in pairs)]))
    values = tuple(tuple(numbers.value(f"{row} -> {column}", metric) for column in columns) for row in rows)
    return HeatMap(rows, columns, values, caption, "patch", file)


def _doubt(numbers: Numbers) -> str:
    """Why predicted and measured cross-talk are ordered differently, where they are."""
    ranked = [each.value for each in _ranked(numbers)]
    if not ranked or max(ranked) >= BELIEVED:
        return ""
    most = max((each.value for each in numbers.measurements if each.metric == PREDICTED), default=0.0)
    if most < WARN_ABOVE:
        why = "so small a change of what is read ends in a picture's chance details, and there is little to rank but those"
    else:
        why = "the prediction knows how much of what is read changes, and not what the model makes of it"
    return f". The largest predicted effect is {percent(most)} of what a patch does to its own concept: {why}."


def _rows(pairs: Iterable[MeasuredPair], pictures: int) -> Iterable[Measurement]:
    for pair in pairs:
        subject = f"{pair.emitter} -> {pair.receiver}"
        yield Measurement(subject, LOST, pair.lost, pictures)
        yield Measurement(subject, MOVED, pair.moved, pictures)
        yield Measurement(subject, PREDICTED, pair.predicted, pictures)


def _correlations(pairs: list[MeasuredPair]) -> Iterable[Measurement]:
    predicted = [pair.predicted for pair in pairs]
    for what, measured in ((MOVED, [pair.moved for pair in pairs]), (LOST, [pair.lost for pair in pairs])):
        correlation = rank_correlation(predicted, measured)
        if correlation is not None:
            yield Measurement(ALL_PAIRS, f"{RANKED}{what}", correlation, len(pairs))
    lost = np.array([pair.lost for pair in pairs])
    yield Measurement(ALL_PAIRS, PAIRS_LOST, float((lost > 0).sum()), len(pairs))
