"""Intervals: repeatable, over prompts rather than pictures, and as wide as they should be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap  # type: ignore[import-untyped]

from overpaint.core.errors import OverpaintError
from overpaint.evaluation.metrics import UNDECIDED, Measurement, Score, average, h_composed, mean, measured, verdict

RIGHT = [1.0] * 30 + [0.0] * 20
APART = [f"prompt {i}" for i in range(50)]


def test_the_interval_is_that_of_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=80)
    ours = mean(values, list(range(80))).measurement("x", "mean")
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    # Two draws of some thousand replicates each; the interval itself is 0.6 wide.
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)
    assert ours.value == pytest.approx(values.mean())


def test_the_same_call_gives_the_same_numbers_and_another_seed_does_not() -> None:
    assert np.array_equal(mean(RIGHT, APART).draws, mean(RIGHT, APART).draws)
    assert not np.array_equal(mean(RIGHT, APART).draws, mean(RIGHT, APART, seed=1).draws)


def test_pictures_of_one_prompt_are_one_doubt() -> None:
    alone = mean(RIGHT, APART).measurement("x", "accuracy")
    together = mean(RIGHT, [f"prompt {i // 10}" for i in range(50)]).measurement("x", "accuracy")
    assert alone.value == together.value == 0.6
    assert alone.low is not None
    assert together.low is not None
    assert together.low < alone.low


def test_two_models_on_the_same_prompts_are_a_pair() -> None:
    base, after = mean(RIGHT, APART), mean(RIGHT, APART)
    ratio = measured("x", "share of the base", after.draws / base.draws, 50)
    assert (ratio.low, ratio.value, ratio.high) == (1.0, 1.0, 1.0)


def test_a_rate_of_nothing_still_has_doubt() -> None:
    none = mean([0.0] * 20, APART[:20]).measurement("cat", "accuracy")
    assert (none.low, none.high) == Score(0, 20).interval
    every = average([mean([1.0] * 10, APART[:10]), mean([1.0] * 10, APART[10:20])]).measurement("kept", "accuracy")
    assert (every.low, every.high) == Score(20, 20).interval


def test_a_harmonic_mean_is_bootstrapped_with_its_parts() -> None:
    erased, kept = mean([0.0] * 9 + [1.0], APART[:10]), mean([1.0] * 18 + [0.0] * 2, APART[10:30])
    whole = measured("recipe", "H", h_composed(erased.draws, kept.draws), 30)
    assert whole.value == pytest.approx(0.9)
    assert whole.low is not None
    assert whole.high is not None
    assert 0.6 < whole.low < 0.9 < whole.high <= 1


def test_what_has_no_mean_is_refused() -> None:
    with pytest.raises(OverpaintError, match="got 0 and 0"):
        mean([], [])
    with pytest.raises(OverpaintError, match="got 1 and 2"):
        mean([1.0], ["a", "b"])
    with pytest.raises(OverpaintError, match="nothing was judged"):
        average([])


@pytest.mark.parametrize(
    ("low", "high", "at_most", "at_least"),
    [
        (0.0, 0.04, "yes", "no"),
        (0.0, 0.28, UNDECIDED, UNDECIDED),
        (0.06, 0.28, "no", "yes"),
        (None, None, "yes", "no"),
    ],
)
def test_no_verdict_where_the_interval_spans_the_bar(
    low: float | None, high: float | None, at_most: str, at_least: str
) -> None:
    measurement = Measurement("cat", "accuracy", 0.0 if low is None else 0.03, 10, low, high)
    assert verdict(measurement, at_most=0.05) == at_most
    assert verdict(measurement, at_least=0.05) == at_least
    with pytest.raises(OverpaintError, match="one bar"):
        verdict(measurement)


@pytest.mark.parametrize(
    ("score", "low", "high"),
    # Newcombe (1998), table I, Wilson without continuity correction.
    [(Score(81, 263), 0.2553, 0.3662), (Score(15, 148), 0.0624, 0.1605), (Score(0, 20), 0.0, 0.1611)],
)
def test_the_interval_of_a_score_is_wilsons(score: Score, low: float, high: float) -> None:
    assert score.interval == pytest.approx((low, high), abs=5e-5)


def test_a_score_reads_as_a_sentence() -> None:
    assert str(Score(9, 10)) == "90.0% (59.6% to 98.2%, n=10)"


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_scores_are_refused(correct: int, n: int) -> None:
    with pytest.raises(OverpaintError):
        Score(correct, n)
