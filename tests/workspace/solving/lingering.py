"""A solver for a process that is to be interrupted: it lingers over the second concept, the first time it is asked."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from overpaint.solvers.problem import EditProblem, Solution, Solver
from tests.workspace.solving.fakes import Counting


@dataclass(frozen=True)
class Lingering(Solver):
    """The marker file that the environment names says that it has begun to linger."""

    def solve(self, problem: EditProblem) -> Solution:
        marker = Path(os.environ["LINGERING"])
        if problem.concept.name == "dog" and not marker.exists():
            marker.touch()
            for step in range(6000):
                problem.report(step, 6000, "lingering")
                time.sleep(0.02)
        return Counting().solve(problem)
