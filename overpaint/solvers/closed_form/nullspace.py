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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overpaint.bases.text_encoder import AnyTextEncoder, PipelineTextInput
from overpaint.core.encoding import evenly_spaced
from overpaint.patches.arithmetic import above_rounding
from overpaint.patches.delta import LowRank
from overpaint.solvers.closed_form.edits import (
    ALL,
    LAST,
    POSITIONS,
    Diagnostics,
    KeyChoice,
    MapEdit,
    TextEdit,
    gram,
    over_text_inputs,
    projection_weights,
    residual,
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

    is_closed_form = True
    revision = 2

    projections: str = setting(
        "v", "what is edited: values (and pooled embeddings), or keys as well", choices=("v", "kv")
    )
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
    spoken: bool = setting(False, "keys from sentences that name the concept, not from its bare words")
    rank: int = setting(0, "most directions to keep; 0: all", low=0)

    def solve(self, problem: EditProblem) -> Solution:
        """A text map (`kv`), or low-rank factors of the value projections with one `down` for all (`v`).

        Raises Unsolvable when what is retained leaves no direction free.
        """
        started = time.perf_counter()
        choice = KeyChoice(self.positions, self.spoken)
        edits, numbers = over_text_inputs(problem, choice, self._edit)
        delta = _on_values(problem, edits) if self._edits_values(problem.base.projections()) else text_maps(edits)
        return Solution(delta, {**numbers, "seconds": time.perf_counter() - started})

    def _edit(self, edit: TextEdit) -> tuple[MapEdit, Diagnostics]:
        ((keys, values),) = edit.keys_and_values([edit.problem.concept])
        size = 1.0 if self.positions == ALL else keys.shape[1] ** 0.5
        keys, moves = keys / size, (values - keys) / size
        if not moves.abs().max() > 0:
            raise Unsolvable(
                "the text encoder gives the concept and its anchor the same embeddings; name another anchor"
            )
        edited = edit.weights()
        values_alone = self._edits_values(edited)
        weights = [weight.cpu() for name, weight in edited.items() if not (values_alone and _is_key(name))]
        g = gram(weights, edit.encoder.width).to(edit.problem.device)
        moment, share = self._moment(self._retained(edit), keys, moves, g)
        free = free_directions(moment, self.threshold)
        if not free.shape[1]:
            raise Unsolvable(
                f"what is retained uses all {len(moment)} text directions; raise threshold ({self.threshold:g}), or retain less"
            )
        down = _restricted(free, keys, self.retain, invariants(edit.encoder)) @ keys
        change = _shortened(MapEdit(moves, down), self.rank)
        numbers = {"free directions": free.shape[1], "retained share": share, "rank": change.up.shape[1]}
        return change, {**numbers, "residual": residual(change, keys, keys + moves)}

    def _edits_values(self, names: Iterable[str]) -> bool:
        """Whether all but key projections are edited; where no projection is one for keys or values, it is a text map."""
        return self.projections == "v" and any(".to_v." in name for name in names)

    def _retained(self, edit: TextEdit) -> Tensor:
        """Keys of the other concepts, of the vocabulary's words at equal distances and of preserved prompts, float64 [d, n]."""
        own = {word.casefold() for word in edit.problem.concept.words}
        texts = [*edit.problem.preserved_prompts(self.keep), *evenly_spaced(edit.encoder.words(), self.words)]
        texts = [text for text in texts if text.casefold() not in own]
        retained = [_prompt_keys(edit.encoder, texts[i : i + 256], self.positions) for i in range(0, len(texts), 256)]
        for keys, _ in edit.keys_and_values(edit.problem.others):
            retained.append(keys * (keys.shape[1] ** 0.5 if self.positions == ALL else 1.0))
        if not retained:
            raise Unsolvable("nothing is retained; name other concepts, preserve prompts, or set words above 0")
        return torch.cat(retained, 1)

    def _moment(self, retained: Tensor, keys: Tensor, moves: Tensor, g: Tensor) -> tuple[Tensor, float]:
        """The mean second moment of what is retained after refinement, and the share of it that stayed."""
        share = 1.0
        if self.refine:
            eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
            moved = moves @ torch.linalg.solve(keys @ keys.T + eye, keys).T @ retained
            disturbed = (moved * (g @ moved)).sum(0)
            stays = disturbed >= disturbed.mean()
            retained, share = retained[:, stays], float(stays.double().mean())
        moment = retained @ retained.T / retained.shape[1]
        weakest = torch.linalg.eigh(g).eigenvectors[:, 0]
        return moment + self.spread**2 * moment.trace() * torch.outer(weakest, weakest), share


def free_directions(moment: Tensor, threshold: float) -> Tensor:
    """An orthonormal basis, [d, q], of the eigenvectors below `threshold` times the mean eigenvalue."""
    size, vectors = torch.linalg.eigh(moment)
    free: Tensor = vectors[:, size < threshold * size.mean()]
    return free


def invariants(encoder: AnyTextEncoder, centres: int = 3) -> Tensor:
    """Begin-of-text, and centres of the empty prompt's padding (k-means, started at equal distances): float64 [d, n]."""
    empty = encoder.hidden([""])[0].double()
    if len(empty) <= centres + 1:
        return empty.T
    padding = empty[1:]
    means = padding[:: -(-len(padding) // centres)].clone()
    for _ in range(10):
        nearest = torch.cdist(padding, means).argmin(1)
        means = torch.stack([padding[nearest == i].mean(0) if (nearest == i).any() else c for i, c in enumerate(means)])
    return torch.cat([empty[:1], means]).T


def _restricted(free: Tensor, keys: Tensor, retain: float, held: Tensor) -> Tensor:
    """`S - S C2 (C2^T S C2)^-1 C2^T S` with `S = P (C1 C1^T P + r I)^-1`, [d, d]."""
    inside = free.T @ keys
    s = free @ torch.linalg.solve(
        inside @ inside.T + retain * torch.eye(free.shape[1], dtype=free.dtype, device=free.device), free.T
    )
    # What is held may lie in the retained directions already, where S is zero: hence the pseudo-inverse.
    projector: Tensor = s - s @ held @ torch.linalg.pinv(held.T @ s @ held, rtol=1e-9, hermitian=True) @ held.T @ s
    return projector


def _shortened(edit: MapEdit, rank: int) -> MapEdit:
    """The best edit of at most `rank` directions (0: the exact one, without directions that are rounding alone)."""
    left, size, right = torch.linalg.svd(edit.up @ edit.down.T, full_matrices=False)
    count = above_rounding(size)
    count = max(1, min(count, rank or count))
    return MapEdit(left[:, :count] * size[:count], right[:count].T.contiguous())


def _prompt_keys(encoder: AnyTextEncoder, prompts: Sequence[str], positions: str) -> Tensor:
    """Keys of whole prompts: their last tokens, or everything after begin-of-text, float64 [d, n]."""
    if isinstance(encoder, PipelineTextInput):
        if positions == ALL:
            return torch.cat(encoder.hidden(prompts)).double().T
        return encoder.last_keys_and_values([(prompt, "") for prompt in prompts])[0]
    if positions == ALL and not encoder.is_pooled:
        return encoder.hidden(prompts)[:, 1:].reshape(-1, encoder.width).double().T
    last = [0 if encoder.is_pooled else min(len(encoder.tokens(prompt)), encoder.length - 1) for prompt in prompts]
    hidden = encoder.hidden(prompts, max(last) + 1).double()
    return torch.stack([rows[position] for rows, position in zip(hidden, last, strict=True)], 1)


def _is_key(name: str) -> bool:
    """Whether a projection makes keys, which are not edited where values alone are."""
    return ".to_k." in name


def _on_values(problem: EditProblem, edits: dict[str, MapEdit]) -> LowRank:
    """The edits of all text inputs as factors of the value projections."""
    ups: dict[str, list[Tensor]] = {}
    downs: dict[str, list[Tensor]] = {}
    for text_input, edit in edits.items():
        for name, weight in projection_weights(problem.base, text_input, edit.up.device).items():
            if not _is_key(name):
                down = edit.up.new_zeros(edit.up.shape[1], problem.base.places[name].shape[1])
                down[:, problem.base.columns(text_input, name)] = edit.down.T
                ups.setdefault(name, []).append(weight @ edit.up)
                downs.setdefault(name, []).append(down)
    return LowRank({n: (torch.cat(u, 1).float().cpu(), torch.cat(downs[n]).float().cpu()) for n, u in ups.items()})
