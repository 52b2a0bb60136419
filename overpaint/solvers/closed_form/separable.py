"""Separable closed-form erasure (this project; after UCE, Gandikota et al., WACV 2024, eq. 7).

For concepts with keys K_j and targets V_j, and keys R to preserve, the joint minimiser of
`w sum_{i in S} |W K_i - W0 V_i|^2 + w sum_{j not in S} |W K_j - W0 K_j|^2 + |W R - W0 R|^2 + lambda |W - W0|^2` is
`W = W0 (I + sum_{i in S} w (V_i - K_i) K_i^T A^-1)` with `A = w sum_j K_j K_j^T + R R^T + lambda I`, for every subset S: a
sum of terms that each depend on one concept, and the same for all projections. The patch is one such term, for each text input by
which a prompt enters the base. That begin-of-text does not move at all is a constraint (`universe.py`).

A concept without an anchor is sent to the average word of the vocabulary in the same sentence, rather than to the sentence
without it. What all words have in common then stays where it is, so that no patch moves it, and a hundred patches do not add up
to moving it for everything else.

Preserving the rest leaves some of the concept, the more of it the more is known. So a concept's own keys weigh more than those
of the others, as much more as lets them go `share` of their way on average, up to `MOST` times. By Woodbury's identity that is
the same problem with farther targets (`favouring`), so that terms still add up to the joint solution, for these targets, of
every subset. With a `reach` above 1 these targets are reached on average, so that keys go past their own: styles do, of which
every word of a sentence carries a part.

`harden` adds rounds as in RECE (`uce.py`): the embeddings c' that reproduce K_i best through the edited projections become
further keys of the concept, which go where K_i goes; A has them too, for this term alone. So hardened terms add up to the joint
solution as nearly as c' of one concept is none of another's keys.

`separable_mlp` solves the same problem inside of the text encoder (the matrix after MEMIT, Meng et al., ICLR 2023, and EMCID,
Xiong et al., arXiv 2403.13807). A text embedding has as many directions to tell concepts apart by as it is wide, and with a
hundred concepts these are used up. The last matrix W of a layer's feed-forward part reads numbers that are several times as
many (3,072 for the 768 of Stable Diffusion 1.x), and few of them are large for one word. With keys K_j of what W reads, and
`way_i` what the layer should give for concept i minus what it gives, `w way_i K_i^T A^-1` is added to W itself. Keys do not
depend on W, so that terms add up here, too. W is that of the last layer that decides all that a text encoder hands on: what it
reads is what the whole prompt has made of a token, and what follows of it is what the denoiser is handed. Only a pooled
embedding may have one more layer behind it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.encoder_models import FEED_FORWARD_OUTPUTS
from overpaint.bases.layout import Layout
from overpaint.core.concepts import Concept
from overpaint.patches.delta import Delta, LowRank, Sum, TextMap
from overpaint.patches.patch import uncovered_inputs
from overpaint.solvers.closed_form.edits import MapEdit, gram, projection_weights, recovered, revived
from overpaint.solvers.problem import EditProblem, Solution, Solver, Unsolvable, setting, within_memory
from overpaint.solvers.universe import RIDGE, PreservedPrompts, Universe, matrices_of, universe, vocabulary_record

ADVERSARIAL_RIDGE = 0.1
"""Lambda of the search for c', over the mean eigenvalue of `sum_l W_l^T W_l`, as in RECE."""
AVERAGE, NOTHING = "average", "nothing"
TARGETS = (AVERAGE, NOTHING)
MOST = 20.0
"""How much a concept's own keys may count, over those of the others, at most."""
TAKEN_ALONG = 0.35
"""A note is written where the mean key of a concept that is to be kept goes this share of the erased one's way."""
SPARE, ITERATIONS = 8, 8
"""Directions that are followed beside those that are kept, and steps: what is kept is off by the ratio of the singular values
behind the last direction that is followed and of the last that is kept, to the power of twice the steps."""


class _InUniverse(Solver):
    """What both solvers do: read a universe, and find a concept's way in it. Their settings of these names mean the same."""

    ridge: float
    weight: float
    target: str
    vocabulary: int
    vocabulary_weight: float

    def universe_of(self, problem: EditProblem, place: str) -> Universe:
        """The moment of all that is known at a text input, or at a matrix of a text encoder: the problem's concepts, the
        vocabulary, preserved prompts."""
        preserved = PreservedPrompts(
            problem.preserved_prompts(), self.vocabulary, problem.cache, self.vocabulary_weight
        )
        return universe(
            problem.base,
            (problem.concept, *problem.others),
            self.ridge,
            self.weight,
            problem.device,
            text_input=place,
            preserved=preserved,
            to_average=self.target == AVERAGE,
            report=problem.report,
        )

    def _keys_and_way(self, known: Universe, concept: Concept) -> tuple[Tensor, Tensor]:
        """K [d, m] of a concept, and how far it is to its target, [o, m]. Raises Unsolvable where it is there already."""
        keys, way = known.keys[concept.name], known.ways[concept.name]
        if not (self.weight * keys @ way.T).square().sum() > 0:
            nowhere = "nothing" if self.target == NOTHING else "the average word"
            raise Unsolvable(
                f"the text encoder says of {concept.name!r} what it says of {concept.anchor or nowhere!r}, or weight is 0; "
                "name another anchor or a larger weight"
            )
        return keys, way


@dataclass(frozen=True)
class Separable(_InUniverse):
    """Send a concept to its anchor in closed form and hold everything else; patches add up to the joint solution."""

    is_closed_form = True
    revision = 3
    FORMER_DEFAULTS = {2: {"reach": 1.5, "style_reach": 3.0}}  # noqa: RUF012

    ridge: float = setting(RIDGE, "lambda over the mean eigenvalue of A", low=0.0)
    weight: float = setting(1.0, "how much a listed concept counts; the empty prompt counts 0.35", low=0.0)
    energy: float = setting(0.98, "share of the change's energy that the kept directions hold", low=0.0, high=1.0)
    reach: float = setting(
        1.0, "the change is at most so many times as large, so that keys reach the favoured target on average", low=1.0
    )
    style_reach: float = setting(2.0, "`reach` for styles, of which every word of a sentence carries a part", low=1.0)
    rank: int = setting(2, "most directions to keep; each costs 8 d bytes", low=1)
    vocabulary: int = setting(
        0, "preserve so many words of the tokenizer's vocabulary; 0: all, or a sample until all are encoded", low=0
    )
    caught_reach: float = setting(
        1.0, "`reach` for what is no style on diffusion transformers", low=1.0, added_later=True
    )
    share: float = setting(
        0.85,
        "of the way to the target, what a concept's keys go on average; 0: as far as the joint solution has them",
        low=0.0,
        high=0.99,
        added_later=True,
    )
    target: str = setting(
        AVERAGE,
        "where a concept without an anchor goes: the average word, or the sentence without it",
        choices=TARGETS,
        added_later=True,
    )
    vocabulary_weight: float = setting(
        60.0, "how much the whole vocabulary counts, in listed concepts", low=0.0, added_later=True
    )
    harden: int = setting(
        0, "rounds that erase what still calls the concept up, at most `rank` directions each", low=0, added_later=True
    )

    def solve(self, problem: EditProblem) -> Solution:
        """A text map of at most `rank` directions for each text input of the base."""
        started = time.perf_counter()
        concept, base = problem.concept, problem.base
        problem.report(0, 1, "reading the universe")
        maps: list[Delta] = []
        about: dict[str, dict[str, Any]] = {}
        for text_input in base.text_inputs:
            known = self.universe_of(problem, text_input)
            up, down, about[text_input] = self._term(known, concept, base, text_input)
            maps.append(TextMap(text_input, up, down))
        delta = maps[0] if len(maps) == 1 else Sum(tuple(maps))
        numbers = _together(about)
        return Solution(
            delta,
            {**numbers, "open_doors": list(uncovered_inputs(base, delta)), "seconds": time.perf_counter() - started},
            vocabulary_record(base, problem.device, self.vocabulary),
        )

    def _term(
        self, known: Universe, concept: Concept, base: Base, text_input: str
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The factors of one concept's term, float32 [d, k], and what there is to say about them. Raises Unsolvable."""
        keys, way = self._keys_and_way(known, concept)
        reach = self.reach_on(base, concept)
        up, down, about = fit(Metric(known.cholesky), keys, way, self.rank, self.energy, reach, self.weight, self.share)
        if self.harden:
            values = known.values[concept.name]
            up, down, more = self._hardened(known, MapEdit(up, down), keys, values, reach, base, text_input)
            about = {**about, **more}
        about = {**about, "condition": known.condition}
        about |= _taken_along(known, concept, up, down, way)
        return up.float(), down.float().contiguous(), about

    def reach_on(self, base: Base, concept: Concept) -> float:
        """How much farther than the target the keys of a concept may be sent on a base."""
        if concept.kind == "style":
            return self.style_reach
        return self.caught_reach if base.layout.is_caught else self.reach

    def _hardened(
        self, known: Universe, edit: MapEdit, keys: Tensor, values: Tensor, reach: float, base: Base, text_input: str
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The term after the rounds of `harden`, and how much could be recovered of it before and after them."""
        weights = projection_weights(base, text_input, torch.device("cpu"))
        g = gram(weights.values(), len(keys)).to(keys.device)
        lam = ADVERSARIAL_RIDGE * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype, device=g.device)
        about: dict[str, Any] = {"recovered at the start": recovered(edit, g, lam, keys)}
        moment = known.cholesky @ known.cholesky.T
        every, goals = keys, values
        for turn in range(1, self.harden + 1):
            again = revived(edit, g, lam, keys)
            if known.begin is not None:
                again = again - torch.outer(known.begin, known.begin @ again)
            every, goals = torch.cat([every, again], 1), torch.cat([goals, values], 1)
            moment = moment + self.weight * again @ again.T
            metric = Metric(torch.linalg.cholesky(moment))
            rank = (1 + turn) * self.rank
            up, down, found = fit(metric, every, goals - every, rank, self.energy, reach, self.weight, self.share)
            edit = MapEdit(up, down)
        return edit.up, edit.down, {**about, **found, "recovered": recovered(edit, g, lam, keys)}


AS_OF_REVISION_2 = Separable(
    reach=1.5, style_reach=3.0, caught_reach=1.25, share=0.0, target=NOTHING, vocabulary_weight=25.0
)
"""What `separable` was in revision 2. Methods that were measured with it begin with it."""


@dataclass(frozen=True)
class SeparableMLP(_InUniverse):
    """Send a concept to its anchor inside of the text encoder, in closed form, with room for more concepts at once."""

    is_closed_form = True

    ridge: float = setting(RIDGE, "lambda over the mean eigenvalue of A", low=0.0)
    weight: float = setting(1.0, "how much a listed concept counts; the empty prompt counts 0.35", low=0.0)
    energy: float = setting(0.98, "share of the change's energy that the kept directions hold", low=0.0, high=1.0)
    reach: float = setting(1.0, "the change is at most so many times as large, so that targets are reached", low=1.0)
    style_reach: float = setting(2.0, "`reach` for styles, of which every word of a sentence carries a part", low=1.0)
    share: float = setting(
        0.9,
        "of the way to the target, what a concept goes on average; 0: as far as the joint solution has it",
        low=0.0,
        high=0.99,
    )
    rank: int = setting(4, "most directions to keep; each costs 4 (d + o) bytes", low=1)
    target: str = setting(
        AVERAGE,
        "where a concept without an anchor goes: the average word, or the sentence without it",
        choices=TARGETS,
    )
    vocabulary: int = setting(
        0, "preserve so many words of the tokenizer's vocabulary; 0: all, or a sample until all are encoded", low=0
    )
    vocabulary_weight: float = setting(60.0, "how much the whole vocabulary counts, in listed concepts", low=0.0)

    def supports(self, layout: Layout) -> str | None:
        normed = [name for name, rules in layout.components.items() if rules.feed_forward_norm]
        if not normed:
            return None
        return (
            f"`separable_mlp` changes what a layer of the text encoder adds up, and in {layout.name} bases {normed[0]} has a "
            "norm in between: use `separable`"
        )

    def touches(self, base: Base) -> Sequence[str]:
        encoders, endings = base.layout.encoders(base.names), tuple(f".{each}.weight" for each in FEED_FORWARD_OUTPUTS)
        return [name for name in base.names if name.partition("/")[0] in encoders and name.endswith(endings)]

    def solve(self, problem: EditProblem) -> Solution:
        """At most `rank` directions of one matrix in each text encoder.

        Raises Unsolvable for a concept of which the text encoder says what it says of its target, and for a base whose layout
        is not served.
        """
        started = time.perf_counter()
        if reason := self.supports(problem.base.layout):
            raise Unsolvable(reason)
        concept, base = problem.concept, problem.base
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        about: dict[str, dict[str, Any]] = {}
        with within_memory("the number of concepts"):
            for name in matrices_of(base, problem.device):
                problem.report(len(about), len(about) + 1, "reading the universe")
                up, down, about[name] = self._term(self.universe_of(problem, name), concept)
                factors[name] = up.float().cpu().contiguous(), down.T.float().cpu().contiguous()
        delta = LowRank(factors)
        numbers = {**_together(about), "open_doors": list(uncovered_inputs(base, delta))}
        record = vocabulary_record(base, problem.device, self.vocabulary, is_inside=True)
        return Solution(delta, {**numbers, "seconds": time.perf_counter() - started}, record)

    def _term(self, known: Universe, concept: Concept) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The factors [o, k] and [d, k] of one concept's term, and what there is to say about them."""
        keys, way = self._keys_and_way(known, concept)
        reach = self.style_reach if concept.kind == "style" else self.reach
        up, down, about = fit(Metric(known.cholesky), keys, way, self.rank, self.energy, reach, self.weight, self.share)
        # No condition number: of a moment that is 3,072 wide, its eigenvalues would take longer than all else.
        return up, down, {**about, **_taken_along(known, concept, up, down, way)}


def _taken_along(known: Universe, concept: Concept, up: Tensor, down: Tensor, way: Tensor) -> dict[str, str]:
    """A note on the concept that is to be kept and goes farthest along the erased concept's way, where that is much of it.

    In means over sentences and positions: what all have in common stays.
    """
    goal = way.mean(1)
    along = down @ (up.T @ goal) / goal.square().sum()  # times a key: the share of the way that it goes
    shares = dict(zip(known.keys, (known.means @ along).tolist(), strict=True))
    del shares[concept.name]
    share, kept = max(((share, name) for name, share in shares.items()), default=(0.0, ""))
    if share < TAKEN_ALONG:
        return {}
    return {
        "note": f"{share:.0%} of what happens to {concept.name!r} happens to {kept!r} too, which this patch is to keep: the "
        "text encoder says nearly the same of both. If they are one thing, make one a synonym of the other"
    }


def favouring(metric: Metric, keys: Tensor, way: Tensor, share: float, weight: float = 1.0) -> Tensor:
    """Targets [o, m] with which `fit` solves the problem in which a concept's own keys weigh f times as much as the others'.

    f is the least with which they go, on average, the `share` of their way; at least 1, at most `MOST`. With
    `w K^T A^-1 K = Q diag(e) Q^T`, own keys that weigh f times as much go the share `f e / (1 + (f - 1) e)` of what their way
    has of each direction of Q instead of e, by Woodbury's identity: as if their way there were so much longer.
    """
    _, size, right = torch.linalg.svd(weight**0.5 * metric.whitened(keys), full_matrices=False)
    return _favoured(size, right, way, share)


def _favoured(size: Tensor, right: Tensor, way: Tensor, share: float) -> Tensor:
    """The same from the singular values and right vectors of `w^1/2 L^-1 K`: roots of e, and Q^T."""
    e = size.square()
    parts = way @ right.T
    energy, whole = parts.square().sum(0), float(way.square().sum())

    def gone(f: float) -> float:
        return float((energy * f * e / (1 + (f - 1) * e)).sum()) / whole

    low, high = 1.0, MOST
    if gone(low) >= share:
        return way
    if gone(high) > share:
        for _ in range(30):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if gone(middle) >= share else (middle, high)
    favoured: Tensor = (parts * (high / (1 + (high - 1) * e))) @ right
    return favoured


@dataclass(frozen=True, eq=False)
class Metric:
    """A second moment `A = L L^T` of a universe, in all directions or in those of an orthonormal `basis` N [d, q] alone:
    `N^T A N = L L^T` then, and no change that is fitted in it moves what is orthogonal to N."""

    cholesky: Tensor
    basis: Tensor | None = None

    def within(self, basis: Tensor) -> Metric:
        """The same moment in the directions of a basis [d, q]."""
        inside = basis.T @ self.cholesky
        return Metric(torch.linalg.cholesky(inside @ inside.T), basis)

    def whitened(self, vectors: Tensor) -> Tensor:
        """`L^-1 N^T x` for x [d, n]."""
        inside = vectors if self.basis is None else self.basis.T @ vectors
        white: Tensor = torch.linalg.solve_triangular(self.cholesky, inside, upper=False)
        return white

    def directions(self, white: Tensor) -> Tensor:
        """`N L^-T y` for y [q, n]."""
        inside: Tensor = torch.linalg.solve_triangular(self.cholesky.T, white, upper=True)
        return inside if self.basis is None else self.basis @ inside


def fit(
    metric: Metric,
    keys: Tensor,
    way: Tensor,
    rank: int,
    energy: float,
    reach: float,
    weight: float = 1.0,
    share: float = 0.0,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Factors [o, r] and [d, r] of the change D that moves keys K [d, m] by `way` [o, m] and leaves the rest of a universe
    where it is: `w way K^T A^-1`, the minimiser of `w |D K - way|^2 + w sum_{j} |D K_j|^2 + |D R|^2 + lambda |D|^2`, A having
    all of these. With a `share`, K is favoured until it goes that share of its way.

    Terms of one universe add up to the minimiser of their sum. Truncation is by the singular values of `way K^T L^-T`, that
    is, in the metric of what the text encoder gives, not of the bare matrix; then the average is made to arrive where the
    favoured targets are (see the module), as far as `reach` allows. With the factors, what there is to say about them: the
    share of the way that K goes on average, and what is left of it. `way` must not be zero.
    """
    basis, lengths, q = torch.linalg.svd(weight**0.5 * metric.whitened(keys), full_matrices=False)
    favoured = _favoured(lengths, q, way, share) if share else way
    # `w favoured K^T L^-T` in that basis: as many columns as there are keys, which are far fewer than d.
    change = weight**0.5 * (favoured @ q.T) * lengths
    left, size, right = dominant_directions(change, rank)
    held = size.square().cumsum(0) / change.square().sum()
    rank = min(rank, len(size), int((held < energy).sum()) + 1)
    up, down = left[:, :rank] * size[:rank], metric.directions(basis @ right[:, :rank])
    went = up @ (down.T @ keys)
    gain = min(reach, max(1.0, float(favoured.square().sum() / (favoured * went).sum())))
    about = {
        "rank": rank,
        "energy": float(held[rank - 1]),
        "gain": gain,
        "share": float(gain * (way * went).sum() / way.square().sum()),
        "residual": float((gain * went - way).norm() / way.norm()),
    }
    return gain * up, down, about


def dominant_directions(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest singular values of a matrix, with their left and right vectors as columns.

    By subspace iteration where they are few, which is many times faster than the whole decomposition; the start is always
    the same, and so are the bits.
    """
    block = count + SPARE
    if 4 * block > min(matrix.shape):
        left, size, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :count], size[:count], right.T[:, :count]
    start = torch.randn(len(matrix), block, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    basis = start.to(matrix.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    inner, size, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ inner)[:, :count], size[:count], right.T[:, :count]


def _together(about: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The numbers of several text inputs: the worst of each, and under `doors` each one's own."""
    if len(about) == 1:
        return next(iter(about.values()))
    worst = {"rank": max, "energy": min, "gain": max, "share": min, "residual": max, "condition": max, "recovered": max}
    first = next(iter(about.values()))
    notes = [one["note"] for one in about.values() if "note" in one]
    return {
        **{key: of(one[key] for one in about.values()) for key, of in worst.items() if key in first},
        **({"note": notes[0]} if notes else {}),
        "doors": dict(about),
    }
