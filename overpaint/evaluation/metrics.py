"""What is measured, as functions of accuracies, features and pixels.

Accuracies are shares from 0 to 1. Where a function takes several numbers it takes arrays of them as well, entry by entry, so
that the same line gives a value and its bootstrap replicates.

Sources: UA, IRA and CRA are UnlearnCanvas (Zhang et al., NeurIPS 2024); H_o and H_c are MACE (Lu et al., CVPR 2024); the
Frechet distance is that of FID (Heusel et al., NeurIPS 2017), here in the feature space of whatever judge is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from overpaint.errors import OverpaintError

Numbers = NDArray[np.float64]
PEAK = 255.0
SAME_PICTURE = 100.0
"""What `psnr` says in decibels of two pictures that are equal, so that a mean over pictures stays a number."""


def harmonic_mean(*shares: ArrayLike) -> Numbers:
    """The harmonic mean of shares, 0 where one of them is 0. Raises OverpaintError when nothing is given."""
    if not shares:
        raise OverpaintError("the harmonic mean of nothing was asked for; give at least one share")
    stacked = np.stack(np.broadcast_arrays(*(np.asarray(each, np.float64) for each in shares)))
    with np.errstate(divide="ignore"):
        return np.asarray(len(shares) / (1 / stacked).sum(0))


def h_object(erased: ArrayLike, others: ArrayLike, synonyms: ArrayLike) -> Numbers:
    """MACE's H_o: accuracy on the erased class and on its synonyms should be 0, on all other classes 1."""
    return harmonic_mean(1 - np.asarray(erased), others, 1 - np.asarray(synonyms))


def h_composed(erased: ArrayLike, kept: ArrayLike) -> Numbers:
    """MACE's H_c of many concepts at once: accuracy on those erased should be 0, on those kept 1."""
    return harmonic_mean(1 - np.asarray(erased), kept)


def unlearning_accuracy(erased: ArrayLike) -> Numbers:
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


def _centred(features: NDArray[Any]) -> Numbers:
    """X with `X^T X` the sample covariance."""
    wide = np.asarray(features, np.float64)
    return np.asarray((wide - wide.mean(0)) / np.sqrt(len(wide) - 1))


def psnr(pictures: NDArray[np.uint8], others: NDArray[np.uint8]) -> Numbers:
    """The peak signal-to-noise ratio of each pair of pictures [n, h, w, 3], in dB; `SAME_PICTURE` at most."""
    error = differences(pictures, others)
    with np.errstate(divide="ignore"):
        return np.asarray(np.minimum(SAME_PICTURE, 20 * np.log10(PEAK / error)))


def differences(pictures: NDArray[np.uint8], others: NDArray[np.uint8]) -> Numbers:
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


def ranks(values: Sequence[float]) -> Numbers:
    """The place of each value in their order, from 0; equal values share the mean of their places."""
    _, which, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[which])
