"""Metrics against independent implementations and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from overpaint.core.errors import OverpaintError
from overpaint.evaluation.metrics import (
    SAME_PICTURE,
    differences,
    frechet_distance,
    h_composed,
    h_object,
    harmonic_mean,
    mean,
    psnr,
    rank_correlation,
    ranks,
    unlearning_accuracy,
)

SHARES = st.floats(1e-3, 1.0)


@given(st.lists(SHARES, min_size=1, max_size=5))
def test_the_harmonic_mean_is_scipys(shares: list[float]) -> None:
    assert harmonic_mean(*shares) == pytest.approx(scipy.stats.hmean(shares))


def test_the_harmonic_means_of_published_tables() -> None:
    # MACE, table 1: H_o of averaged accuracies, beside the published average of H_o over ten classes.
    assert h_object(0.0849, 0.9735, 0.1053) == pytest.approx(0.9261, abs=1e-3)
    assert h_object(0.5, 1.0, 0.5) == pytest.approx(3 / (2 + 1 + 2))
    # MACE at a hundred celebrities: 4.31 erased, 84.56 kept.
    assert h_composed(0.0431, 0.8456) == pytest.approx(0.8978, abs=2e-4)


def test_one_failure_makes_the_harmonic_mean_zero() -> None:
    assert h_composed(1.0, 0.9) == 0
    assert h_object(0.0, 0.0, 0.0) == 0
    assert h_composed(0.0, 1.0) == 1
    with pytest.raises(OverpaintError, match="of nothing"):
        harmonic_mean()


def test_metrics_of_arrays_are_worked_out_entry_by_entry() -> None:
    erased, kept = np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.5, 1.0])
    assert h_composed(erased, kept).tolist() == [1.0, 0.5, 0.0]
    assert unlearning_accuracy(erased).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(("n", "m", "width"), [(40, 60, 7), (200, 150, 20)])
def test_the_frechet_distance_is_that_of_the_textbook(n: int, m: int, width: int) -> None:
    rng = np.random.default_rng(n)
    mix = rng.normal(size=(width, width))
    first, second = rng.normal(size=(n, width)) @ mix, rng.normal(0.3, 1.5, size=(m, width))
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    gap = first.mean(0) - second.mean(0)
    assert frechet_distance(first, second) == pytest.approx(gap @ gap + np.trace(a + b - 2 * root.real), rel=1e-6)


def test_the_frechet_distance_of_fewer_pictures_than_features() -> None:
    """Where the covariances are singular and SciPy's root loses digits: one dimension, worked out by hand."""
    first = np.zeros((3, 50))
    first[:, 0] = [-1.0, 0.0, 1.0]  # variance 1
    second = np.zeros((3, 50))
    second[:, 0] = [1.0, 5.0, 9.0]  # mean 5, variance 16
    assert frechet_distance(first, second) == pytest.approx(25 + (4 - 1) ** 2)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def test_features_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(OverpaintError, match="at least two features of one width"):
        frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))
    with pytest.raises(OverpaintError, match="one width"):
        frechet_distance(np.zeros((4, 2)), np.zeros((4, 3)))


def test_psnr_by_hand() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    other = black.copy()
    other[0] = 255
    other[1, :, :2] = 51  # half of the pixels a fifth of the peak off
    assert differences(other, black) == pytest.approx([255, 51 / np.sqrt(2)])
    assert psnr(other, black) == pytest.approx([0, 10 * np.log10(50)])
    assert psnr(black, black).tolist() == [SAME_PICTURE] * 2
    assert differences(black, black).tolist() == [0, 0]
    with pytest.raises(OverpaintError, match="pairs of one size"):
        psnr(black, black[:1])


@settings(max_examples=60)
@given(arrays(np.int64, st.integers(2, 30), elements=st.integers(0, 6)), st.integers(0, 9))
def test_rank_correlation_is_scipys(values: np.ndarray, seed: int) -> None:
    other = np.random.default_rng(seed).permutation(values)
    assert ranks(values.tolist()).tolist() == (scipy.stats.rankdata(values) - 1).tolist()
    found = rank_correlation(values.tolist(), other.tolist())
    if len(set(values.tolist())) == 1:
        assert found is None
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(values, other).statistic, abs=1e-12)


def test_rank_correlation_needs_pairs() -> None:
    with pytest.raises(OverpaintError, match="2 and 3"):
        rank_correlation([1, 2], [1, 2, 3])


def test_pictures_of_a_single_prompt_are_resampled_by_themselves() -> None:
    found = mean([0, 1, 1, 0, 1, 1], ["cat"] * 6).measurement("cat", "accuracy")
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.5 < 0.8 < found.high
