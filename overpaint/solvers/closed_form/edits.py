"""What closed-form edits share: a concept's keys and values, what is preserved, and an edit as two thin factors.

All of them change every projection W that reads the prompt into `W T` with one `T = I + up down^T`, so that the whole edit is a
text map. Everything is float64 and rounded once, when the text map is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import AnyTextEncoder, PipelineTextInput
from overpaint.core.concepts import Concept
from overpaint.patches.arithmetic import above_rounding
from overpaint.patches.delta import Delta, TextMap
from overpaint.solvers.problem import EditProblem, Unsolvable, within_memory
from overpaint.solvers.sentences import keys_and_values, keys_of_prompts, phrasings
from overpaint.solvers.universe import PreservedPrompts, Universe, text_encoders, universe

LAST, ALL = "last", "all"
POSITIONS = (LAST, ALL)
"""Which tokens are keys: the last one of the concept's words, as most papers have it, or all from its first one on, with
weights that make one concept count 1 (`sentences.py`)."""


@dataclass(frozen=True, eq=False)
class MapEdit:
    """`T = I + up down^T`, factors float64 [d, k]."""

    up: Tensor
    down: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Where T sends embeddings, [d, n]."""
        return embeddings + self.up @ (self.down.T @ embeddings)

    def then(self, later: MapEdit) -> MapEdit:
        """The edit of an already edited projection: `W T` becomes `W T T'`."""
        up = later.up + self.up @ (self.down.T @ later.up)
        return MapEdit(torch.cat([self.up, up], 1), torch.cat([self.down, later.down], 1))

    def text_map(self, text_input: str) -> TextMap:
        """This edit as a delta, float32."""
        return TextMap(text_input, self.up.float().cpu().contiguous(), self.down.float().cpu().contiguous())


@dataclass(frozen=True)
class KeyChoice:
    """Which embeddings of a concept are its keys.

    `positions`: the last token of its words, or everything from its first token on. `in_sentences`: in the sentences for its
    kind rather than by its bare words.
    """

    positions: str = LAST
    in_sentences: bool = False

    @property
    def is_universal(self) -> bool:
        """Whether these are the keys that a universe has, which keeps them."""
        return self.positions == ALL and self.in_sentences

    def keys_and_values(self, encoder: AnyTextEncoder, base: Base, concept: Concept) -> tuple[Tensor, Tensor]:
        """K and V of a concept, float64 [d, m] each, on the encoder's device.

        For the last token, V is the anchor's last token in the same sentence; without an anchor, the token that stands before
        the concept once it is left out (of a bare name, begin-of-text).
        """
        if self.is_universal:
            return keys_and_values(encoder, base, concept)
        every = phrasings(base, concept, bare=not self.in_sentences)
        starts = [encoder.first_position(each.template, each.word) for each in every]
        if isinstance(encoder, PipelineTextInput):
            pairs = [(each.prompt, each.replacement) for each in every]
            if self.positions == LAST:
                return encoder.last_keys_and_values(pairs)
            keys, values = encoder.keys_and_values(pairs, math.inf)
            return keys / len(pairs) ** 0.5, values / len(pairs) ** 0.5
        keys = encoder.hidden([each.prompt for each in every]).double()
        values = encoder.hidden([each.replacement for each in every]).double()
        if self.positions == ALL:
            weight = sum(keys.shape[1] - start for start in starts) ** -0.5
            k, v = (torch.cat([rows[start:] for rows, start in zip(h, starts, strict=True)]) for h in (keys, values))
            return weight * k.T, weight * v.T
        if encoder.is_pooled:
            return keys[:, 0].T, values[:, 0].T
        lengths = [len(encoder.tokens(each.word)) for each in every]
        own = [rows[start + n - 1] for rows, start, n in zip(keys, starts, lengths, strict=True)]
        anchor = len(encoder.tokens(concept.anchor)) if concept.anchor else 0
        targets = [rows[start + anchor - 1] for rows, start in zip(values, starts, strict=True)]
        return torch.stack(own, 1), torch.stack(targets, 1)


@dataclass(frozen=True)
class TextEdit:
    """One text input of a problem, and what an edit of it asks for: keys to move, and keys to preserve."""

    problem: EditProblem
    text_input: str
    encoder: AnyTextEncoder
    choice: KeyChoice

    def keys_and_values(self, concepts: Sequence[Concept]) -> list[tuple[Tensor, Tensor]]:
        """K and V of each concept; those that a universe has too come from there."""
        if self.choice.is_universal and concepts:
            known = self._universe(concepts)
            return [(known.keys[c.name].double(), known.values[c.name].double()) for c in concepts]
        return [self.choice.keys_and_values(self.encoder, self.problem.base, concept) for concept in concepts]

    def preserved(self, erased: Sequence[Concept], prompts: Sequence[str], vocabulary: float) -> Tensor:
        """The second moment of all that is preserved: the universe but for what is erased, prompts, the vocabulary.

        float64 [d, d]; a listed concept counts as its keys do, a prompt 1, the vocabulary `vocabulary` times as much as usual.
        """
        names = {concept.name for concept in erased}
        moment = torch.zeros(self.encoder.width, self.encoder.width, dtype=torch.float64, device=self.problem.device)
        for keys, _ in self.keys_and_values([other for other in self.problem.others if other.name not in names]):
            moment += keys @ keys.T
        if prompts:
            keys = keys_of_prompts(self.encoder, prompts)
            moment += keys @ keys.T
        if vocabulary:
            factor = self._universe(erased).cholesky.double()
            moment += vocabulary * factor @ factor.T
        return moment

    def weights(self) -> dict[str, Tensor]:
        """The projections of this text input by canonical name: float64 [out, d], its own columns of each."""
        return projection_weights(self.problem.base, self.text_input, self.problem.device)

    def _universe(self, concepts: Sequence[Concept]) -> Universe:
        """The vocabulary without the words of the problem's concepts, and without their moments, which are weighed here."""
        problem = self.problem
        every = {c.name: c for c in (problem.concept, *problem.others, *concepts)}.values()
        preserved = PreservedPrompts(cache=problem.cache)
        return universe(
            problem.base,
            every,
            1e-9,
            0.0,
            problem.device,
            text_input=self.text_input,
            preserved=preserved,
            report=problem.report,
        )


def least_squares(
    keys: Tensor, moves: Tensor, moment: Tensor, rank: int = 0, energy: float = 1.0
) -> tuple[MapEdit, float]:
    """The minimiser of `|(T - I) K - moves|^2 + |(T - I) M^(1/2)|^2` for keys K [d, m] and a positive definite moment M [d, d].

    `T - I = moves K^T A^-1` with `A = K K^T + M`, by one Cholesky factor of A; and the condition number of A. Cut to the
    directions that hold `energy` of the change in the metric of A, at most `rank` (0: as many as there are).
    """
    a = keys @ keys.T + moment
    factor, failed = torch.linalg.cholesky_ex(a)
    if failed:
        raise Unsolvable("the embeddings to preserve leave the edit undetermined; raise ridge")
    left, size, right = _svd_of_product(moves, torch.linalg.solve_triangular(factor, keys, upper=False))
    if not size[0] > 0:
        raise Unsolvable("the text encoder gives the concept and its anchor the same embeddings; name another anchor")
    rest = size.square().flip(0).cumsum(0).flip(0) / size.square().sum()
    wanted = min(int((rest > 1.0 - energy).sum()), above_rounding(size))
    count = max(1, min(wanted, rank or wanted))
    down = torch.linalg.solve_triangular(factor.T, right[:count].T, upper=True)
    extent = torch.linalg.eigvalsh(a)
    return MapEdit(left[:, :count] * size[:count], down), float(extent[-1] / extent[0])


def _svd_of_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of `a b^T` for a, b [d, m]; by way of the factors' QR where they are thin, which saves most of the time."""
    if a.shape[1] >= a.shape[0]:
        left, size, right = torch.linalg.svd(a @ b.T, full_matrices=False)
        return left, size, right
    (qa, ra), (qb, rb) = torch.linalg.qr(a), torch.linalg.qr(b)
    left, size, right = torch.linalg.svd(ra @ rb.T)
    return qa @ left, size, right @ qb.T


def free_of(hidden: Tensor, tolerance: float = 0.0) -> tuple[Tensor, int]:
    """An orthonormal basis, float32 [d, d - r], of the directions that no embedding of `hidden` [n, length, d] has; and r.

    By singular value decomposition in float64 with NumPy's rank rule; the paper eliminates symbolically, which takes
    minutes to hours. Directions below `tolerance` times the strongest count as unused. Where prompts begin with the same
    embedding, as they do for CLIP, that is one direction, which is always used.
    """
    hidden = hidden.double().cpu()
    width, precision = hidden.shape[-1], torch.finfo(torch.float32).eps
    begin, rest = hidden[0, :1], hidden.reshape(-1, width)
    shared = hidden.shape[1] > 1 and bool((hidden[:, 0] - begin).norm(dim=1).max() <= 1e-4 * begin.norm())
    if shared:
        # Begin-of-text is larger than all else: it would set the scale of the tolerance.
        begin = begin / begin.norm()
        rest = hidden[:, 1:].reshape(-1, width)
        rest = rest - (rest @ begin[0])[:, None] * begin
    _, size, right = torch.linalg.svd(rest, full_matrices=False)
    # Embeddings come out of a float32 encoder: what is below its rounding is noise, not a direction.
    noise = max(rest.shape) * precision
    used = right[: int((size > size[0] * max(noise, tolerance)).sum())]
    if shared:
        used = torch.cat([begin, used])
    rank = len(used)
    return torch.linalg.qr(used.T, mode="complete").Q[:, rank:].float().contiguous(), rank


def residual(edit: MapEdit, keys: Tensor, values: Tensor) -> float:
    """How much of the way from K to V is left, as a share."""
    return float((edit(keys) - values).norm() / (keys - values).norm())


def revived(edit: MapEdit, g: Tensor, lam: Tensor, keys: Tensor) -> Tensor:
    """The embeddings c' that reproduce keys c best through the edited projections: [d, m]."""
    t = edit(torch.eye(len(g), dtype=g.dtype, device=g.device))
    embeddings: Tensor = torch.linalg.solve(lam + t.T @ g @ t, t.T @ (g @ keys))
    return embeddings


def recovered(edit: MapEdit, g: Tensor, lam: Tensor, keys: Tensor) -> float:
    """How much of the projections' output for the keys the best c' brings back: 1 is all, 0 nothing (weighted by G)."""
    missed = edit(revived(edit, g, lam, keys)) - keys
    return 1.0 - float(((missed * (g @ missed)).sum() / (keys * (g @ keys)).sum()).sqrt())


def projection_weights(base: Base, text_input: str, device: torch.device) -> dict[str, Tensor]:
    """The matrices that read a text input, by canonical name: float64 [out, d], its own columns of each."""
    return {
        name: weight[:, base.columns(text_input, name)].to(device, torch.float64)
        for name, weight in base.tensors(base.projections(text_input)).items()
    }


def gram(weights: Iterable[Tensor], width: int) -> Tensor:
    """`sum_l W_l^T W_l` over matrices W_l [out, width]: `|x|^2` in its metric is how much they make of x together."""
    return sum((weight.T @ weight for weight in weights), torch.zeros(width, width, dtype=torch.float64))


Diagnostics = dict[str, float]


def over_text_inputs(
    problem: EditProblem, choice: KeyChoice, solve: Callable[[TextEdit], tuple[MapEdit, Diagnostics]]
) -> tuple[dict[str, MapEdit], Diagnostics]:
    """The edit that `solve` gives for each text input of the problem's base, and the largest of each number beside them.

    Reports progress by text input. Memory that runs out is reported as OutOfMemory.
    """
    edits: dict[str, MapEdit] = {}
    worst: Diagnostics = {}
    count = len(problem.base.text_inputs)
    problem.report(0, count, "editing in closed form")
    with within_memory("the number of concepts"):
        for i, (text_input, encoder) in enumerate(text_encoders(problem.base, problem.device).items()):
            edit = TextEdit(problem.within(i, count), text_input, encoder, choice)
            edits[text_input], numbers = solve(edit)
            worst = {name: max(value, worst.get(name, value)) for name, value in numbers.items()}
            problem.report(i + 1, count, text_input)
    return edits, worst


def text_maps(edits: Mapping[str, MapEdit]) -> Delta:
    """Edits by text input as one delta."""
    maps: list[Delta] = [edit.text_map(text_input) for text_input, edit in edits.items()]
    return reduce(add, maps)
