from __future__ import annotations

from typing import Any

from overpaint.bases.emoji.catalogue import catalogue
from overpaint.bases.emoji.judge import Judge
from overpaint.evaluation.card_text import LICENCES, CardTable, card_markdown
from overpaint.evaluation.images import Sampler
from overpaint.evaluation.judging import Score
from overpaint.evaluation.model_card import measure


def test_every_object_is_judged_as_often_as_asked(pipe: Any, judge: Judge) -> None:
    seen: list[tuple[int, int]] = []
    table = measure(
        pipe,
        judge,
        seeds_per_object=3,
        guidances=[1.0],
        steps=1,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (300, 300)
    assert {score.n for score in table.per_object.values()} == {3}
    assert (table.held_out["object"].n, table.held_out["style"].n, table.held_out["background"].n) == (150, 50, 50)
    assert sum(score.correct for score in table.per_object.values()) == table.held_out["object"].correct


def test_the_card_names_every_licence_and_the_measured_numbers() -> None:
    words = catalogue()
    heads = {head: Score(9, 10) for head in ("object", "style", "background")}
    table = CardTable(
        Sampler(), ((4.0, Score(1, 2)),), heads, heads, {"cat": Score(1, 3)}, {"ink": (Score(2, 3), Score(3, 3))}
    )
    card = card_markdown(table, [])
    assert set(words.artwork.values()) <= set(LICENCES)
    assert all(f"| {style} |" in card for style in words.styles)
    assert "| cat | 33.3%" in card
    assert "| object | 90.0% (59.6% to 98.2%, n=10) |" in card
