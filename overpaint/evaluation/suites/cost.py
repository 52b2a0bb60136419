"""Cost: seconds, memory and bytes of every patch, and the seconds to add it to a live pipeline and to remove it.

The seconds of solving are those of the day on which the patch was solved. For memory, the first patch of each solver is
solved once more in a process of its own; what is counted is how far that process grew while it solved. What cannot be
solved again, an import for example, is counted as such. Nothing is judged.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import EvalContext, EvaluatedPatch
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.suites import Suite
from overpaint.patches.compose import compose
from overpaint.patches.patch import Patch


@dataclass(frozen=True)
class Cost(Suite):
    """How often composing and swapping are timed; the median counts."""

    repeats: int = 5

    def run(self, context: EvalContext) -> list[Measurement]:
        rows = []
        for patch in context.patches:
            subject = f"{patch.concept.name} ({patch.solver})"
            rows.append(Measurement(subject, "seconds to solve", patch.seconds, 1))
            rows.append(Measurement(subject, "bytes", float(patch.nbytes), 1))
            rows += self._swapped(context, patch, subject)
        together = float(sum(patch.nbytes for patch in context.patches))
        rows.append(Measurement("all patches", "bytes", together, len(context.patches)))
        seconds = [_timed(lambda: compose(context.base, context.terms())) for _ in range(self.repeats)]
        rows.append(Measurement("all patches", "seconds to compose", median(seconds), self.repeats))
        for solver, patch in {patch.solver: patch for patch in reversed(context.patches)}.items():
            try:
                rows.append(Measurement(solver, "peak memory of solving, MB", _peak_megabytes(context, patch), 1))
            except OverpaintError:  # imported, or of a solver or pictures that are not here
                such = sum(each.solver == solver for each in context.patches)
                rows.append(Measurement(solver, "patches that cannot be solved again here", float(such), such))
        return rows

    def _swapped(self, context: EvalContext, patch: EvaluatedPatch, subject: str) -> list[Measurement]:
        """Seconds to add one patch to a pipeline that carries the others, and to remove it again."""
        overlay = context.image_generator.overlay
        overlay.set(context.terms())
        removing, adding = [], []
        for _ in range(self.repeats):
            removing.append(_timed(lambda: overlay.remove(patch.term.id)))
            adding.append(_timed(lambda: overlay.add(patch.term)))
        return [
            Measurement(subject, "seconds to lay on", median(adding), self.repeats),
            Measurement(subject, "seconds to take off", median(removing), self.repeats),
        ]


def _timed(act: Any) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _peak_megabytes(context: EvalContext, patch: EvaluatedPatch) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_solve_again, context.base.path, patch.patch, str(context.device)).result()


def _solve_again(path: Path, patch: Patch, device: str) -> float:
    """Solve a patch again as its manifest says; how many megabytes the process grew by, at most, meanwhile.

    Raises OverpaintError where it cannot be solved from its manifest here.
    """
    import torch

    from overpaint.bases.base import Base
    from overpaint.solvers import solver_class
    from overpaint.solvers.problem import EditProblem

    made = patch.manifest["solver"]
    problem = EditProblem(
        Base.open(path),
        patch.concept,
        patch.universe,
        int(made.get("seed", 0)),
        torch.device(device),
        preserve_prompts=tuple(made.get("keep", ())),
    )
    try:
        method = solver_class(made["name"])(**made.get("settings", {}))
    except (KeyError, TypeError) as error:
        raise OverpaintError(f"the patch of {patch.concept.name!r} does not say how to solve it again") from error
    before = _peak()
    method.solve(problem)
    return _peak() - before


def _peak() -> float:
    """The most memory this process ever had, in MB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # What getrusage says on Linux begins with the memory of the process that started this one.
        (line,) = (line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) / 1e3
    try:
        import resource
    except ImportError as error:
        raise OverpaintError(
            "the memory of a process is not measured on this system; run the suite `cost` on Linux"
        ) from error
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
