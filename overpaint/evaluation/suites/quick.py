"""Quick: is it erased, is the rest preserved, does it come back? About 250 pictures, a minute on the embedded base.

Restoring is tested twice: half of the patches are removed and their concepts judged again, and every weight of the live
pipeline is compared bit for bit with what it would be had they never been applied.
"""

from __future__ import annotations

from dataclasses import dataclass

from overpaint.evaluation.context import EvalContext, Verdicts
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.prompts import OBJECT, STYLE, EvalPrompt
from overpaint.evaluation.suites import Suite
from overpaint.patches.compose import Term


@dataclass(frozen=True)
class Quick(Suite):
    """How many pictures are judged: of each erased concept at most, of each other object, of each other style; and of all
    erased concepts together at most."""

    erased: int = 10
    objects: int = 1
    styles: int = 3
    together: int = 40

    def run(self, context: EvalContext) -> list[Measurement]:
        each = max(1, min(self.erased, self.together // len(context.patches)))
        erased = {key: context.prompts(*key, each) for key in context.erased()}
        others = {head: context.prompts_for_others(head, getattr(self, f"{head}s")) for head in (OBJECT, STYLE)}
        removed = context.patches[::2] if len(context.patches) > 1 else context.patches
        restored = {key: erased[key] for key in context.erased(removed)}
        count = 2 * sum(map(len, (*erased.values(), *others.values()))) + sum(map(len, restored.values()))
        context.image_generator.expect(count)
        terms = context.terms()
        rows: list[Measurement] = []
        for (head, name), prompts in erased.items():
            before = context.on_base(prompts, head, name)
            rows += context.compared(f"erased: {name}", before, context.verdicts(terms, prompts, head))
        for head, prompts in others.items():
            if prompts:
                before = context.on_base(prompts, head, f"the other {head}s")
                rows += context.preserved(f"kept: other {head}s", before, context.verdicts(terms, prompts, head))
        return rows + _restored(context, context.terms(p for p in context.patches if p not in removed), restored)


def _restored(
    context: EvalContext, rest: list[Term], restored: dict[tuple[str, str], list[EvalPrompt]]
) -> list[Measurement]:
    """After all patches were applied, only `rest` still is: the weights, and the concepts whose patches were removed."""
    context.image_generator.overlay.set(context.terms())
    weights = context.wrong_tensors(rest, "restored: weights")
    before, after = (
        Verdicts.joined([context.verdicts(terms, prompts, head) for (head, _), prompts in restored.items()])
        for terms in ((), rest)
    )
    return [weights, *context.preserved("restored: concepts taken off", before, after)]
