"""Prompts that begin alike are read once, and each of their tokens sees its own prompt alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overpaint.bases.packing import PackedPrompts, PrefixStates

LIMIT = 9
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=LIMIT), min_size=1, max_size=30)


@given(PROMPTS, st.integers(LIMIT, 4 * LIMIT))
def test_a_token_has_its_place_in_its_prompt_and_sees_what_is_before_it(lists: list[list[int]], limit: int) -> None:
    prompts = [tuple(each) for each in lists]
    packed = PackedPrompts.of(prompts, limit)
    assert packed.tokens.shape[1] <= limit
    for prompt, row, columns in zip(prompts, packed.rows, packed.columns, strict=True):
        path = columns[: len(prompt)]
        assert packed.tokens[row, path].tolist() == list(prompt)
        assert packed.positions[row, path].tolist() == list(range(len(prompt)))
        for depth, column in enumerate(path):
            seen = packed.sees[row, column].nonzero()[:, 0]
            assert sorted(seen.tolist()) == sorted(path[: depth + 1].tolist())


@given(PROMPTS, st.data())
def test_after_a_prefix_a_token_sees_the_prefix_and_the_rest_of_its_prompt(
    lists: list[list[int]], data: st.DataObject
) -> None:
    prompts = [tuple(each) for each in lists]
    starts = [data.draw(st.integers(0, len(prompt) - 1)) for prompt in prompts]
    prefixes = sorted({prompt[:start] for prompt, start in zip(prompts, starts, strict=True)} - {()})
    if not prefixes:
        return
    read: list[PackedPrompts] = []
    before = PrefixStates(prefixes, len(prefixes) * LIMIT, read.append)
    before.columns = {**before.columns, (): []}
    packed = PackedPrompts.of(prompts, LIMIT, starts, before)
    assert packed.tokens.shape[1] <= LIMIT
    for prompt, start, row, columns in zip(prompts, starts, packed.rows, packed.columns, strict=True):
        path = columns[start : len(prompt)]
        assert packed.tokens[row, path].tolist() == list(prompt[start:])
        assert packed.positions[row, path].tolist() == list(range(start, len(prompt)))
        assert read[0].tokens[0, before.columns[prompt[:start]]].tolist() == list(prompt[:start])
        for depth, column in enumerate(path):
            seen = packed.sees[row, column].nonzero()[:, 0]
            own = (before.count + path[: depth + 1]).tolist()
            assert sorted(seen.tolist()) == sorted([*before.columns[prompt[:start]], *own])


def test_what_many_prompts_begin_with_stands_in_a_row_once() -> None:
    prompts = [(7, 8, 9, word, 1) for word in range(10)]
    packed = PackedPrompts.of(prompts, 23)
    assert packed.tokens.shape == (1, 23)
    assert PackedPrompts.of(prompts, 22).tokens.shape == (2, 13), "two rows are as narrow as they can be"
