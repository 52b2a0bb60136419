"""Null-space editing (after SPEED, Li et al., ICLR 2026, arXiv 2503.07392, our formulation).

Minimise `|(W0 + D) C1 - W0 C*|^2 + |D|^2` over changes D that live in the null space of what is retained, `D = D P`, and
leave invariants alone, `D C2 = 0`. With P the projector on the weak directions (below a threshold) of the retained second
moment and `S = P (C1 C1^T P + r I)^-1`, the minimiser is
`D = W0 (C* - C1) C1^T [S - S C2 (C2^T S C2)^-1 C2^T S]`: W0 times one matrix for all layers, of as many directions as keys.
C1 and C* are the concept's keys and targets, C2 begin-of-text and three centres of the empty prompt's padding.

Prior refinement keeps in the retained set only what an edit without it would disturb more than the average; more is made by
moving each of these along the direction that the projections read least. The paper does both layer by layer, which gives every
layer a projector of its own; here `sum_l |W_l x|^2` over all layers decides, so that the edit stays one map, and the moves
are taken in expectation rather than drawn. The threshold is relative to the mean eigenvalue (of CLIP's about 1).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overpaint.bases.text_encoder import TextEncoder
from overpaint.patches.delta import LowRank
from overpaint.solvers.closed_form.edits import (
    ALL,
    LAST,
    POSITIONS,
    Diagnostics,
    MapEdit,
    arrived,
    asked_about,
    gram,
    over_text_inputs,
    projection_weights,
    text_maps,
)
from overpaint.solvers.problem import EditProblem, Solution, Solver, Unsolvable, setting


@dataclass(frozen=True)
class NullSpace(Solver):
    """Edit only in the directions that nothing retained uses; defaults are the paper's for few concepts."""

    PRESETS = {  # noqa: RUF012
        "emoji": {
            "projections": "kv",
            "spoken": True,
            "positions": ALL,
            "threshold": 1.0,
            "retain": 0.01,
            "rank": 16,
        }
    }

    projections: str = setting("v", "what is edited: values, or keys and values", choices=("v", "kv"))
    threshold: float = setting(
        0.1, "directions in which the retained keys are weaker than this share of the average are free", low=1e-12
    )
    retain: float = setting(1.0, "r, how much a large change costs", low=1e-9)
    words: int = setting(1000, "words of the tokenizer's vocabulary among what may be retained; 0: none", low=0)
    keep: str = setting("", "further words to retain, separated by ;")
    refine: bool = setting(True, "retain only what an unrestricted edit disturbs more than the average")
    spread: float = setting(
        0.1, "size of the moves of retained keys where projections read least, over the keys'", low=0.0
    )
    positions: str = setting(LAST, "keys: the last token of the concept, or all from its first on", choices=POSITIONS)
    spoken: bool = setting(False, "ask about the concept in sentences, not by its bare words")
    rank: int = setting(0, "most directions to keep; 0: all", low=0)

    def solve(self, problem: EditProblem) -> Solution:
        """A text map (`kv`), or low-rank factors of the value projections with one `down` for all (`v`).

        Raises Unsolvable when what is retained leaves no direction free.
        """
        started = time.perf_counter()
        edits, found = over_text_inputs(problem, lambda text_input, encoder: self._edit(problem, text_input, encoder))
        delta = text_maps(edits) if self.projections == "kv" else _on_values(problem, edits)
        return Solution(delta, {**found, "seconds": time.perf_counter() - started})

    def _edit(self, problem: EditProblem, text_input: str, encoder: TextEncoder) -> tuple[MapEdit, Diagnostics]:
        ((keys, values),) = asked_about(problem, text_input, encoder, [problem.concept], self.positions, self.spoken)
        size = 1.0 if self.positions == ALL else keys.shape[1] ** 0.5
        keys, ways = keys / size, (values - keys) / size
        if not ways.abs().max() > 0:
            raise Unsolvable("the text encoder says the same of the concept and of its anchor; name another anchor")
        chosen = [
            w
            for name, w in projection_weights(problem.base, text_input, problem.device).items()
            if self._is_edited(name)
        ]
        g = gram((w.cpu() for w in chosen), encoder.width).to(problem.device)
        retained = self._retained(problem, text_input, encoder)
        moment, share = self._moment(retained, keys, ways, g)
        free = free_directions(moment, self.threshold)
        if not free.shape[1]:
            raise Unsolvable(
                f"what is retained uses all {len(moment)} text directions; raise threshold ({self.threshold:g}), or retain less"
            )
        down = _restricted(free, keys, self.retain, invariants(encoder)) @ keys
        edit = _shortened(MapEdit(ways, down), self.rank)
        numbers = {"free directions": free.shape[1], "retained share": share, "rank": edit.up.shape[1]}
        return edit, {**numbers, "residual": arrived(edit, keys, keys + ways)}

    def _is_edited(self, name: str) -> bool:
        return self.projections == "kv" or ".to_v." in name

    def _retained(self, problem: EditProblem, text_input: str, encoder: TextEncoder) -> Tensor:
        """Keys of the other concepts, of the vocabulary's words at equal distances and of kept words, float64 [d, n]."""
        concept, known = problem.concept, encoder.words()
        count = min(self.words, len(known))
        phrases = {word.casefold() for word in concept.words}
        words = [known[i * len(known) // count] for i in range(count)]
        kept = [word.strip() for word in self.keep.split(";") if word.strip()]
        asked = [word for word in (*sorted(kept), *words) if word.casefold() not in phrases]
        found = [_words_keys(encoder, asked[i : i + 256], self.positions) for i in range(0, len(asked), 256)]
        others = problem.others
        for keys, _ in asked_about(problem, text_input, encoder, others, self.positions, self.spoken) if others else ():
            found.append(keys * (keys.shape[1] ** 0.5 if self.positions == ALL else 1.0))
        if not found:
            raise Unsolvable("nothing is retained; name other concepts, keep words, or set words above 0")
        return torch.cat(found, 1)

    def _moment(self, retained: Tensor, keys: Tensor, ways: Tensor, g: Tensor) -> tuple[Tensor, float]:
        """The mean second moment of what is retained after refinement, and the share of it that stayed."""
        share = 1.0
        if self.refine:
            eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
            moved = ways @ torch.linalg.solve(keys @ keys.T + eye, keys).T @ retained
            disturbed = (moved * (g @ moved)).sum(0)
            stays = disturbed >= disturbed.mean()
            retained, share = retained[:, stays], float(stays.double().mean())
        moment = retained @ retained.T / retained.shape[1]
        weakest = torch.linalg.eigh(g).eigenvectors[:, 0]
        return moment + self.spread**2 * moment.trace() * torch.outer(weakest, weakest), share


def free_directions(moment: Tensor, threshold: float) -> Tensor:
    """An orthonormal basis, [d, q], of the eigenvectors below `threshold` times the mean eigenvalue."""
    size, vectors = torch.linalg.eigh(moment)
    found: Tensor = vectors[:, size < threshold * size.mean()]
    return found


def invariants(encoder: TextEncoder, centres: int = 3) -> Tensor:
    """Begin-of-text, and centres of the empty prompt's padding (k-means, started at equal distances): float64 [d, n]."""
    empty = encoder.hidden([""])[0].double()
    if len(empty) <= centres + 1:
        return empty.T
    padding = empty[1:]
    found = padding[:: -(-len(padding) // centres)].clone()
    for _ in range(10):
        nearest = torch.cdist(padding, found).argmin(1)
        found = torch.stack([padding[nearest == i].mean(0) if (nearest == i).any() else c for i, c in enumerate(found)])
    return torch.cat([empty[:1], found]).T


def _restricted(free: Tensor, keys: Tensor, retain: float, held: Tensor) -> Tensor:
    """`S - S C2 (C2^T S C2)^-1 C2^T S` with `S = P (C1 C1^T P + r I)^-1`, [d, d]."""
    inside = free.T @ keys
    s = free @ torch.linalg.solve(
        inside @ inside.T + retain * torch.eye(free.shape[1], dtype=free.dtype, device=free.device), free.T
    )
    # What is held may lie in the retained directions already, where S is zero: hence the pseudo-inverse.
    found: Tensor = s - s @ held @ torch.linalg.pinv(held.T @ s @ held, rtol=1e-9, hermitian=True) @ held.T @ s
    return found


def _shortened(edit: MapEdit, rank: int) -> MapEdit:
    """The best edit of at most `rank` directions (0: the exact one, without directions that are rounding alone)."""
    left, size, right = torch.linalg.svd(edit.up @ edit.down.T, full_matrices=False)
    count = int((size > size[0] * len(size) * torch.finfo(size.dtype).eps).sum())
    count = max(1, min(count, rank or count))
    return MapEdit(left[:, :count] * size[:count], right[:count].T.contiguous())


def _words_keys(encoder: TextEncoder, words: Sequence[str], positions: str) -> Tensor:
    """Keys of bare words: their last tokens, or everything from their first token on, float64 [d, n]."""
    hidden = encoder.hidden(words).double()
    if encoder.is_pooled:
        return hidden[:, 0].T
    if positions == ALL:
        return hidden[:, 1:].reshape(-1, encoder.width).T
    return torch.stack([rows[len(encoder.tokens(word))] for rows, word in zip(hidden, words, strict=True)], 1)


def _on_values(problem: EditProblem, edits: dict[str, MapEdit]) -> LowRank:
    """The edits of all doors as factors of the value projections."""
    ups: dict[str, list[Tensor]] = {}
    downs: dict[str, list[Tensor]] = {}
    for text_input, edit in edits.items():
        for name, weight in projection_weights(problem.base, text_input, edit.up.device).items():
            if ".to_v." in name:
                down = edit.up.new_zeros(edit.up.shape[1], problem.base.places[name].shape[1])
                down[:, problem.base.columns(text_input, name)] = edit.down.T
                ups.setdefault(name, []).append(weight @ edit.up)
                downs.setdefault(name, []).append(down)
    return LowRank({n: (torch.cat(u, 1).float().cpu(), torch.cat(downs[n]).float().cpu()) for n, u in ups.items()})
