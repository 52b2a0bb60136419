"""Generality: erased under other names too, and nothing lost that nobody listed (MACE, Lu et al., CVPR 2024).

Acc_e is the accuracy on the erased objects, Acc_g that on their synonyms, Acc_s that on all other objects; H_o is their
harmonic mean, after turning the first two round. The others are also shown apart: those that a solver knew of, and those
that only its vocabulary preserves.

Differences to the published protocol: all patches are applied at once, accuracy is that of the judge's first choice, and
objects are this base's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import EvalContext
from overpaint.evaluation.metrics import Measurement, h_object, measured
from overpaint.evaluation.prompts import OBJECT, EvalPrompt
from overpaint.evaluation.suites import Suite


@dataclass(frozen=True)
class Generality(Suite):
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
        by_name = [prompt for name in erased for prompt in context.prompts(OBJECT, name, self.erased)]
        synonyms = [
            prompt
            for name in erased
            for prompt in context.prompt_set.synonym_prompts(name, self.synonyms, context.seed)
        ]
        others = context.prompts_for_others(OBJECT, self.others)
        context.image_generator.expect(2 * (len(by_name) + len(synonyms) + len(others)))
        erased_rows, acc_e = self._judged(context, "erased objects: Acc_e", by_name)
        other_rows, acc_s = self._judged(context, "other objects: Acc_s", others)
        if not synonyms:
            return [*erased_rows, *other_rows]
        synonym_rows, acc_g = self._judged(context, "synonyms of erased objects: Acc_g", synonyms)
        n = len(by_name) + len(synonyms) + len(others)
        rows = [*erased_rows, *synonym_rows, *other_rows, measured("recipe", "H_o", h_object(acc_e, acc_s, acc_g), n)]
        known = frozenset().union(*(patch.known_words for patch in context.patches))
        for subject, prompts in (
            ("synonyms the solvers were told of", [p for p in synonyms if _has_word(p, known)]),
            ("synonyms the solvers never heard", [p for p in synonyms if not _has_word(p, known)]),
            ("other objects the solvers were told of", [p for p in others if _has_word(p, known)]),
            ("other objects the solvers never heard of", [p for p in others if not _has_word(p, known)]),
        ):
            if prompts:
                rows += self._judged(context, subject, prompts)[0]
        return rows

    def _judged(
        self, context: EvalContext, subject: str, prompts: list[EvalPrompt]
    ) -> tuple[list[Measurement], NDArray[np.float64]]:
        before = context.on_base(prompts, OBJECT, subject.partition(":")[0])
        after = context.verdicts(context.terms(), prompts, OBJECT)
        return context.preserved(subject, before, after), after.accuracy(context.seed).draws


def _has_word(prompt: EvalPrompt, words: frozenset[str]) -> bool:
    return bool(words & set(re.findall(r"\w+", prompt.prompt.casefold())))
