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

from overpaint.evaluation.bench import ACCURACY, Bench, Held
from overpaint.evaluation.estimates import Finding, Mean, average, found
from overpaint.evaluation.metrics import unlearning_accuracy
from overpaint.evaluation.worlds import OBJECT, STYLE, Question

HEADS = (STYLE, OBJECT)


@dataclass(frozen=True)
class Grid:
    """How many objects stand in the grid (the erased ones among them), and how many seeds each cell has."""

    objects: int = 20
    seeds: int = 1

    def run(self, bench: Bench) -> list[Finding]:
        asked = bench.world.grid(self._styles(bench), self._objects(bench), self.seeds, bench.seed)
        bench.studio.expect(len(asked) * (1 + len(bench.held)))
        base = {head: bench.on_base(asked, head, f"the {head}s of the grid") for head in HEADS}
        rows = [base[head].accuracy(bench.seed).found(f"base: {head}s", ACCURACY) for head in HEADS]
        each = [self._alone(bench, held, asked) for held in bench.held]
        for held, means in zip(bench.held, each, strict=True):
            rows += [_named(f"{held.concept.name} ({held.solver})", name, one) for name, one in means.items()]
        for name in each[0]:
            rows.append(_named("average of the patches", name, average([means[name] for means in each])))
        return rows

    def _styles(self, bench: Bench) -> list[str]:
        return [style for style in bench.world.names(STYLE) if style in bench.judge.heads.get(STYLE, ())]

    def _objects(self, bench: Bench) -> list[str]:
        """The erased objects, and others spread over the catalogue."""
        erased = [name for head, name in bench.erased() if head == OBJECT]
        others = bench.others(OBJECT)
        wanted = min(len(others), max(2, self.objects - len(erased)))
        return [*erased, *(others[i * len(others) // wanted] for i in range(wanted))]

    def _alone(self, bench: Bench, held: Held, asked: Sequence[Question]) -> dict[str, Mean]:
        """UA, IRA, CRA and what belongs to them, with one patch alone on the base."""
        head, name = bench.class_of(held.concept)
        other = STYLE if head == OBJECT else OBJECT
        seen = {each: bench.verdicts([held.term], asked, each) for each in HEADS}
        own = [i for i, q in enumerate(asked) if q.shows[head] == name]
        classes = sorted({q.shows[head] for q in asked} - {name})
        within = [seen[head].only([i for i, q in enumerate(asked) if q.shows[head] == each]) for each in classes]
        erased = seen[head].only(own)
        return {
            "UA": _complement(erased.accuracy(bench.seed)),
            "IRA": average([each.accuracy(bench.seed) for each in within]),
            "CRA": seen[other].accuracy(bench.seed),
            "retention in the prompt": seen[other].only(own).accuracy(bench.seed),
            "probability of the erased concept": erased.certainty(bench.seed),
        }


def _complement(accuracy: Mean) -> Mean:
    return Mean(
        unlearning_accuracy(accuracy.draws), accuracy.n, None if accuracy.hits is None else accuracy.n - accuracy.hits
    )


def _named(subject: str, metric: str, value: Mean) -> Finding:
    return value.found(subject, metric) if value.hits is not None else found(subject, metric, value.draws, value.n)
