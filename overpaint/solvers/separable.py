"""Separable closed-form erasure (this project; after UCE, Gandikota et al., WACV 2024, eq. 7).

For concepts with keys K_j and targets V_j, and keys R to preserve, the joint minimiser of
`w sum_{i in S} |W K_i - W0 V_i|^2 + w sum_{j not in S} |W K_j - W0 K_j|^2 + |W R - W0 R|^2 + lambda |W - W0|^2` is
`W = W0 (I + sum_{i in S} w (V_i - K_i) K_i^T A^-1)` with `A = w sum_j K_j K_j^T + R R^T + lambda I`, for every subset S: a
sum of terms that each depend on one concept, and the same for all projections. The patch is one such term.

Preserving the rest leaves some of the concept: of the way from K_i to V_i, keys go the share alpha on average. Asking for
`V_i' = K_i + (V_i - K_i) / alpha` instead makes the average arrive. That is the same problem with a farther target, so that
terms still add up to the joint solution.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from overpaint.patches.delta import TextMap
from overpaint.solvers.problem import EditProblem, Solution, setting
from overpaint.solvers.universe import universe


@dataclass(frozen=True)
class Separable:
    """Hyper-parameters of the separable closed form."""

    ridge: float = setting(1e-4, "lambda over the mean eigenvalue of A", low=0.0)
    weight: float = setting(1.0, "how much a listed concept counts against a word of the vocabulary", low=0.0)
    energy: float = setting(0.999, "share of the change's energy that the kept directions hold", low=0.0, high=1.0)
    reach: float = setting(
        1.5, "at most so much farther than the target, so that keys arrive there on average", low=1.0
    )
    rank: int = setting(8, "most directions to keep; each costs 8 d bytes", low=1)

    def solve(self, problem: EditProblem) -> Solution:
        """A text map of at most `rank` directions.

        Truncation is by the singular values of `(V - K) K^T L^-T` with `A = L L^T`, that is, in the metric of what the
        text encoder really says, not of the bare matrix.
        """
        started = time.perf_counter()
        concept = problem.concept
        known = universe(problem.base, (concept, *problem.others), self.ridge, self.weight, problem.device)
        keys, values = known.keys[concept.name], known.values[concept.name]
        whitened = torch.linalg.solve_triangular(known.cholesky, self.weight * keys @ (values - keys).T, upper=False)
        left, size, right = torch.linalg.svd(whitened.T, full_matrices=False)
        share = size.square().cumsum(0) / size.square().sum()
        rank = min(self.rank, int((share < self.energy).sum()) + 1)
        up = left[:, :rank] * size[:rank]
        down = torch.linalg.solve_triangular(known.cholesky.T, right[:rank].T, upper=True)
        way, went = values - keys, up @ (down.T @ keys)
        gain = min(self.reach, max(1.0, float(way.square().sum() / (way * went).sum())))
        up, moved = gain * up, keys + gain * went
        return Solution(
            TextMap("text_encoder", up.float().contiguous(), down.float().contiguous()),
            {
                "rank": rank,
                "energy": float(share[rank - 1]),
                "gain": gain,
                "residual": float((moved - values).norm() / (keys - values).norm()),
                "condition": known.condition,
                "seconds": time.perf_counter() - started,
            },
        )
