"""Scale: N = 1, 2, 4, ... concepts at once under several ways to compose them, as H_c(N) (MACE, figure 7).

For every solver, N patches are solved and applied together ("plain sum"). `separable` and `sepme` know all the
concepts, because that is what they are for; every other solver works alone, as its paper has it. Of the first of those, task
arithmetic and TIES merge the same patches, and "joint" erases all N concepts in one solve. Task arithmetic (Ilharco et al.,
ICLR 2023) scales every patch by one factor. TIES (Yadav et al., NeurIPS 2023) keeps of each the largest changes, lets them vote
on a sign for every weight, and averages those that agree. Preserved are objects in no universe. The order spread counts
tensors that come out differently when the patches are applied to a live pipeline in other orders.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.encoding import evenly_spaced
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import ACCURACY, EvalContext, changed_tensors, differing_tensors
from overpaint.evaluation.metrics import Measurement, h_composed, measured
from overpaint.evaluation.prompts import OBJECT, EvalPrompt
from overpaint.evaluation.report_page import Chart, Line, Numbers, Section, published
from overpaint.evaluation.suites import Suite
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import Dense
from overpaint.patches.patch import make_patch
from overpaint.solvers import solver_class
from overpaint.solvers.problem import EditProblem, configure, settings_of

TASK_SCALE = 0.4
"""The factor that Yadav et al. recommend where nothing can be tuned."""
TIES_KEEP, TIES_SCALE = 0.2, 1.75
"""The share of changes that is kept, and the factor of their mean, as CUIG (ICLR 2026) merges erasers."""


def task_arithmetic(terms: Sequence[Term], scale: float = TASK_SCALE) -> list[Term]:
    """Every patch at `scale` times its strength; a single one as it is, because there is nothing to merge."""
    return list(terms) if len(terms) == 1 else [replace(term, strength=scale * term.strength) for term in terms]


def ties(base: Base, terms: Sequence[Term], keep: float = TIES_KEEP, scale: float = TIES_SCALE) -> list[Term]:
    """One dense term, the TIES merge of `terms`; a single one as it is."""
    if len(terms) == 1:
        return list(terms)
    ordered = sorted(terms, key=lambda term: term.id)
    changes = [_trimmed(_changes(base, term), keep) for term in ordered]
    names = sorted({name for change in changes for name in change})
    merged = {name: scale * _elected([c[name] for c in changes if name in c]) for name in names}
    label = "ties " + hashlib.sha256(repr([(t.id, t.strength, keep, scale) for t in ordered]).encode()).hexdigest()
    return [Term(label, Dense(merged))]


def _changes(base: Base, term: Term) -> dict[str, Tensor]:
    return {name: value.float() - base.tensor(name).float() for name, value in compose(base, [term]).items()}


def _trimmed(changes: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The largest changes of one patch, over all its tensors; the others 0."""
    sizes = torch.cat([change.abs().flatten() for change in changes.values()])
    least = sizes.kthvalue(max(1, sizes.numel() - round(keep * sizes.numel()) + 1)).values
    return {name: change.where(change.abs() >= least, torch.zeros(())) for name, change in changes.items()}


def _elected(changes: Sequence[Tensor]) -> Tensor:
    """The mean of the changes that have the sign of their sum, value by value."""
    stacked = torch.stack(list(changes))
    agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


USE_UNIVERSE = ("separable", "separable_mlp", "sepme")
"""Solvers that are published with a universe. Others that could use one work alone here, as their papers have it."""
ORDERS = 3


@dataclass(frozen=True)
class Scale(Suite):
    """The most concepts, the solvers (commas between), their settings ("solver.name=value", semicolons between), pictures.

    `pictures` is how many are judged of erased concepts (at least) and of kept ones (at most), at every N.
    """

    most: int = 16
    solvers: str = "separable,uce"
    settings: str = ""
    pictures: int = 32

    heading = "Many concepts at once"

    def run(self, context: EvalContext) -> list[Measurement]:
        concepts = self._concepts(context)
        solvers = [name.strip() for name in self.solvers.split(",") if name.strip()]
        for name in solvers:
            self._check(name)
        counts = self._counts(len(concepts))
        alone = self._merged(solvers)
        ways = len(solvers) + (3 if alone else 0)
        context.image_generator.expect(2 * self.pictures * (1 + ways * len(counts)))
        kept = self._kept(context, concepts)
        before = context.on_base(kept, OBJECT, "the kept objects").accuracy(context.seed)
        rows = [before.measurement("base: kept", ACCURACY)]
        solved = {name: self._solved(context, name, concepts) for name in solvers}
        for n in counts:
            asked = self._erased(context, concepts[:n])
            for label, terms in self._compositions(context, solved, alone, concepts[:n]):
                rows += self._judged(context, f"{label}, N={n}", terms, asked, kept)
        return rows

    @classmethod
    def section(cls, numbers: Numbers) -> Section:
        """H_c over the number of concepts, a line for each way to compose, and the same in numbers."""
        text = (
            "H_c is the harmonic mean of what is gone of the erased concepts and what is left of those that no solver knew "
            "of: 1 is perfect, 0 is useless. Whiskers are 95% intervals."
        )
        metrics = ("H_c", "accuracy on erased", "accuracy on kept", "order spread")
        own = numbers.table([s for s in numbers.subjects() if ", N=" in s], metrics, "The same in numbers")
        return Section(cls.heading, text, charts=(_curve(numbers),), more=(own, *published("scale")))

    def _check(self, solver: str) -> None:
        """Raise NotFound, before anything is solved, for a solver that there is not."""
        solver_class(solver)

    def _counts(self, most: int) -> list[int]:
        """How many concepts are erased at once, in turn."""
        return [2**i for i in range(most.bit_length()) if 2**i <= most]

    def _merged(self, solvers: list[str]) -> list[str]:
        """The solvers of which the first has its patches merged in other ways, too."""
        return [name for name in solvers if name not in USE_UNIVERSE]

    def _concepts(self, context: EvalContext) -> list[Concept]:
        """The objects of the recipe first, and then others spread over all that are known."""
        concepts = [each.concept for each in context.patches if context.class_of(each.concept)[0] == OBJECT]
        others = context.others(OBJECT)
        wanted = max(0, min(self.most - len(concepts), len(others) * 2 // 3))
        return [*concepts, *map(Concept, evenly_spaced(others, wanted))][: self.most]

    def _kept(self, context: EvalContext, concepts: list[Concept]) -> list[EvalPrompt]:
        erased = {context.class_of(concept)[1] for concept in concepts}
        names = [name for name in context.others(OBJECT) if name not in erased]
        each = -(-self.pictures // len(names))
        return [question for name in names for question in context.prompts(OBJECT, name, each)][: self.pictures]

    def _erased(self, context: EvalContext, concepts: list[Concept]) -> list[EvalPrompt]:
        each = -(-self.pictures // len(concepts))
        return [q for concept in concepts for q in context.prompts(*context.class_of(concept), each)]

    def _solved(self, context: EvalContext, solver: str, concepts: list[Concept]) -> list[Term]:
        universe = tuple(concepts) if solver in USE_UNIVERSE else ()
        return [self._solve(context, solver, concept, universe) for concept in concepts]

    def _solve(self, context: EvalContext, solver: str, concept: Concept, universe: tuple[Concept, ...]) -> Term:
        method = configure(solver_class(solver), self._settings(solver))
        problem = EditProblem(context.base, concept, universe, context.seed, context.device)
        delta = method.solve(problem).delta
        patch = make_patch(
            context.base, concept, delta, {"name": solver, "settings": settings_of(method), "seed": context.seed}
        )
        return Term(patch.id, patch.delta)

    def _settings(self, solver: str) -> dict[str, str]:
        settings = {}
        for text in filter(None, (each.strip() for each in self.settings.split(";"))):
            name, equals, value = text.partition("=")
            whose, dot, key = name.partition(".")
            if not equals or not dot:
                raise OverpaintError(f"settings of solvers are written solver.name=value; got {text!r}")
            if whose.strip() == solver:
                settings[key.strip()] = value
        return settings

    def _compositions(
        self, context: EvalContext, solved: dict[str, list[Term]], alone: list[str], concepts: list[Concept]
    ) -> Iterable[tuple[str, list[Term]]]:
        n = len(concepts)
        for solver, terms in solved.items():
            yield f"{solver}, plain sum", terms[:n]
        if alone:
            solver, terms = alone[0], solved[alone[0]][:n]
            yield f"{solver}, task arithmetic", task_arithmetic(terms)
            yield f"{solver}, TIES", ties(context.base, terms)
            words = [word for concept in concepts for word in concept.words]
            yield f"{solver}, joint", [self._solve(context, solver, Concept(words[0], "object", tuple(words[1:])), ())]

    def _judged(
        self, context: EvalContext, subject: str, terms: list[Term], asked: list[EvalPrompt], kept: list[EvalPrompt]
    ) -> Iterable[Measurement]:
        gone = context.verdicts(terms, asked, OBJECT).accuracy(context.seed)
        left = context.verdicts(terms, kept, OBJECT).accuracy(context.seed)
        yield measured(subject, "H_c", h_composed(gone.draws, left.draws), gone.n + left.n)
        yield gone.measurement(subject, "accuracy on erased")
        yield left.measurement(subject, "accuracy on kept")
        yield Measurement(subject, "order spread", float(order_spread(context, terms)), ORDERS)


def _curve(numbers: Numbers) -> Chart:
    points: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    for subject in numbers.subjects():
        way, mark, n = subject.rpartition(", N=")
        result = numbers.get(subject, "H_c")
        if mark and result is not None:
            points.setdefault(way, []).append((float(n), result.value, result.low, result.high))
    lines = tuple(Line(way, tuple(of_way)) for way, of_way in points.items())
    return Chart(lines, "Erasing more and more concepts at once.", "concepts erased at once", "H_c", "scale")


def order_spread(context: EvalContext, terms: list[Term]) -> int:
    """In how many tensors a live pipeline differs from the composition after applying the patches in any of a few orders."""
    rng, names, wrong = random.Random(context.seed), changed_tensors(context.base, terms), set()
    for _ in range(ORDERS if len(terms) > 1 else 1):
        context.image_generator.overlay.clear()
        for term in rng.sample(terms, len(terms)):
            context.image_generator.overlay.add(term)
        wrong |= set(differing_tensors(context.image_generator.pipe, context.base, terms, names))
    return len(wrong)
