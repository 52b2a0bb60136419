"""A number with its doubt: means over pictures, bootstrapped over the prompts they were drawn for.

Pictures of one prompt are alike, so it is prompts that are drawn again (a cluster bootstrap), and the interval is the
percentile one. A `Mean` carries its replicates: `harmonic_mean(1 - erased, kept)` of two of them is a bootstrap of the
harmonic mean. Means over the same prompts are resampled alike, so that the ratio of a model to its base is a paired one.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from overpaint.errors import OverpaintError
from overpaint.evaluation.judging import Score

REPLICATES = 2000
BATCH = 200
"""Replicates worked out at once, so that memory stays small for thousands of prompts."""


@dataclass(frozen=True)
class Finding:
    """One number that a suite found: what it is about, what was measured, and over how many pictures or things.

    `low` and `high` bound it with 95%; None where it is counted rather than sampled.
    """

    subject: str
    metric: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Mean:
    """A mean over `n` pictures: itself at place 0, and then its bootstrap replicates; float64 [1 + replicates]."""

    draws: NDArray[np.float64]
    n: int
    hits: int | None = None

    @property
    def value(self) -> float:
        return float(self.draws[0])

    def found(self, subject: str, metric: str) -> Finding:
        """This mean as a finding.

        A share of 0 or 1 has only equal replicates; its interval is Wilson's, which still knows n.
        """
        if self.hits in (0, self.n):
            low, high = Score(self.hits, self.n).interval
            return Finding(subject, metric, self.value, self.n, low, high)
        return found(subject, metric, self.draws, self.n)


def found(subject: str, metric: str, draws: ArrayLike, n: int) -> Finding:
    """A function of means as a finding: the value at place 0, the 95% percentile interval of the rest."""
    numbers = np.asarray(draws, np.float64)
    low, high = np.percentile(numbers[1:], (2.5, 97.5))
    return Finding(subject, metric, float(numbers[0]), n, float(low), float(high))


def mean(values: Sequence[float] | NDArray[np.float64], prompts: Sequence[Hashable], seed: int = 0) -> Mean:
    """The mean of one value per picture, bootstrapped over the prompts that the pictures were drawn for.

    The same prompts and seed draw the same replicates. Raises OverpaintError when there is no picture, or not one
    prompt for each.
    """
    if not len(values) or len(values) != len(prompts):
        raise OverpaintError(f"a mean needs values, and a prompt for each; got {len(values)} and {len(prompts)}")
    numbers = np.asarray(values, np.float64)
    _, which = np.unique([str(prompt) for prompt in prompts], return_inverse=True)
    sums, counts = np.bincount(which, weights=numbers), np.bincount(which).astype(np.float64)
    named = zlib.crc32("\n".join(sorted({str(prompt) for prompt in prompts})).encode())
    rng = np.random.default_rng([seed, named])
    draws = [np.array([numbers.mean()])]
    for start in range(0, REPLICATES, BATCH):
        chosen = rng.integers(len(sums), size=(min(BATCH, REPLICATES - start), len(sums)))
        draws.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    shares = bool(np.isin(numbers, (0.0, 1.0)).all())
    return Mean(np.concatenate(draws), len(numbers), int(numbers.sum()) if shares else None)


def average(means: Sequence[Mean]) -> Mean:
    """The mean of several means, each counting alike, as a benchmark averages over concepts."""
    if not means:
        raise OverpaintError("an average needs at least one mean; nothing was judged")
    hits = None if any(each.hits is None for each in means) else sum(each.hits or 0 for each in means)
    n = sum(each.n for each in means)
    return Mean(np.mean([each.draws for each in means], axis=0), n, hits if hits in (0, n) else None)
