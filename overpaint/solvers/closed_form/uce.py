"""UCE: unified concept editing (Gandikota et al., WACV 2024, arXiv 2308.14761, eq. 7).

For every projection W0 that reads the prompt, minimise
`a_e sum_{i erased} |W K_i - W0 V_i|^2 + a_p sum_{j preserved} |W K_j - W0 K_j|^2 + lambda |W - W0|^2`. The minimiser is
`W = W0 [lambda I + a_e sum V_i K_i^T + a_p sum K_j K_j^T] [lambda I + a_e sum K_i K_i^T + a_p sum K_j K_j^T]^-1`.

The bracket does not depend on W0, so the edit of all layers is one text map, `T = I + a_e sum (V_i - K_i) K_i^T A^-1`, of as
many directions as there are keys; a test compares it with the formula above for every projection. As published, a concept's
key is its last token in the bare name; `positions=all` and `spoken=true` ask about sentences and their padding, and
`vocabulary` preserves the tokenizer's words.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.solvers.closed_form.edits import (
    LAST,
    POSITIONS,
    Diagnostics,
    MapEdit,
    PreservationSet,
    arrived,
    asked_about,
    least_squares,
    over_text_inputs,
    preserved,
    text_maps,
)
from overpaint.solvers.problem import EditProblem, Solution, Solver, Unsolvable, setting


@dataclass(frozen=True)
class UCE(Solver):
    """Move a concept's embeddings to its anchor's in closed form, and hold what is listed; defaults are the paper's."""

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

    erase_scale: float = setting(1.0, "a_e, weight of the erased concepts' keys", low=0.0)
    preserve_scale: float = setting(1.0, "a_p, weight of everything preserved", low=0.0)
    ridge: float = setting(0.5, "lambda, on the scale of squared embeddings", low=0.0)
    positions: str = setting(LAST, "keys: the last token of the concept, or all from its first on", choices=POSITIONS)
    spoken: bool = setting(False, "ask about the concept in sentences, not by its bare words")
    vocabulary: float = setting(0.0, "weight of the tokenizer's vocabulary among what is preserved", low=0.0)
    keep: str = setting("", "further prompts to preserve, separated by ;")
    rank: int = setting(0, "most directions to keep; 0: all, which is exact", low=0)

    def solve(self, problem: EditProblem) -> Solution:
        """A text map for one concept, the universe preserved."""
        return self.joint(problem, [problem.concept])

    def joint(self, problem: EditProblem, concepts: Iterable[Concept]) -> Solution:
        """One text map that erases all of `concepts` (in any order) together, the rest of the universe preserved.

        Raises Unsolvable when nothing is asked for, or a concept is its own anchor to the text encoder.
        """
        started = time.perf_counter()
        erased = sorted(concepts, key=lambda concept: concept.name)
        if not erased:
            raise Unsolvable("there is nothing to erase; name at least one concept")
        edits, found = over_text_inputs(
            problem, lambda text_input, encoder: self.edit(problem, erased, text_input, encoder)
        )
        return Solution(text_maps(edits), {**found, "seconds": time.perf_counter() - started})

    def edit(
        self, problem: EditProblem, erased: Sequence[Concept], text_input: str, encoder: TextEncoder
    ) -> tuple[MapEdit, Diagnostics]:
        """The edit of everything that reads one door."""
        asked = asked_about(problem, text_input, encoder, erased, self.positions, self.spoken)
        keys, values = (torch.cat(half, 1) for half in zip(*asked, strict=True))
        kept = PreservationSet.of(self.keep, self.vocabulary)
        moment = self.preserve_scale * preserved(
            problem, text_input, encoder, erased, kept, self.positions, self.spoken
        )
        moment += self.ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        weight = self.erase_scale**0.5
        edit, condition = least_squares(weight * keys, weight * (values - keys), moment, self.rank)
        return edit, {"rank": edit.up.shape[1], "residual": arrived(edit, keys, values), "condition": condition}
