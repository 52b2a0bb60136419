"""Generality: erased under other names too, and nothing lost that nobody listed (MACE, Lu et al., CVPR 2024).

Acc_e is the accuracy on the erased objects, Acc_g that on their synonyms, Acc_s that on all other objects; H_o is their
harmonic mean, after turning the first two round. The others are also shown apart: those that a solver was told of, and those
that it never heard of, for which nothing but the vocabulary speaks.

Differences to the published protocol: all patches lie on the base at once, accuracy is that of the judge's first choice, and
objects are this base's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import EvalContext
from overpaint.evaluation.metrics import Measurement, found, h_object
from overpaint.evaluation.prompts import OBJECT, EvalPrompt


@dataclass(frozen=True)
class Generality:
    """How many pictures are judged of each erased object, of each of its synonyms, and of each other object."""

    erased: int = 10
    synonyms: int = 6
    others: int = 3

    def run(self, context: EvalContext) -> list[Measurement]:
        erased = [name for head, name in context.erased() if head == OBJECT]
        if not erased:
            raise OverpaintError(
                "generality is about objects and their synonyms, and no patch here erases one; use grid"
            )
        own = [question for name in erased for question in context.ask(OBJECT, name, self.erased)]
        called = [q for name in erased for q in context.prompt_set.ask_synonyms(name, self.synonyms, context.seed)]
        others = context.ask_others(OBJECT, self.others)
        context.image_generator.expect(2 * (len(own) + len(called) + len(others)))
        found_own, acc_e = self._judged(context, "erased objects: Acc_e", own)
        found_others, acc_s = self._judged(context, "other objects: Acc_s", others)
        if not called:
            return [*found_own, *found_others]
        found_called, acc_g = self._judged(context, "synonyms of erased objects: Acc_g", called)
        whole = h_object(acc_e, acc_s, acc_g)
        rows = [*found_own, *found_called, *found_others]
        rows.append(found("recipe", "H_o", whole, len(own) + len(called) + len(others)))
        told = _knows(frozenset().union(*(held.told for held in context.held)))
        for subject, questions in (
            ("synonyms the solvers were told of", [q for q in called if told(q)]),
            ("synonyms the solvers never heard", [q for q in called if not told(q)]),
            ("other objects the solvers were told of", [q for q in others if told(q)]),
            ("other objects the solvers never heard of", [q for q in others if not told(q)]),
        ):
            if questions:
                rows += self._judged(context, subject, questions)[0]
        return rows

    def _judged(
        self, context: EvalContext, subject: str, questions: list[EvalPrompt]
    ) -> tuple[list[Measurement], NDArray[np.float64]]:
        before = context.on_base(questions, OBJECT, subject.partition(":")[0])
        after = context.verdicts(context.terms(), questions, OBJECT)
        return context.kept(subject, before, after), after.accuracy(context.seed).draws


def _knows(words: frozenset[str]) -> Callable[[EvalPrompt], bool]:
    """Whether a question names its object by one of `words`."""

    def told(question: EvalPrompt) -> bool:
        return bool(words & set(re.findall(r"\w+", question.prompt.casefold())))

    return told
