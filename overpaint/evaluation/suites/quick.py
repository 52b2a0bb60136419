"""Quick: is it erased, is the rest kept, does it come back? About 250 pictures, a minute on the embedded base.

Restoring is judged twice: half of the patches are taken off and their concepts judged again, and every weight of the live
pipeline is compared bit for bit with what it would be had they never been on.
"""

from __future__ import annotations

from dataclasses import dataclass

from overpaint.evaluation.bench import WRONG, Bench, Held, joined
from overpaint.evaluation.bits import touched, unequal
from overpaint.evaluation.estimates import Finding
from overpaint.evaluation.worlds import OBJECT, STYLE, Question
from overpaint.patches.compose import Term

SPENT_ON_ERASED = 40
"""Pictures of erased concepts, shared among them."""


@dataclass(frozen=True)
class Quick:
    """How many pictures are judged: of each erased concept at most, of each other object, of each other style."""

    erased: int = 10
    objects: int = 1
    styles: int = 3

    def run(self, bench: Bench) -> list[Finding]:
        asked = {key: bench.ask(*key, self._each(bench)) for key in bench.erased()}
        others = {OBJECT: bench.ask_others(OBJECT, self.objects), STYLE: bench.ask_others(STYLE, self.styles)}
        back = bench.held[::2] if len(bench.held) > 1 else bench.held
        returning = {key: asked[key] for key in bench.erased(back)}
        bench.studio.expect(2 * sum(map(len, (*asked.values(), *others.values()))) + sum(map(len, returning.values())))
        found: list[Finding] = []
        for (head, name), questions in asked.items():
            before = bench.on_base(questions, head, name)
            found += bench.compared(f"erased: {name}", before, bench.verdicts(bench.terms(), questions, head))
        for head, questions in others.items():
            if questions:
                before = bench.on_base(questions, head, f"the other {head}s")
                found += bench.kept(f"kept: other {head}s", before, bench.verdicts(bench.terms(), questions, head))
        return found + self._restored(bench, back, returning)

    def _each(self, bench: Bench) -> int:
        return max(1, min(self.erased, SPENT_ON_ERASED // len(bench.held)))

    def _restored(
        self, bench: Bench, back: tuple[Held, ...], returning: dict[tuple[str, str], list[Question]]
    ) -> list[Finding]:
        """The concepts of `back` when their patches are taken off and the others stay on."""
        rest = bench.terms(each for each in bench.held if each not in back)
        found = [wrong_tensors(bench, rest, "restored: weights")]
        seen = [
            (bench.verdicts((), questions, head), bench.verdicts(rest, questions, head))
            for (head, _), questions in returning.items()
        ]
        before, after = (joined([pair[i] for pair in seen]) for i in (0, 1))
        return found + bench.kept("restored: concepts taken off", before, after)


def wrong_tensors(bench: Bench, rest: list[Term], subject: str) -> Finding:
    """How many tensors of the live pipeline are not bit for bit those of `rest`, after all patches were on."""
    overlay = bench.studio.overlay
    overlay.set(bench.terms())
    overlay.set(rest)
    names = touched(bench.base, bench.terms())
    wrong = unequal(bench.studio.pipe, bench.base, rest, names)
    return Finding(subject, WRONG, float(len(wrong)), len(names))
