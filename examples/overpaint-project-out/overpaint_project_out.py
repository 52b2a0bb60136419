"""Project the direction that tells a concept from its absence out of everything the U-Net reads.

With u the unit vector along the mean of `K - V`, the concept's embeddings less those of the same sentences without it, every
projection W that reads the prompt becomes `W (I - share u u^T)`. One direction, no preservation: quick, and blunt.
"""

from __future__ import annotations

from dataclasses import dataclass

from overpaint.bases.text_encoder import TextEncoder
from overpaint.patches.delta import TextMap
from overpaint.solvers.problem import EditProblem, Solution, Solver, Unsolvable, setting
from overpaint.solvers.sentences import keys_and_values


@dataclass(frozen=True)
class ProjectOut(Solver):
    """Project a concept's direction out of the prompt."""

    is_closed_form = True
    uses_universe = False
    uses_preserved_prompts = False

    share: float = setting(1.0, "how much of the direction goes; 1: all of it", low=0.0, high=2.0)

    def solve(self, problem: EditProblem) -> Solution:
        """A text map of one direction. Raises Unsolvable when the concept and its anchor are the same to the text encoder."""
        problem.report(0, 1, "encoding the concept")
        encoder = TextEncoder.of(problem.base, problem.device)
        keys, values = keys_and_values(encoder, problem.base, problem.concept)
        direction = (keys - values).sum(1, keepdim=True)
        if not direction.norm() > 0:
            raise Unsolvable(f"{problem.concept.name!r} and its anchor are the same to the text encoder; name another")
        unit = (direction / direction.norm()).float().cpu()
        return Solution(TextMap("text_encoder", -self.share * unit, unit), {"rank": 1})
