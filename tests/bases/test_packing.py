"""Prompts that begin alike are read once, and each of their tokens sees its own prompt alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overpaint.bases.packing import PackedPrompts

LIMIT = 9
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=LIMIT), min_size=1, max_size=30)


@given(PROMPTS, st.integers(LIMIT, 4 * LIMIT))
def test_a_token_has_its_place_in_its_prompt_and_sees_what_is_before_it(prompts: list[list[int]], limit: int) -> None:
    packed = PackedPrompts.of(prompts, limit)
    assert packed.tokens.shape[1] <= limit
    for prompt, row, columns in zip(prompts, packed.rows, packed.columns, strict=True):
        path = columns[: len(prompt)]
        assert packed.tokens[row, path].tolist() == prompt
        assert packed.positions[row, path].tolist() == list(range(len(prompt)))
        for depth, column in enumerate(path):
            seen = packed.sees[row, column].nonzero()[:, 0]
            assert sorted(seen.tolist()) == sorted(path[: depth + 1].tolist())


def test_what_many_prompts_begin_with_stands_in_a_row_once() -> None:
    prompts = [[7, 8, 9, word, 1] for word in range(10)]
    packed = PackedPrompts.of(prompts, 23)
    assert packed.tokens.shape == (1, 23)
    assert PackedPrompts.of(prompts, 22).tokens.shape == (2, 13), "two rows are as narrow as they can be"
