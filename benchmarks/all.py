"""Every published table from one run: `python -m benchmarks.all --budget 3600`, again and again until nothing is left.

It measures the table of solvers, the curve over N, the claims of the abstracts and the suites, in this order, on whatever
embedded base is there, with `--n` pictures in every cell. Everything is kept as it is found: a run that is killed, or whose
`--budget` is spent, goes on where it was. `--shard 0/2` and `--shard 1/2` share the work between two processes, and `--on ray`
shares it out on a Ray cluster. `--only` names parts of it. `--page` runs nothing and writes `docs/solvers.md`,
`docs/choosing-a-solver.md` and `docs/results.md` from what is there.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import claims, composition, evaluation, solvers
from benchmarks.cells import Budget, add_on_option
from benchmarks.tables import arguments
from overpaint.solvers import SOLVERS

ROOT = Path(__file__).parent.parent
FEW_SHOT_LORA = tuple(f"few_shot_lora:pictures={count}" for count in (4, 5))
"""The paper's numbers of pictures."""
SHARED = ("solvers", "composition", "claims")
"""Parts that share one work folder, which holds patches and pictures."""


def part(asked: Namespace, name: str, seconds: float) -> None:
    """Run one part of the work for at most so many seconds; 0 is no end."""
    every = ["--n", str(asked.n), "--shard", asked.shard, "--budget", str(seconds), "--steps", str(asked.steps)]
    every += [
        "--on",
        asked.on,
        "--device",
        asked.device,
        "--work",
        str(asked.work / ("solvers" if name in SHARED else name)),
    ]
    if name == "solvers":
        for solver in (*SOLVERS, *FEW_SHOT_LORA):
            every += ["--solver", solver]
    PARTS[name](every)


PARTS: dict[str, Callable[[Sequence[str]], None]] = {
    "solvers": solvers.main,
    "composition": composition.main,
    "claims": claims.main,
    "evaluation": evaluation.main,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--n", type=int, default=100, help="pictures in every cell")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which nothing is begun; 0: no end")
    parser.add_argument("--shard", default="0/1", help="which part of the work is done here, such as 0/2")
    add_on_option(parser)
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="what is kept")
    parser.add_argument("--page", action="store_true", help="run nothing; write the pages from what is there")
    asked = parser.parse_args(argv)
    if asked.page:
        solvers.main(["--page", "--work", str(asked.work / "solvers")])
        evaluation.main(["--pages", "--work", str(asked.work / "evaluation")])
        return
    budget = Budget(asked.budget)
    for name in asked.only.split(","):
        if budget.is_spent:
            print(f"{asked.budget:g} seconds are over before {name}; run the same again", file=sys.stderr)
            return
        left = max(1.0, budget.left) if asked.budget else 0.0
        part(asked, name, left)


if __name__ == "__main__":
    main()
