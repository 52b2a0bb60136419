"""More and more concepts at once on the embedded base: H_c(N) of several solvers, by the code of the suite `scale`.

The first N of `--most` listed objects are erased; kept are those that nobody was told of. `separable`, `separable_mlp` and
`nullspace` are told of all that is listed, and so is what is decoupled (`esd+decoupled`); `sepme` is told of as many as its sums
go to; every other solver works alone, and `uce` is also merged by task arithmetic and TIES and solved for all N at once.
`separable:share=0` weighs no concept's own keys more than those of the others. Solvers that train stop at 16 concepts. Of
`separable` and `separable_mlp`, each concept is also restored while all the others stay.

Patches and pictures are kept in the same work folder: a run that is killed goes on where it was, `--shard 0/2` and `--shard 1/2`
share the solving and the drawing between two processes, and with `--budget` nothing is begun after so many seconds.
`--on ray` and `--on ray://HOST:PORT` solve the patches, and then draw the curves, on a Ray cluster.
`python -m benchmarks.solvers --page` writes the page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.cells import NO_END, Budget, Job, KeptRows, Origin, Shard, add_on_option, carried_out, working_on
from benchmarks.protocol import RESTORED, WORDS, concept_of, listed, universe
from benchmarks.solvers import WORK, Asked, BenchReference, whole_first
from benchmarks.solvers import Bench as Solving
from benchmarks.tables import arguments, save, show
from overpaint.core.concepts import Concept
from overpaint.core.executors import Executor
from overpaint.evaluation.context import EvalContext, EvaluatedPatch, Verdicts
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.prompts import OBJECT, EvalPrompt
from overpaint.evaluation.suites.scale import Scale
from overpaint.patches.compose import Term
from overpaint.patches.patch import Patch

COUNTS = (1, 2, 4, 8, 16, 32, 64, 100)
"""As far as there are listed objects."""
TRAINED = ("sepme", "esd", "ablation", "few_shot_lora")
STRICT = "esd:variant=x-strict"
"""ESD that trains the prompt's keys and values alone, so that decoupling leaves nothing out."""
DECOUPLED = tuple(f"{name}+decoupled" for name in (*TRAINED[1:], STRICT))
TOGETHER = "separable:share=0"
"""Patches for many concepts that are erased together and never alone: none's own keys weigh more than the others'."""
SOLVERS = ("separable", TOGETHER, "separable_mlp", "uce", "uce+decoupled", "nullspace", *TRAINED, *DECOUPLED)
FAR, TRAINED_FAR = 100, 16
"""The most concepts at once, of solvers in closed form and of those that train."""
MERGED = ("uce",)
"""Solvers whose patches are also merged in other ways, and that also solve for all concepts at once."""
LISTENING = ("separable", "separable_mlp", "nullspace")
"""Solvers that are told of everything that is listed."""
RESTORING = ("separable", TOGETHER, "separable_mlp")
"""Solvers of which each concept is also restored while the others stay."""
PLAIN = "plain sum"
"""How the suite calls patches that are laid side by side."""


@dataclass(frozen=True)
class Curve(Scale):
    """The suite over the listed objects, with patches from a work folder."""

    solving: Solving | None = field(default=None, compare=False)
    merges: bool = False
    """Whether patches are merged in other ways and all concepts solved for at once, instead of summed."""
    budget: Budget = field(default=NO_END, compare=False)

    @property
    def far(self) -> int:
        """The most concepts at once, for the solver whose turn it is."""
        return min(self.most, TRAINED_FAR) if re.split("[:+]", self.solvers)[0] in TRAINED else self.most

    def _concepts(self, context: EvalContext) -> list[Concept]:
        return [concept_of(name) for name in listed(self.most)[: self.far]]

    def _kept(self, context: EvalContext, concepts: list[Concept]) -> list[EvalPrompt]:
        # The same for every solver, however far it goes.
        return super()._kept(context, [concept_of(name) for name in listed(self.most)])

    def _counts(self, most: int) -> list[int]:
        return [count for count in COUNTS if count <= most]

    def run(self, context: EvalContext) -> list[Measurement]:
        """What the suite measures; and of `RESTORING`, what each concept is once it is restored while the others stay."""
        rows = super().run(context)
        return [*rows, *self._restored(context)] if self.solvers in RESTORING else rows

    def _restored(self, context: EvalContext) -> list[Measurement]:
        concepts = self._concepts(context)
        terms = self._solved(context, self.solvers, concepts)
        each, before, after = max(1, self.pictures // len(concepts)), [], []
        for place, concept in enumerate(concepts):
            self.budget.check()
            asked = context.prompts(*context.class_of(concept), each)
            before.append(context.verdicts((), asked, OBJECT))
            after.append(context.verdicts([*terms[:place], *terms[place + 1 :]], asked, OBJECT))
        sides = Verdicts.joined(before), Verdicts.joined(after)
        return context.preserved(f"{self.solvers}, {RESTORED}, N={len(concepts)}", *sides)

    def _check(self, solver: str) -> None:
        Asked.parse(solver)

    def _merged(self, solvers: list[str]) -> list[str]:
        return solvers if self.merges else []

    def _compositions(
        self, context: EvalContext, solved: dict[str, list[Term]], alone: list[str], concepts: list[Concept]
    ) -> Iterable[tuple[str, list[Term]]]:
        for label, terms in super()._compositions(context, solved, alone, concepts):
            if label.endswith(PLAIN) != self.merges:
                self.budget.check()
                yield label, terms

    def _solve(self, context: EvalContext, solver: str, concept: Concept, universe: tuple[Concept, ...]) -> Term:
        patch = self.patch(solver, concept)
        return Term(patch.id, patch.delta)

    def patch(self, solver: str, concept: Concept) -> Patch:
        """The kept patch of a solver and a concept, or a new one."""
        assert self.solving is not None
        asked = Asked.parse(solver)
        return self.solving.solved(asked, concept, told(asked.name, self.most), universe("separable", self.most))[0]

    def needs(self, name: str) -> tuple[Origin, ...]:
        """What the patch of a concept follows from, for the solver whose turn it is."""
        asked = Asked.parse(self.solvers)
        return asked.origins(concept_of(name), told(asked.name, self.most), universe("separable", self.most))

    def context(self) -> EvalContext:
        """The suite's context: the first listed object stands for the others, which the suite chooses itself."""
        assert self.solving is not None
        held = (EvaluatedPatch(self.patch("separable", concept_of(listed(self.most)[0]))),)
        prompt_set, judge, image_generator = self.solving.prompt_set, self.solving.judge, self.solving.image_generator
        return EvalContext(self.solving.base, prompt_set, judge, image_generator, held, device=self.solving.device)


def told(solver: str, most: int) -> tuple[Concept, ...]:
    """What a solver is told of on the curve."""
    if solver == "sepme":
        return tuple(concept_of(name) for name in listed(most)[:TRAINED_FAR])
    return universe(solver, most) if solver in LISTENING else ()


def farthest() -> int:
    """How many concepts can be listed so that a sixth of the catalogue, at least, is left that nobody is told of."""
    return min(FAR, len(WORDS.objects) * 5 // 6)


def parts(solvers: Sequence[str]) -> list[tuple[str, bool]]:
    """What is drawn and kept one by one: (solver, False) for plain sums, (solver, True) for its other ways to compose."""
    return [(solver, merges) for solver in solvers for merges in (True, False) if solver in MERGED or not merges]


def curves(work: Path) -> dict[str, list[Measurement]]:
    """What was found of each solver, by its name, in the order of `SOLVERS`."""
    found: dict[str, list[Measurement]] = {}
    for solver in SOLVERS:
        for place in (_place(work, solver, merges) for merges in (False, True)):
            if place.is_file():
                found.setdefault(solver, []).extend(KeptRows.read(place))
    return found


def draw(
    curve: Curve, work: Path, solvers: Sequence[str], shard: Shard, executor: Executor | None = None
) -> dict[str, str]:
    """Solve this shard's patches, then draw its curves, each kept when it is done; what was refused, and why.

    `executor` says where, this process by default. Raises BudgetSpent when there is more to do than time.
    """
    assert curve.solving is not None
    bench, refused = curve.solving, dict[str, str]()
    one = {solver: replace(curve, solvers=solver, solving=None) for solver in solvers}
    wanted = shard.part([(solver, name) for solver in solvers for name in listed(curve.most)[: one[solver].far]])
    unsolved: list[tuple[bool, Job]] = []
    for solver, name in wanted:
        needs = one[solver].needs(name)
        if not bench.has(needs[-1]):
            unsolved.append(("+" in solver, Job(f"{solver}, {name}", solve_patch, (one[solver], name), needs)))
    for jobs in whole_first(unsolved):
        for index, _, error in carried_out(BenchReference(bench), jobs, executor, curve.budget):
            if error:
                refused[jobs[index].arguments[0].solvers] = error
    ways = [(solver, merges) for solver, merges in shard.part(parts(solvers)) if solver not in refused]
    return refused | _draw_curves(curve, work, ways, executor)


def solve_patch(bench: Solving, curve: Curve, name: str) -> None:
    """Solve for a concept by the solver whose turn it is, and keep the patch."""
    replace(curve, solving=bench).patch(curve.solvers, concept_of(name))


def drawn_curve(bench: Solving, curve: Curve) -> list[Measurement]:
    """What there is to measure of the solver whose turn it is."""
    whole = replace(curve, solving=bench)
    return whole.run(whole.context())


def _draw_curves(
    curve: Curve, work: Path, ways: Sequence[tuple[str, bool]], executor: Executor | None
) -> dict[str, str]:
    """Draw those of the curves (solver, whether merged) that are not kept; what was refused, and why."""
    assert curve.solving is not None
    files, jobs = list[KeptRows](), list[Job]()
    for solver, merges in ways:
        one = replace(curve, solvers=solver, merges=merges, solving=None)
        settings = Asked.parse(solver).settings
        about = {"most": curve.most, "pictures": curve.pictures, "drawn": curve.solving.drawn, "settings": settings}
        kept = KeptRows(_place(work, solver, merges), about)
        if kept.is_kept:
            continue
        first = replace(one, solvers="separable").needs(listed(curve.most)[0])
        needs = [one.needs(name)[-1] for name in listed(curve.most)[: one.far]]
        jobs.append(Job(f"curve of {solver}{', merged' if merges else ''}", drawn_curve, (one,), (*first, *needs)))
        files.append(kept)
    refused = {}
    for index, rows, error in carried_out(BenchReference(curve.solving), jobs, executor, curve.budget):
        if error:
            refused[jobs[index].arguments[0].solvers] = error
        else:
            files[index].keep(rows)
    return refused


def _place(work: Path, solver: str, merges: bool) -> Path:
    plain = re.sub(r"[^\w+-]+", "-", solver)  # not every file system takes a colon
    return work / "curves" / f"{plain}{'-merged' if merges else ''}.json"


def table(found: Mapping[str, Sequence[Measurement]]) -> list[list[str]]:
    """A row for each way and N: H_c, and the accuracies that it is made of."""
    metrics = ("H_c", "accuracy on erased", "accuracy on kept")
    numbers = {(row.subject, row.metric): row for rows in found.values() for row in rows}
    subjects = dict.fromkeys(subject for subject, metric in numbers if metric == "H_c")
    return [
        [subject, *(f"{numbers[subject, metric].value:.1%} of {numbers[subject, metric].n}" for metric in metrics)]
        for subject in subjects
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", default=",".join(SOLVERS), help="solvers, with commas between")
    parser.add_argument("--most", type=int, default=farthest(), help="the most concepts at once")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which nothing is begun; 0: no end")
    parser.add_argument(
        "--pictures",
        "--n",
        type=int,
        default=54,
        help="pictures of erased objects, and as many of kept ones, at every N",
    )
    parser.add_argument("--shard", default="0/1", help="which part of the work is done here, such as 0/2")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=WORK, help="patches, pictures and curves")
    add_on_option(parser)
    asked = parser.parse_args(argv)
    solving = Solving(asked.work, asked.device, asked.steps)
    curve = Curve(asked.most, "", "", asked.pictures, solving, budget=Budget(asked.budget))
    with working_on(asked.on) as executor:
        refused = draw(curve, asked.work, asked.only.split(","), Shard.parse(asked.shard), executor)
        for solver, why in refused.items():
            print(f"{solver}: {why}", file=sys.stderr)
    columns = ["way to compose", "H_c", "accuracy on erased", "accuracy on kept"]
    save(asked.json, show("Many concepts at once", columns, table(curves(asked.work))))


if __name__ == "__main__":
    # Workers import this module; what is defined in `__main__` they could not find.
    from benchmarks.composition import main as importable_main

    importable_main()
