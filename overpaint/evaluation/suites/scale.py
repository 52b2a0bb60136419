"""Scale: N = 1, 2, 4, ... concepts at once under several ways to compose them, as H_c(N) (MACE, figure 7).

For every solver, N patches are solved and laid side by side ("plain sum"). `separable` and `sepme` are told of all the
concepts, because that is what they are for; every other solver works alone, as its paper has it. Of the first of those, task
arithmetic and TIES merge the same patches, and "joint" erases all N concepts in one solve. Kept are objects that nobody was told
of. The order spread counts tensors that come out differently when the patches are laid on a live pipeline in other orders.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from overpaint.concepts import Concept
from overpaint.errors import OverpaintError
from overpaint.evaluation.bench import ACCURACY, Bench
from overpaint.evaluation.bits import touched, unequal
from overpaint.evaluation.composers import task_arithmetic, ties
from overpaint.evaluation.estimates import Finding, found
from overpaint.evaluation.metrics import h_composed
from overpaint.evaluation.worlds import OBJECT, Question
from overpaint.patches.compose import Term
from overpaint.patches.patch import make_patch
from overpaint.solvers import solver_class
from overpaint.solvers.problem import EditProblem, configure, settings_of

TOLD = ("separable", "sepme")
ORDERS = 3


@dataclass(frozen=True)
class Scale:
    """The most concepts, the solvers (commas between), their settings ("solver.name=value", semicolons between), pictures.

    `pictures` is how many are judged of erased concepts and of kept ones, at every N.
    """

    most: int = 16
    solvers: str = "separable,uce"
    settings: str = ""
    pictures: int = 32

    def run(self, bench: Bench) -> list[Finding]:
        concepts = self._concepts(bench)
        solvers = [name.strip() for name in self.solvers.split(",") if name.strip()]
        for name in solvers:
            solver_class(name)
        counts = self._counts(len(concepts))
        alone = self._merged(solvers)
        ways = len(solvers) + (3 if alone else 0)
        bench.studio.expect(2 * self.pictures * (1 + ways * len(counts)))
        kept = self._kept(bench, concepts)
        before = bench.on_base(kept, OBJECT, "the kept objects").accuracy(bench.seed)
        rows = [before.found("base: kept", ACCURACY)]
        solved = {name: self._solved(bench, name, concepts) for name in solvers}
        for n in counts:
            asked = self._erased(bench, concepts[:n])
            for label, terms in self._compositions(bench, solved, alone, concepts[:n]):
                rows += self._judged(bench, f"{label}, N={n}", terms, asked, kept)
        return rows

    def _counts(self, most: int) -> list[int]:
        """How many concepts are erased at once, in turn."""
        return [2**i for i in range(most.bit_length()) if 2**i <= most]

    def _merged(self, solvers: list[str]) -> list[str]:
        """The solvers of which the first has its patches merged in other ways, too."""
        return [name for name in solvers if name not in TOLD]

    def _concepts(self, bench: Bench) -> list[Concept]:
        """The objects of the recipe first, and then others spread over the world."""
        found = [held.concept for held in bench.held if bench.class_of(held.concept)[0] == OBJECT]
        others = bench.others(OBJECT)
        wanted = max(0, min(self.most - len(found), len(others) * 2 // 3))
        return [*found, *(Concept(others[i * len(others) // wanted]) for i in range(wanted))][: self.most]

    def _kept(self, bench: Bench, concepts: list[Concept]) -> list[Question]:
        erased = {bench.class_of(concept)[1] for concept in concepts}
        names = [name for name in bench.others(OBJECT) if name not in erased]
        each = max(1, self.pictures // len(names))
        return [question for name in names for question in bench.ask(OBJECT, name, each)][: self.pictures]

    def _erased(self, bench: Bench, concepts: list[Concept]) -> list[Question]:
        each = max(1, self.pictures // len(concepts))
        return [q for concept in concepts for q in bench.ask(*bench.class_of(concept), each)]

    def _solved(self, bench: Bench, solver: str, concepts: list[Concept]) -> list[Term]:
        universe = tuple(concepts) if solver in TOLD else ()
        return [self._solve(bench, solver, concept, universe) for concept in concepts]

    def _solve(self, bench: Bench, solver: str, concept: Concept, universe: tuple[Concept, ...]) -> Term:
        method = configure(solver_class(solver), self._settings(solver))
        problem = EditProblem(bench.base, concept, universe, bench.seed, bench.device)
        delta = method.solve(problem).delta
        patch = make_patch(
            bench.base, concept, delta, {"name": solver, "settings": settings_of(method), "seed": bench.seed}
        )
        return Term(patch.id, patch.delta)

    def _settings(self, solver: str) -> dict[str, str]:
        found = {}
        for text in filter(None, (each.strip() for each in self.settings.split(";"))):
            name, equals, value = text.partition("=")
            whose, dot, key = name.partition(".")
            if not equals or not dot:
                raise OverpaintError(f"settings of solvers are written solver.name=value; got {text!r}")
            if whose.strip() == solver:
                found[key.strip()] = value
        return found

    def _compositions(
        self, bench: Bench, solved: dict[str, list[Term]], alone: list[str], concepts: list[Concept]
    ) -> Iterable[tuple[str, list[Term]]]:
        n = len(concepts)
        for solver, terms in solved.items():
            yield f"{solver}, plain sum", terms[:n]
        if alone:
            solver, terms = alone[0], solved[alone[0]][:n]
            yield f"{solver}, task arithmetic", task_arithmetic(terms)
            yield f"{solver}, TIES", ties(bench.base, terms)
            words = [word for concept in concepts for word in concept.words]
            yield f"{solver}, joint", [self._solve(bench, solver, Concept(words[0], "object", tuple(words[1:])), ())]

    def _judged(
        self, bench: Bench, subject: str, terms: list[Term], asked: list[Question], kept: list[Question]
    ) -> Iterable[Finding]:
        gone = bench.verdicts(terms, asked, OBJECT).accuracy(bench.seed)
        left = bench.verdicts(terms, kept, OBJECT).accuracy(bench.seed)
        yield found(subject, "H_c", h_composed(gone.draws, left.draws), gone.n + left.n)
        yield gone.found(subject, "accuracy on erased")
        yield left.found(subject, "accuracy on kept")
        yield Finding(subject, "order spread", float(order_spread(bench, terms)), ORDERS)


def order_spread(bench: Bench, terms: list[Term]) -> int:
    """In how many tensors a live pipeline differs from the composition after any of a few orders of laying patches on."""
    rng, names, wrong = random.Random(bench.seed), touched(bench.base, terms), set()
    for _ in range(ORDERS if len(terms) > 1 else 1):
        bench.studio.overlay.clear()
        for term in rng.sample(terms, len(terms)):
            bench.studio.overlay.add(term)
        wrong |= set(unequal(bench.studio.pipe, bench.base, terms, names))
    return len(wrong)
