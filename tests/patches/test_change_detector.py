"""Seals: what was written to after it was sealed is named, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from overpaint.patches.live import PLACES, RUN, ChangeDetector

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = {
    "a": (40, 30),
    "b": (40, 30),
    "c": (7, 200),
    "a few values": (3, 5),
    "a vector": (2 * PLACES * RUN,),
    "one value": (),
    "a kernel": (8, 6, 3, 3),
}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for name, shape in SHAPES.items()}


def sealed(found: dict[str, nn.Parameter]) -> ChangeDetector:
    seals = ChangeDetector()
    seals.put(found)
    return seals


def added(values: Tensor) -> None:
    with torch.no_grad():
        values.add_(1)


def behind(values: Tensor) -> None:
    values.data += 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_untouched_parameters_hold(dtype: torch.dtype) -> None:
    found = parameters(dtype)
    assert sealed(found).broken(found) == []


@pytest.mark.parametrize("change", [added, behind])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_of_those_recorded_together_the_changed_one_is_named(
    name: str, dtype: torch.dtype, change: Callable[[Tensor], None]
) -> None:
    found = parameters(dtype)
    seals = sealed(found)
    change(found[name])
    assert seals.broken(found) == [name]
    seals.renew({name: found[name]})
    assert seals.broken(found) == []


@pytest.mark.parametrize("name", SHAPES)
def test_a_parameter_in_the_place_of_another_is_named(name: str) -> None:
    found = parameters()
    seals = sealed(found)
    found[name] = nn.Parameter(found[name].detach().clone())
    assert seals.broken(found) == [name]
    seals.put({name: found[name]})
    assert seals.broken(found) == []


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(64, 48).T,
    "every second column": lambda: torch.randn(64, 48)[:, ::2],
    "channels last": lambda: torch.randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last),
    "channels last and small": lambda: torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last),
}


def test_a_parameter_that_was_turned_where_it_lies_is_named() -> None:
    values = torch.ones(40, 40)
    found = {"a": nn.Parameter(values)}
    seals = sealed(found)
    found["a"].data = values.T
    assert seals.broken(found) == ["a"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_in_memory_does_not_matter(layout: str) -> None:
    found = {name: nn.Parameter(LAYOUTS[layout]()) for name in "ab"}
    seals = sealed(found)
    assert seals.broken(found) == []
    behind(found["b"])
    assert seals.broken(found) == ["b"]


def test_values_that_are_not_numbers_hold_when_they_stay() -> None:
    found = {"a": nn.Parameter(torch.full((40, 40), float("nan")))}
    assert sealed(found).broken(found) == []


def test_an_unrecorded_parameter_counts_as_changed() -> None:
    found = parameters()
    seals = sealed({"a": found["a"]})
    assert seals.broken(found) == [name for name in SHAPES if name != "a"]
    seals.clear()
    assert seals.broken(found) == list(SHAPES)


some = st.sets(st.sampled_from(sorted(SHAPES)))


@given(st.lists(st.tuples(some, some, some)))
def test_any_order_of_changes_and_seals_names_what_changed_since(
    rounds: list[tuple[set[str], set[str], set[str]]],
) -> None:
    """Whatever was sealed together before."""
    found = parameters()
    seals, changed = sealed(found), set[str]()
    for shifted, looked, renewed in rounds:
        for name in shifted:
            behind(found[name])
        changed |= shifted
        assert set(seals.broken({name: found[name] for name in looked})) == looked & changed
        seals.renew({name: found[name] for name in renewed})
        changed -= renewed
