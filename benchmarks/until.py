"""When to stop: for training solvers, what is still seen and what is left at several values of `until`.

`until` stops a solver when so much of the concept's guidance is left, which every base can say of itself, rather than after a
number of steps that suits one base. Each solver runs with its preset `emoji`, at most `--longest` times the preset's steps, and
stops at each value in turn; 1 is the preset as it is. Tune on one base, and look at another one untouched: `--base FOLDER` is any
base with the embedded one's words and a judge, such as the one that came with 0.1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cells import Budget, BudgetSpent
from benchmarks.protocol import OBJECTS, concept_of, listed, never_listed, tuned, universe
from benchmarks.solvers import WORK, Asked, Bench
from benchmarks.tables import arguments, save, show
from overpaint.evaluation.metrics import Score
from overpaint.evaluation.prompts import OBJECT
from overpaint.patches.compose import Term
from overpaint.solvers import solver_class
from overpaint.solvers.problem import configure

SOLVERS = ("few_shot", "few_shot_lora", "ablation", "sdd", "spm", "esd", "surgical")
VALUES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.0, -0.2)
COLUMNS = (
    "solver",
    "until",
    "concept",
    "steps",
    "left",
    "seconds",
    "still seen",
    "of the base",
    "others",
    "of the base",
)


@dataclass(frozen=True)
class Stop:
    """A solver with a value of `until`, and the settings that follow from it."""

    solver: str
    until: float
    longest: float = 4.0

    @property
    def text(self) -> str:
        """The solver as `--solver` takes it."""
        if self.until >= 1:
            return self.solver
        steps = configure(solver_class(self.solver), tuned(self.solver)).steps
        return f"{self.solver}:until={self.until:g},momentum=0.7,steps={round(self.longest * steps)}"


def measured(bench: Bench, stop: Stop, name: str, n: int) -> list[object]:
    """A row of the table: the concept erased, `n` pictures of it and of others judged."""
    asked = Asked.parse(stop.text)
    patch, costs = bench.solved(asked, concept_of(name), universe(asked.name))
    known = bench.judge.heads[OBJECT]
    others = [other for other in (*never_listed(), *listed()) if other in known and other != name]
    own = bench.prompt_set.prompts(OBJECT, name, n)
    rest = [question for other in others[:n] for question in bench.prompt_set.prompts(OBJECT, other, 1)]
    groups = {"own": own, "others": rest}
    before, after = (bench.verdicts(terms, groups) for terms in ((), [Term(patch.id, patch.delta)]))
    shares = [
        str(Score(sum(v.right for v in side[group]), len(side[group]))) for group in groups for side in (after, before)
    ]
    left = costs.found.get("left")
    return [stop.solver, stop.until, name, costs.found.get("steps"), left, costs.seconds, *shares]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", default=",".join(SOLVERS), help="solvers, with commas between")
    parser.add_argument("--values", type=float, nargs="+", default=list(VALUES), help="values of until")
    parser.add_argument("--concepts", nargs="+", default=list(OBJECTS[:2]))
    parser.add_argument("--longest", type=float, default=4.0, help="times the preset's steps")
    parser.add_argument("--n", type=int, default=12, help="pictures of the concept, and of others")
    parser.add_argument("--base", default="emoji", help="a folder, or the embedded base")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which nothing is begun; 0: no end")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=WORK, help="patches and pictures")
    asked = parser.parse_args(argv)
    bench, budget, rows = Bench(asked.work, asked.device, asked.steps, asked.base), Budget(asked.budget), []
    try:
        for solver in asked.only.split(","):
            for value in asked.values:
                for name in asked.concepts:
                    budget.check()
                    rows.append(measured(bench, Stop(solver, value, asked.longest), name, asked.n))
    except BudgetSpent as error:
        print(error, file=sys.stderr)
    save(asked.json, show("When to stop", COLUMNS, rows))


if __name__ == "__main__":
    main()
