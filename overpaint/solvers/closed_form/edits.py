"""What closed-form edits share: which embeddings are asked about, what is preserved, and an edit as two thin factors.

All of them change every projection W that reads the prompt into `W T` with one `T = I + up down^T`, so that the whole edit is a
text map. Everything is float64 and rounded once, when the text map is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder, encoders
from overpaint.core.concepts import Concept
from overpaint.patches.delta import Delta, TextMap
from overpaint.solvers.problem import EditProblem, Unsolvable, within_memory
from overpaint.solvers.sentences import keys_and_values, keys_of_prompts, sentences
from overpaint.solvers.universe import Universe, universe

LAST, ALL = "last", "all"
POSITIONS = (LAST, ALL)
"""Which tokens are keys: the last one of the concept's words, as most papers have it, or all from its first one on, with
weights that make one concept count 1 (`keys.py`)."""


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


def keys_at(encoder: TextEncoder, base: Base, concept: Concept, positions: str, spoken: bool) -> tuple[Tensor, Tensor]:
    """K and V of a concept, float64 [d, m] each, on the encoder's device.

    `spoken`: in sentences rather than by the bare words. For `last`, V is the anchor's last token in the same sentence;
    without an anchor, the token that stands before the concept once it is left out (of a bare name, begin-of-text).
    """
    if positions == ALL and spoken:
        keys, values = keys_and_values(encoder, base, concept)
        return keys.double(), values.double()
    pairs = sentences(base, concept.kind).pairs if spoken else (("{}", ""),)
    asked = [
        (t, word, t.format(concept.anchor) if concept.anchor else rest) for word in concept.words for t, rest in pairs
    ]
    keys = encoder.hidden([template.format(word) for template, word, _ in asked]).double()
    values = encoder.hidden([instead for _, _, instead in asked]).double()
    starts = [encoder.first_position(template, word) for template, word, _ in asked]
    if positions == ALL:
        weight = sum(encoder.length - start for start in starts) ** -0.5
        own, their = ([rows[s:] for rows, s in zip(h, starts, strict=True)] for h in (keys, values))
        return weight * torch.cat(own).T, weight * torch.cat(their).T
    if encoder.is_pooled:
        return keys[:, 0].T, values[:, 0].T
    ends = [start + len(encoder.tokens(word)) - 1 for start, (_, word, _) in zip(starts, asked, strict=True)]
    stand_in = len(encoder.tokens(concept.anchor)) if concept.anchor else 0
    own = [rows[end] for rows, end in zip(keys, ends, strict=True)]
    their = [rows[start + stand_in - 1] for rows, start in zip(values, starts, strict=True)]
    return torch.stack(own, 1), torch.stack(their, 1)


@dataclass(frozen=True)
class PreservationSet:
    """What an edit preserves beside the universe: prompts of one's own, and the vocabulary, so many times as heavy as usual."""

    prompts: tuple[str, ...] = ()
    vocabulary: float = 0.0

    @classmethod
    def of(cls, keep: str, vocabulary: float = 0.0) -> PreservationSet:
        """From a setting that separates prompts by `;`."""
        return cls(tuple(sorted({p.strip() for p in keep.split(";") if p.strip()})), vocabulary)


def asked_about(
    problem: EditProblem,
    text_input: str,
    encoder: TextEncoder,
    concepts: Sequence[Concept],
    positions: str,
    spoken: bool,
) -> list[tuple[Tensor, Tensor]]:
    """K and V of each concept (`keys_at`); those of all positions in sentences come from the universe, which keeps them."""
    if positions == ALL and spoken:
        known = encoded(problem, text_input, concepts)
        return [(known.keys[c.name].double(), known.values[c.name].double()) for c in concepts]
    return [keys_at(encoder, problem.base, concept, positions, spoken) for concept in concepts]


def encoded(problem: EditProblem, text_input: str, also: Sequence[Concept] = ()) -> Universe:
    """The vocabulary without the words of the problem's concepts, and without their moments: they are weighed here."""
    concepts = {c.name: c for c in (problem.concept, *problem.others, *also)}.values()
    return universe(problem.base, concepts, 1e-9, 0.0, problem.device, text_input=text_input)


def preserved(
    problem: EditProblem,
    text_input: str,
    encoder: TextEncoder,
    erased: Sequence[Concept],
    kept: PreservationSet,
    positions: str,
    spoken: bool,
) -> Tensor:
    """The second moment of everything to preserve: the universe but for what is erased, kept prompts, the vocabulary.

    float64 [d, d]; a listed concept counts as its keys do, a kept prompt 1.
    """
    names = {concept.name for concept in erased}
    moment = torch.zeros(encoder.width, encoder.width, dtype=torch.float64, device=problem.device)
    others = [other for other in problem.others if other.name not in names]
    for keys, _ in asked_about(problem, text_input, encoder, others, positions, spoken) if others else ():
        moment += keys @ keys.T
    if kept.prompts:
        keys = keys_of_prompts(encoder, kept.prompts).double()
        moment += keys @ keys.T
    if kept.vocabulary:
        factor = encoded(problem, text_input, erased).cholesky.double()
        moment += kept.vocabulary * factor @ factor.T
    return moment


def least_squares(
    keys: Tensor, ways: Tensor, moment: Tensor, rank: int = 0, energy: float = 1.0
) -> tuple[MapEdit, float]:
    """The minimiser of `|(T - I) K - ways|^2 + |(T - I) M^(1/2)|^2` for keys K [d, m] and a positive definite moment M [d, d].

    `T - I = ways K^T A^-1` with `A = K K^T + M`, by one Cholesky factor of A; and the condition number of A. Cut to the
    directions that hold `energy` of the change in the metric of A, at most `rank` (0: as many as there are).
    """
    a = keys @ keys.T + moment
    factor, failed = torch.linalg.cholesky_ex(a)
    if failed:
        raise Unsolvable("the embeddings to preserve leave the edit undetermined; raise ridge")
    left, size, right = _svd_of_product(ways, torch.linalg.solve_triangular(factor, keys, upper=False))
    if not size[0] > 0:
        raise Unsolvable("the text encoder says the same of the concept and of its anchor; name another anchor")
    rest = size.square().flip(0).cumsum(0).flip(0) / size.square().sum()
    wanted = int(((rest > 1.0 - energy) & (size > size[0] * len(size) * torch.finfo(size.dtype).eps)).sum())
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


def arrived(edit: MapEdit, keys: Tensor, values: Tensor) -> float:
    """How much of the way from K to V is left, as a share."""
    return float((edit(keys) - values).norm() / (keys - values).norm())


def projection_weights(base: Base, text_input: str, device: torch.device) -> dict[str, Tensor]:
    """The matrices that read a door, by canonical name: float64 [out, d], the door's own columns of each."""
    return {
        name: weight[:, base.columns(text_input, name)].to(device, torch.float64)
        for name, weight in base.tensors(base.projections(text_input)).items()
    }


def gram(weights: Iterable[Tensor], width: int) -> Tensor:
    """`sum_l W_l^T W_l` over matrices W_l [out, width]: `|x|^2` in its metric is how much they make of x together."""
    return sum((weight.T @ weight for weight in weights), torch.zeros(width, width, dtype=torch.float64))


Diagnostics = dict[str, float]


def over_text_inputs(
    problem: EditProblem, edit: Callable[[str, TextEncoder], tuple[MapEdit, Diagnostics]]
) -> tuple[dict[str, MapEdit], Diagnostics]:
    """`edit(door, encoder)` for every door of the problem's base, and the worst (largest) of each number it gives.

    Reports progress by door. Memory that runs out is reported as OutOfMemory.
    """
    edits: dict[str, MapEdit] = {}
    worst: Diagnostics = {}
    text_inputs = problem.base.text_inputs
    problem.report(0, len(text_inputs), "editing in closed form")
    with within_memory("the number of concepts"):
        for i, (text_input, encoder) in enumerate(encoders(problem.base, problem.device).items()):
            edits[text_input], found = edit(text_input, encoder)
            worst = {name: max(value, worst.get(name, value)) for name, value in found.items()}
            problem.report(i + 1, len(text_inputs), text_input)
    return edits, worst


def text_maps(edits: Mapping[str, MapEdit]) -> Delta:
    """Edits by door as one delta."""
    maps: list[Delta] = [edit.text_map(text_input) for text_input, edit in edits.items()]
    return reduce(add, maps)
