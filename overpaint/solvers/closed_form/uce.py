"""UCE, unified concept editing, and RECE, rounds of it: a concept is erased, then the embeddings that still call it up."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from overpaint.core.concepts import Concept
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
from overpaint.solvers.problem import EditProblem, Solution, Solver, Unsolvable, setting
from overpaint.solvers.universe import vocabulary_record


@dataclass(frozen=True)
class UCE(Solver):
    """Move a concept's embeddings to its anchor's in closed form, and hold what is listed; defaults are the paper's.

    Gandikota et al., WACV 2024, arXiv 2308.14761, eq. 7. For every projection W0 that reads the prompt, minimise
    `a_e sum_{i erased} |W K_i - W0 V_i|^2 + a_p sum_{j preserved} |W K_j - W0 K_j|^2 + lambda |W - W0|^2`. The minimiser is
    `W = W0 [lambda I + a_e sum V_i K_i^T + a_p sum K_j K_j^T] [lambda I + a_e sum K_i K_i^T + a_p sum K_j K_j^T]^-1`.

    The bracket does not depend on W0, so the edit of all layers is one text map, `T = I + a_e sum (V_i - K_i) K_i^T A^-1`, of as
    many directions as there are keys; a test compares it with the formula above for every projection. As published, a concept's
    key is its last token in the bare name; `positions=all` and `spoken=true` ask about sentences and their padding, and
    `vocabulary` preserves the tokenizer's words.
    """

    PRESETS = {  # noqa: RUF012
        "emoji": {
            "erase_scale": 10.0,
            "positions": "all",
            "spoken": True,
            "vocabulary": 0.1,
            "ridge": 0.01,
            "rank": 8,
        },
    }

    is_closed_form = True
    revision = 2

    erase_scale: float = setting(1.0, "a_e, weight of the erased concepts' keys", low=0.0)
    preserve_scale: float = setting(1.0, "a_p, weight of everything preserved", low=0.0)
    ridge: float = setting(0.5, "lambda, on the scale of squared embeddings", low=0.0)
    positions: str = setting(LAST, "keys: the last token of the concept, or all from its first on", choices=POSITIONS)
    spoken: bool = setting(False, "keys from sentences that name the concept, not from its bare words")
    vocabulary: float = setting(0.0, "weight of the tokenizer's vocabulary among what is preserved", low=0.0)
    keep: str = setting("", "further prompts to preserve, separated by ;")
    rank: int = setting(0, "most directions to keep; 0: all, which is exact", low=0)

    @property
    def uses_universe(self) -> bool:
        return self.preserve_scale > 0

    @property
    def uses_preserved_prompts(self) -> bool:
        return self.preserve_scale > 0

    def solve(self, problem: EditProblem) -> Solution:
        """A text map for one concept, the universe preserved."""
        return self.joint(problem, [problem.concept])

    def joint(self, problem: EditProblem, concepts: Iterable[Concept]) -> Solution:
        """One text map that erases all of `concepts` (in any order) together, the rest of the universe preserved.

        Raises Unsolvable without concepts, and for a concept that has the embeddings of its anchor.
        """
        started = time.perf_counter()
        erased = sorted(concepts, key=lambda concept: concept.name)
        if not erased:
            raise Unsolvable("there is nothing to erase; name at least one concept")
        choice = KeyChoice(self.positions, self.spoken)
        edits, numbers = over_text_inputs(problem, choice, lambda edit: self.edit(edit, erased))
        record = vocabulary_record(problem.base, problem.device) if self.vocabulary else {}
        return Solution(text_maps(edits), {**numbers, "seconds": time.perf_counter() - started}, record)

    def edit(self, edit: TextEdit, erased: Sequence[Concept]) -> tuple[MapEdit, Diagnostics]:
        """The edit of everything that reads one text input."""
        keys, values = (torch.cat(half, 1) for half in zip(*edit.keys_and_values(erased), strict=True))
        prompts = edit.problem.preserved_prompts(self.keep)
        moment = self.preserve_scale * edit.preserved(erased, prompts, self.vocabulary)
        moment += self.ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        weight = self.erase_scale**0.5
        change, condition = least_squares(weight * keys, weight * (values - keys), moment, self.rank)
        return change, {"rank": change.up.shape[1], "residual": residual(change, keys, values), "condition": condition}


@dataclass(frozen=True)
class RECE(Solver):
    """Erase, then erase in closed form what would still call the concept up; defaults are the paper's for objects.

    Gong et al., ECCV 2024, arXiv 2407.12383. Starting from an edit W of all projections W0 that read the prompt, each round finds
    for every key c of the concept the embedding that reproduces it best through the edited projections, in closed form:
    `c' = (lambda I + sum_l W_l^T W_l)^-1 (sum_l W_l^T W0_l) c`, and then edits c' as UCE would, on top of W.

    Our formulation: as every edit is `W_l = W0_l T` with one T for all layers l, only `G = sum_l W0_l^T W0_l` is needed of the
    weights, `c' = (lambda I + T^T G T)^-1 T^T G c`, and the result of all rounds is again a text map. The paper's lambda is on
    the scale of G; here it is a share of G's mean eigenvalue. The start is UCE's edit, or this project's `separable`.
    """

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
