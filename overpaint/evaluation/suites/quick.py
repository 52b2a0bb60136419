"""Quick: is it erased, is the rest kept, does it come back? About 250 pictures, a minute on the embedded base.

Restoring is judged twice: half of the patches are taken off and their concepts judged again, and every weight of the live
pipeline is compared bit for bit with what it would be had they never been on.
"""

from __future__ import annotations

from dataclasses import dataclass

from overpaint.evaluation.context import WRONG, EvalContext, EvaluatedPatch, joined, touched, unequal
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.prompts import OBJECT, STYLE, EvalPrompt
from overpaint.patches.compose import Term

SPENT_ON_ERASED = 40
"""Pictures of erased concepts, shared among them."""


@dataclass(frozen=True)
class Quick:
    """How many pictures are judged: of each erased concept at most, of each other object, of each other style."""

    erased: int = 10
    objects: int = 1
    styles: int = 3

    def run(self, context: EvalContext) -> list[Measurement]:
        asked = {key: context.ask(*key, self._each(context)) for key in context.erased()}
        others = {OBJECT: context.ask_others(OBJECT, self.objects), STYLE: context.ask_others(STYLE, self.styles)}
        back = context.held[::2] if len(context.held) > 1 else context.held
        returning = {key: asked[key] for key in context.erased(back)}
        context.image_generator.expect(
            2 * sum(map(len, (*asked.values(), *others.values()))) + sum(map(len, returning.values()))
        )
        found: list[Measurement] = []
        for (head, name), questions in asked.items():
            before = context.on_base(questions, head, name)
            found += context.compared(f"erased: {name}", before, context.verdicts(context.terms(), questions, head))
        for head, questions in others.items():
            if questions:
                before = context.on_base(questions, head, f"the other {head}s")
                found += context.kept(
                    f"kept: other {head}s", before, context.verdicts(context.terms(), questions, head)
                )
        return found + self._restored(context, back, returning)

    def _each(self, context: EvalContext) -> int:
        return max(1, min(self.erased, SPENT_ON_ERASED // len(context.held)))

    def _restored(
        self, context: EvalContext, back: tuple[EvaluatedPatch, ...], returning: dict[tuple[str, str], list[EvalPrompt]]
    ) -> list[Measurement]:
        """The concepts of `back` when their patches are taken off and the others stay on."""
        rest = context.terms(each for each in context.held if each not in back)
        found = [wrong_tensors(context, rest, "restored: weights")]
        seen = [
            (context.verdicts((), questions, head), context.verdicts(rest, questions, head))
            for (head, _), questions in returning.items()
        ]
        before, after = (joined([pair[i] for pair in seen]) for i in (0, 1))
        return found + context.kept("restored: concepts taken off", before, after)


def wrong_tensors(context: EvalContext, rest: list[Term], subject: str) -> Measurement:
    """How many tensors of the live pipeline are not bit for bit those of `rest`, after all patches were on."""
    overlay = context.image_generator.overlay
    overlay.set(context.terms())
    overlay.set(rest)
    names = touched(context.base, context.terms())
    wrong = unequal(context.image_generator.pipe, context.base, rest, names)
    return Measurement(subject, WRONG, float(len(wrong)), len(names))
