"""Cross-talk, measured: each patch alone, every concept drawn and judged, beside what `overpaint crosstalk` predicts.

For each pair, the share of the base's accuracy that is lost, and how far the pictures of the same seeds moved, relative to the
patch's own concept, which is what the closed form predicts. Rank correlations say whether the prediction can be believed;
where nothing was lost there is no order to compare, and none is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from overpaint.concepts import Concept
from overpaint.errors import NotFound
from overpaint.evaluation.bench import Bench, Held
from overpaint.evaluation.crosstalk import crosstalk
from overpaint.evaluation.estimates import Finding
from overpaint.evaluation.metrics import differences, rank_correlation
from overpaint.evaluation.worlds import OBJECT, Question

LOST, MOVED, PREDICTED = "accuracy lost", "relative change of the pictures", "predicted relative effect"


@dataclass(frozen=True)
class Pair:
    """What one patch did to another concept: lost accuracy, the pictures' change relative to its own, the prediction."""

    emitter: str
    receiver: str
    lost: float
    moved: float
    predicted: float


@dataclass(frozen=True)
class Measured:
    """How many pictures of each concept are judged, and how many unlisted objects are looked at beside the registry's."""

    pictures: int = 6
    unlisted: int = 4

    def run(self, bench: Bench) -> list[Finding]:
        receivers = self._receivers(bench)
        asked = {name: self._neutral(bench, concept) for name, concept in receivers.items()}
        bench.studio.expect((1 + len(bench.held)) * sum(map(len, asked.values())))
        where = bench.studio.gallery.folder
        predicted = crosstalk(
            bench.base,
            [held.patch for held in bench.held],
            list(receivers.values()),
            cache=where.parent / "moments" if where else None,
            device=bench.device,
        )
        pairs: list[Pair] = []
        for i, held in enumerate(bench.held):
            ratios = dict(zip(predicted.concepts, predicted.ratios[i], strict=True))
            pairs += self._pairs(bench, held, receivers, asked, ratios)
        return [*_rows(pairs, self.pictures), *_correlations(pairs)]

    def _receivers(self, bench: Bench) -> dict[str, Concept]:
        """The concepts of the patches, those of the registry that can be judged, and a few that it does not list."""
        found = {held.concept.name: held.concept for held in bench.held}
        for concept in bench.known:
            try:
                bench.class_of(concept)
            except NotFound:
                continue
            found.setdefault(concept.name, concept)
        taken = {bench.class_of(concept)[1] for concept in found.values()}
        free = [name for name in bench.others(OBJECT) if name not in taken]
        wanted = min(self.unlisted, len(free))
        return found | {name: Concept(name) for name in (free[i * len(free) // wanted] for i in range(wanted))}

    def _neutral(self, bench: Bench, concept: Concept) -> list[Question]:
        """Questions about a concept; of two concepts in one sentence nobody could say which was hurt."""
        asked = bench.ask(*bench.class_of(concept), self.pictures)
        others = [each for each in asked if len(each.shows) == 1]
        return others or asked

    def _pairs(
        self,
        bench: Bench,
        held: Held,
        receivers: dict[str, Concept],
        asked: dict[str, list[Question]],
        ratios: dict[str, float],
    ) -> Iterable[Pair]:
        moved, lost = {}, {}
        for name, concept in receivers.items():
            head, _ = bench.class_of(concept)
            before = bench.on_base(asked[name], head, name)
            after = bench.verdicts([held.term], asked[name], head)
            lost[name] = 1 - float(after.right.mean() / before.right.mean())
            pictures = bench.studio.draw([held.term], asked[name]), bench.studio.draw((), asked[name])
            moved[name] = float(differences(*pictures).mean())
        own = max(moved[held.concept.name], 1e-9)
        return [
            Pair(held.concept.name, name, lost[name], moved[name] / own, ratios[name])
            for name in receivers
            if name != held.concept.name
        ]


def _rows(pairs: Iterable[Pair], pictures: int) -> Iterable[Finding]:
    for pair in pairs:
        subject = f"{pair.emitter} -> {pair.receiver}"
        yield Finding(subject, LOST, pair.lost, pictures)
        yield Finding(subject, MOVED, pair.moved, pictures)
        yield Finding(subject, PREDICTED, pair.predicted, pictures)


def _correlations(pairs: list[Pair]) -> Iterable[Finding]:
    predicted = [pair.predicted for pair in pairs]
    for what, measured in ((MOVED, [pair.moved for pair in pairs]), (LOST, [pair.lost for pair in pairs])):
        correlation = rank_correlation(predicted, measured)
        if correlation is not None:
            yield Finding("all pairs", f"rank correlation of prediction and {what}", correlation, len(pairs))
    lost = np.array([pair.lost for pair in pairs])
    yield Finding("all pairs", "pairs that lost accuracy", float((lost > 0).sum()), len(pairs))
