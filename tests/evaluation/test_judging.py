from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overpaint.bases.emoji.judge import HEADS, JudgeNetwork
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.evaluation import metrics
from overpaint.evaluation.metrics import Score, accuracy, load_judge, verdicts

PICTURES = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("head", HEADS)
def test_the_judge_agrees_with_itself(judge: JudgeNetwork, head: str) -> None:
    seen = verdicts(judge, PICTURES, head)
    assert len(seen) == 7
    assert accuracy(judge, PICTURES, seen, head) == Score(7, 7)


def test_batches_do_not_change_a_verdict(judge: JudgeNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = verdicts(judge, PICTURES, "object")
    monkeypatch.setattr(metrics, "PICTURES_AT_ONCE", 2)
    assert verdicts(judge, PICTURES, "object") == whole


def test_a_wrong_class_counts_as_wrong(judge: JudgeNetwork) -> None:
    seen = verdicts(judge, PICTURES[:1], "style")
    other = next(style for style in judge.classes["style"] if style != seen[0])
    assert accuracy(judge, PICTURES[:1], [other], "style") == Score(0, 1)


@pytest.mark.parametrize(
    ("score", "low", "high"),
    # Newcombe (1998), table I, Wilson without continuity correction.
    [(Score(81, 263), 0.2553, 0.3662), (Score(15, 148), 0.0624, 0.1605), (Score(0, 20), 0.0, 0.1611)],
)
def test_the_interval_is_wilsons(score: Score, low: float, high: float) -> None:
    assert score.interval == pytest.approx((low, high), abs=5e-5)


def test_a_score_reads_as_a_sentence() -> None:
    assert str(Score(9, 10)) == "90.0% (59.6% to 98.2%, n=10)"


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_scores_are_refused(correct: int, n: int) -> None:
    with pytest.raises(OverpaintError):
        Score(correct, n)


def test_unknown_heads_and_classes_are_named(judge: JudgeNetwork) -> None:
    with pytest.raises(NotFound, match="no head 'mood'"):
        verdicts(judge, PICTURES, "mood")
    with pytest.raises(NotFound, match="does not know unicorn"):
        accuracy(judge, PICTURES[:1], ["unicorn"], "object")
    with pytest.raises(OverpaintError, match="7 pictures, 1 classes"):
        accuracy(judge, PICTURES, ["cat"], "object")


def test_pictures_of_another_kind_are_refused(judge: JudgeNetwork) -> None:
    floats: Any = PICTURES / 255
    with pytest.raises(OverpaintError, match="float64"):
        verdicts(judge, floats, "object")
    with pytest.raises(OverpaintError, match="32, 32"):
        verdicts(judge, PICTURES[:, ::2, ::2], "object")


def test_a_base_without_a_judge_is_refused_with_the_reason(tmp_path: Path, judge: JudgeNetwork) -> None:
    with pytest.raises(NotFound, match="no judge in"):
        load_judge(tmp_path)
    judge.save(tmp_path / "judge")
    assert load_judge(tmp_path).classes == judge.classes
