"""RECE: erase, find the embeddings that still call the concept up, erase those (Gong et al., ECCV 2024, arXiv 2407.12383).

Starting from an edit W of all projections W0 that read the prompt, each round finds for every key c of the concept the
embedding that reproduces it best through the edited projections, in closed form:
`c' = (lambda I + sum_l W_l^T W_l)^-1 (sum_l W_l^T W0_l) c`, and then edits c' as UCE would (`uce.py`), on top of W.

Our formulation: as every edit is `W_l = W0_l T` with one T for all layers l, only `G = sum_l W0_l^T W0_l` is needed of the
weights, `c' = (lambda I + T^T G T)^-1 T^T G c`, and the result of all rounds is again a text map. The paper's lambda is on
the scale of G; here it is a share of G's mean eigenvalue. The start is UCE's edit, or this project's `separable`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from overpaint.patches.delta import TextMap
from overpaint.solvers.closed_form.edits import (
    ALL,
    LAST,
    POSITIONS,
    Diagnostics,
    KeyChoice,
    MapEdit,
    TextEdit,
    gram,
    least_squares,
    over_text_inputs,
    recovered,
    residual,
    revived,
    text_maps,
)
from overpaint.solvers.closed_form.separable import AS_OF_REVISION_2
from overpaint.solvers.closed_form.uce import UCE
from overpaint.solvers.problem import EditProblem, Solution, Solver, setting


@dataclass(frozen=True)
class RECE(Solver):
    """Erase, then erase in closed form what would still call the concept up; defaults are the paper's for objects."""

    PRESETS = {  # noqa: RUF012
        "emoji": {"start": "separable", "positions": "all", "spoken": True, "vocabulary": 1.0, "rank": 8},
    }

    is_closed_form = True
    revision = 2

    start: str = setting(
        "uce",
        "the first edit, as it is by default (`separable`: as it was in revision 2)",
        choices=("uce", "separable"),
    )
    rounds: int = setting(1, "adversarial rounds; the paper has 1 for objects, 2 and 3 for unsafe content", low=0)
    adversarial_ridge: float = setting(0.1, "lambda of the search for c', over the mean eigenvalue of G", low=1e-9)
    ridge: float = setting(0.1, "lambda of the edits that follow, on the scale of squared embeddings", low=0.0)
    preserve_scale: float = setting(0.1, "weight of everything preserved in the edits that follow", low=0.0)
    positions: str = setting(ALL, "keys: the last token of the concept, or all from its first on", choices=POSITIONS)
    spoken: bool = setting(False, "keys from sentences that name the concept, not from its bare words")
    vocabulary: float = setting(0.0, "weight of the tokenizer's vocabulary among what is preserved", low=0.0)
    keep: str = setting("", "further prompts to preserve, separated by ;")
    rank: int = setting(0, "most directions of each round to keep; 0: all", low=0)

    def solve(self, problem: EditProblem) -> Solution:
        """A text map: the start and one edit for each round."""
        started = time.perf_counter()
        start = self._first().solve(problem.within(0, len(problem.base.text_inputs)))
        first = {part.encoder: part for part in start.delta.text_maps}
        choice = KeyChoice(self.positions, self.spoken)
        edits, numbers = over_text_inputs(problem, choice, lambda edit: self._rounds(edit, first[edit.text_input]))
        return Solution(text_maps(edits), {**numbers, "seconds": time.perf_counter() - started}, start.record)

    def _first(self) -> Solver:
        if self.start == "separable":
            return AS_OF_REVISION_2
        # The paper's own start: last tokens, unless the caller asks otherwise for all rounds.
        positions = self.positions if self.spoken else LAST
        return UCE(
            positions=positions,
            spoken=self.spoken,
            vocabulary=self.vocabulary,
            keep=self.keep,
            rank=self.rank,
            ridge=0.1,
        )

    def _rounds(self, edit: TextEdit, start: TextMap) -> tuple[MapEdit, Diagnostics]:
        problem = edit.problem
        ((keys, values),) = edit.keys_and_values([problem.concept])
        g = gram((weight.cpu() for weight in edit.weights().values()), edit.encoder.width).to(problem.device)
        eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
        prompts = problem.preserved_prompts(self.keep)
        moment = self.preserve_scale * edit.preserved([problem.concept], prompts, self.vocabulary) + self.ridge * eye
        lam = self.adversarial_ridge * g.diagonal().mean() * eye
        change = MapEdit(start.up.to(g), start.down.to(g))
        before = recovered(change, g, lam, keys)
        for _ in range(self.rounds):
            rewordings = revived(change, g, lam, keys)
            change = change.then(least_squares(rewordings, values - rewordings, moment, self.rank)[0])
        after = {"recovered": recovered(change, g, lam, keys), "residual": residual(change, keys, values)}
        return change, {"recovered at the start": before, **after, "rank": change.up.shape[1]}
