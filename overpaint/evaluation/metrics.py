"""What is measured, as functions of accuracies, features and pixels.

Accuracies are shares from 0 to 1. Where a function takes several numbers it takes arrays of them as well, entry by entry, so
that the same line gives a value and its bootstrap replicates.

Pictures of one prompt are alike, so it is prompts that are drawn again (a cluster bootstrap), and the interval is the
percentile one. A `Mean` carries its replicates: `harmonic_mean(1 - erased, kept)` of two of them is a bootstrap of the
harmonic mean. Means over the same prompts are resampled alike, so that the ratio of a model to its base is a paired one.

Sources: UA, IRA and CRA are UnlearnCanvas (Zhang et al., NeurIPS 2024); H_o and H_c are MACE (Lu et al., CVPR 2024); the
Frechet distance is that of FID (Heusel et al., NeurIPS 2017), here in the feature space of whatever judge is used.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from overpaint.core.errors import OverpaintError

Z95 = 1.959963984540054
"""The normal quantile that leaves 2.5% on either side."""
REPLICATES = 2000
REPLICATES_AT_ONCE = 200
"""Replicates worked out at once, so that memory stays small for thousands of prompts."""
UNDECIDED = "not enough pictures"
PEAK = 255.0
SAME_PICTURE = 100.0
"""What `psnr` says in decibels of two pictures that are equal, so that a mean over pictures stays a number."""
Floats = NDArray[np.float64]
PLAIN_WORDS = {
    "seconds to lay on": "seconds to add",
    "seconds to take off": "seconds to remove",
    "restored: concepts taken off": "restored: concepts of the removed patches",
    "synonyms the solvers were told of": "synonyms that the solvers knew",
    "synonyms the solvers never heard": "synonyms that no solver knew",
    "other objects the solvers were told of": "other objects that the solvers knew",
    "other objects the solvers never heard of": "other objects that no solver knew",
}
"""How names are shown that stay as they were first stored."""


@dataclass(frozen=True)
class Score:
    """`correct` of `n` pictures judged right. Raises OverpaintError unless 0 <= correct <= n and n > 0."""

    correct: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.n or self.n == 0:
            raise OverpaintError(f"a score needs at least one picture; got {self.correct} right of {self.n}")

    @property
    def rate(self) -> float:
        """The share judged right, 0 to 1."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson score interval of the rate, 0 to 1. It stays honest at 0 and at n of n."""
        squared = Z95**2
        centre = (self.correct + squared / 2) / (self.n + squared)
        half = Z95 / (self.n + squared) * sqrt(self.correct * (self.n - self.correct) / self.n + squared / 4)
        # At the ends the formula gives 0 and 1 up to rounding.
        low = max(0.0, centre - half) if self.correct else 0.0
        return low, min(1.0, centre + half) if self.correct < self.n else 1.0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.1%} ({low:.1%} to {high:.1%}, n={self.n})"


@dataclass(frozen=True)
class Measurement:
    """One number that a suite found: what it is about, what was measured, and over how many pictures or things.

    `low` and `high` bound it with 95%; None where it is counted rather than sampled.
    """

    subject: str
    metric: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None


def plain_words(name: str) -> str:
    """A subject or a metric as people read it."""
    return PLAIN_WORDS.get(name, name)


def verdict(measurement: Measurement, *, at_most: float | None = None, at_least: float | None = None) -> str:
    """Whether a number holds a bar: "yes" or "no" where its whole interval does or does not, else `UNDECIDED`.

    A number without an interval was counted, and is compared as it is. Raises OverpaintError unless there is one bar.
    """
    if (at_most is None) == (at_least is None):
        raise OverpaintError("a verdict needs one bar: at_most or at_least")
    low = measurement.value if measurement.low is None else measurement.low
    high = measurement.value if measurement.high is None else measurement.high
    if at_most is not None:
        holds, fails = high <= at_most, low > at_most
    else:
        assert at_least is not None
        holds, fails = low >= at_least, high < at_least
    return "yes" if holds else "no" if fails else UNDECIDED


@dataclass(frozen=True, eq=False)
class Mean:
    """A mean over `n` pictures: itself at place 0, and then its bootstrap replicates; float64 [1 + replicates]."""

    draws: NDArray[np.float64]
    n: int
    hits: int | None = None

    @property
    def value(self) -> float:
        return float(self.draws[0])

    def measurement(self, subject: str, metric: str) -> Measurement:
        """This mean with its 95% interval. A share of 0 or 1 has only equal replicates: its interval is Wilson's."""
        if self.hits in (0, self.n):
            low, high = Score(self.hits, self.n).interval
            return Measurement(subject, metric, self.value, self.n, low, high)
        return measured(subject, metric, self.draws, self.n)


def measured(subject: str, metric: str, draws: ArrayLike, n: int) -> Measurement:
    """A function of means: its value at index 0 of `draws`, and the 95% percentile interval of the replicates behind it."""
    numbers = np.asarray(draws, np.float64)
    low, high = np.percentile(numbers[1:], (2.5, 97.5))
    return Measurement(subject, metric, float(numbers[0]), n, float(low), float(high))


def mean(values: Sequence[float] | NDArray[np.float64], prompts: Sequence[Hashable], seed: int = 0) -> Mean:
    """The mean of one value per picture, bootstrapped over the prompts that the pictures were drawn for.

    Where all were drawn for one prompt, the pictures are resampled: one prompt alone would always give the same mean.
    The same prompts and seed draw the same replicates. Raises OverpaintError when there is no picture, or not one
    prompt for each.
    """
    if not len(values) or len(values) != len(prompts):
        raise OverpaintError(f"a mean needs values, and a prompt for each; got {len(values)} and {len(prompts)}")
    numbers = np.asarray(values, np.float64)
    _, which = np.unique([str(prompt) for prompt in prompts], return_inverse=True)
    if not which.any():
        which = np.arange(len(numbers))
    sums, counts = np.bincount(which, weights=numbers), np.bincount(which).astype(np.float64)
    named = zlib.crc32("\n".join(sorted({str(prompt) for prompt in prompts})).encode())
    rng = np.random.default_rng([seed, named])
    draws = [np.array([numbers.mean()])]
    for start in range(0, REPLICATES, REPLICATES_AT_ONCE):
        chosen = rng.integers(len(sums), size=(min(REPLICATES_AT_ONCE, REPLICATES - start), len(sums)))
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


def harmonic_mean(*shares: ArrayLike) -> Floats:
    """The harmonic mean of shares, 0 where one of them is 0. Raises OverpaintError when nothing is given."""
    if not shares:
        raise OverpaintError("the harmonic mean of nothing was asked for; give at least one share")
    stacked = np.stack(np.broadcast_arrays(*(np.asarray(each, np.float64) for each in shares)))
    with np.errstate(divide="ignore"):
        return np.asarray(len(shares) / (1 / stacked).sum(0))


def h_object(erased: ArrayLike, others: ArrayLike, synonyms: ArrayLike) -> Floats:
    """MACE's H_o: accuracy on the erased class and on its synonyms should be 0, on all other classes 1."""
    return harmonic_mean(1 - np.asarray(erased), others, 1 - np.asarray(synonyms))


def h_composed(erased: ArrayLike, kept: ArrayLike) -> Floats:
    """MACE's H_c of many concepts at once: accuracy on those erased should be 0, on those kept 1."""
    return harmonic_mean(1 - np.asarray(erased), kept)


def unlearning_accuracy(erased: ArrayLike) -> Floats:
    """UnlearnCanvas' UA: the share of the erased concept's pictures that are no longer taken for it."""
    return 1 - np.asarray(erased, np.float64)


def frechet_distance(first: NDArray[Any], second: NDArray[Any]) -> float:
    """The squared Frechet distance of two sets of features [n, d], [m, d], each taken for a Gaussian.

    `|mu_1 - mu_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1 C_2)^(1/2)`. With C = X^T X of the centred and scaled features X, the last
    trace is the sum of the singular values of X_1 X_2^T, which is n x m however wide the features are, and needs no root
    of a singular matrix. Raises OverpaintError unless both have at least two rows and the same width.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise OverpaintError(
            f"a Frechet distance needs two sets of at least two features of one width; got {first.shape}, {second.shape}"
        )
    a, b = _centred(first), _centred(second)
    apart = np.asarray(first, np.float64).mean(0) - np.asarray(second, np.float64).mean(0)
    spread = np.square(a).sum() + np.square(b).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(0.0, apart @ apart + spread))


def _centred(features: NDArray[Any]) -> Floats:
    """X with `X^T X` the sample covariance."""
    wide = np.asarray(features, np.float64)
    return np.asarray((wide - wide.mean(0)) / np.sqrt(len(wide) - 1))


def psnr(pictures: NDArray[np.uint8], others: NDArray[np.uint8]) -> Floats:
    """The peak signal-to-noise ratio of each pair of pictures [n, h, w, 3], in dB; `SAME_PICTURE` at most."""
    error = differences(pictures, others)
    with np.errstate(divide="ignore"):
        return np.asarray(np.minimum(SAME_PICTURE, 20 * np.log10(PEAK / error)))


def differences(pictures: NDArray[np.uint8], others: NDArray[np.uint8]) -> Floats:
    """The root mean square difference of each pair of pictures [n, h, w, 3], in grey levels: 0 when they are equal.

    Raises OverpaintError when there are not as many of one size on both sides.
    """
    if pictures.shape != others.shape:
        raise OverpaintError(f"pictures are compared in pairs of one size; got {pictures.shape} and {others.shape}")
    gap = pictures.astype(np.float64) - others
    return np.asarray(np.sqrt(np.square(gap).mean(axis=tuple(range(1, gap.ndim)))))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, -1 to 1, ties sharing their mean rank; None where one side has no order at all.

    Raises OverpaintError when the lengths differ.
    """
    if len(first) != len(second):
        raise OverpaintError(f"ranks are compared in pairs; got {len(first)} and {len(second)} numbers")
    a, b = (ranks(each) - (len(each) - 1) / 2 for each in (first, second))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else None


def ranks(values: Sequence[float]) -> Floats:
    """The place of each value in their order, from 0; equal values share the mean of their places."""
    _, which, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[which])
