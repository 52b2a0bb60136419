"""Probes: can what was erased be brought back with the patches on? The numbers as they are.

For each erased object, the judge's accuracy after every attack of `overpaint.evaluation.attacks`, beside that on the base and
under the patches alone. A patch hides a concept and does not destroy it, so these numbers are expected to be above 0.

Differences to the published protocols: a few hundred steps at most, pictures of the embedded base's size, and one learned word
for each concept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from overpaint.errors import OverpaintError
from overpaint.evaluation.attacks import Pictures, completed, inverted, noised, revived
from overpaint.evaluation.bench import ACCURACY, ON_BASE, Bench
from overpaint.evaluation.estimates import Finding, average, mean
from overpaint.evaluation.worlds import OBJECT, Question

ETA = 1.0
"""DDIM's noise at its full size; the paper goes from 1 to 1.85."""


@dataclass(frozen=True)
class Probes:
    """Pictures judged of each concept after each attack; the base's steps in completion; training steps of the last two."""

    pictures: int = 6
    clean: int = 5
    inversion: int = 150
    revival: int = 100

    def run(self, bench: Bench) -> list[Finding]:
        names = [name for head, name in bench.erased() if head == OBJECT]
        if not names:
            raise OverpaintError("the probes bring objects back, and no patch here erases one")
        asked = {name: bench.ask(OBJECT, name, self.pictures) for name in names}
        bench.studio.expect(2 * sum(map(len, asked.values())) + 2 * self.pictures)
        other = bench.ask_others(OBJECT, 1)[: 4 * self.pictures]
        rows: list[Finding] = []
        scores: dict[str, list[NDArray[np.float64]]] = {}
        for name, questions in asked.items():
            before = bench.on_base(questions, OBJECT, name)
            rows.append(before.accuracy(bench.seed).found(name, ON_BASE))
            rows.append(bench.verdicts(bench.terms(), questions, OBJECT).accuracy(bench.seed).found(name, ACCURACY))
            for attack, draw in self._attacks(bench, questions, other):
                right = self._right(bench, draw(), name)
                scores.setdefault(attack, []).append(right)
                rows.append(mean(right, [q.seed for q in questions], bench.seed).found(name, attack))
        for attack, each in scores.items():
            means = [mean(right, list(range(len(right))), bench.seed) for right in each]
            rows.append(average(means).found("average of the concepts", attack))
        return rows

    def _attacks(
        self, bench: Bench, questions: list[Question], other: list[Question]
    ) -> Iterable[tuple[str, Callable[[], Pictures]]]:
        studio, terms, seed = bench.studio, bench.terms(), bench.seed
        prompts = [question.prompt for question in other]
        clean = min(self.clean, studio.sampler.steps - 1)
        yield f"accuracy after {clean} steps of the base", lambda: completed(studio, terms, questions, clean)
        yield "accuracy with added noise", lambda: noised(studio, terms, questions, ETA)
        yield (
            "accuracy of a learned word",
            lambda: inverted(studio, terms, studio.draw((), questions), questions, self.inversion, seed),
        )
        yield (
            "accuracy after training on other pictures",
            lambda: revived(studio, terms, studio.draw((), other), prompts, questions, self.revival, seed),
        )

    def _right(self, bench: Bench, pictures: Pictures, name: str) -> NDArray[np.float64]:
        names = bench.judge.heads[OBJECT]
        likely = bench.judge.probabilities(pictures, OBJECT)
        return np.asarray(likely.argmax(1) == names.index(name), np.float64)
