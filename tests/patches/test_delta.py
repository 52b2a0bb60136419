"""Deltas as values: sums, strengths, equality, digests, and what must not hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import BadDelta, Delta, Dense, LowRank, Sum, TextMap, Xor, delta_from
from tests.small_bases import KINDS, WIDTH, equal, small_base, some_delta

FEW = settings(max_examples=40, deadline=None)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ADDED = ("text-map", "low-rank", "dense")
seeds = st.integers(0, 10**6)
strengths = st.floats(-4, 4, allow_nan=False).filter(lambda s: s == 0 or abs(s) > 1e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return small_base(tmp_path_factory.mktemp("algebra") / "base", torch.float32)


def alone(base: Base, delta: Delta, strength: float = 1.0) -> dict[str, Tensor]:
    return compose(base, [Term("a", delta, strength)])


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal but for the order of sums, which may move the rounding by one unit in the last place."""
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=3e-7, atol=1e-6) for n in a)


@FEW
@given(kind=st.sampled_from(KINDS), dtype=st.sampled_from(FLOATS), seed=seeds, rank=st.integers(1, 5))
def test_a_delta_is_read_back_from_its_arrays(base: Base, kind: str, dtype: torch.dtype, seed: int, rank: int) -> None:
    delta = some_delta(base, kind, seed, rank, dtype)
    back = delta_from(delta.kind, delta.tensors())
    assert back == delta
    assert hash(back) == hash(delta)
    assert back.digest == delta.digest
    assert equal(alone(base, back), alone(base, delta))


@FEW
@given(kind=st.sampled_from(KINDS), seed=seeds)
def test_deltas_are_equal_exactly_when_their_digests_are(base: Base, kind: str, seed: int) -> None:
    one, same, other = (some_delta(base, kind, s) for s in (seed, seed, seed + 10))
    assert one == same
    assert one.digest == same.digest
    assert one != other
    assert one.digest != other.digest


def test_zeros_of_different_sign_are_different_deltas() -> None:
    one, other = (Dense({"unet/x": torch.tensor([zero])}) for zero in (0.0, -0.0))
    assert one != other
    assert one.digest != other.digest


@FEW
@given(kinds=st.tuples(st.sampled_from(ADDED), st.sampled_from(ADDED)), seed=seeds, dtype=st.sampled_from(FLOATS))
def test_a_sum_composes_to_what_both_compose_to(
    base: Base, kinds: tuple[str, str], seed: int, dtype: torch.dtype
) -> None:
    a, b = (some_delta(base, kind, seed + i, dtype=dtype) for i, kind in enumerate(kinds))
    both = compose(base, [Term("a", a), Term("b", b)])
    assert close(alone(base, a + b), both)
    assert close(alone(base, b + a), both)


@FEW
@given(seed=seeds, order=st.permutations(ADDED * 2))
def test_a_sum_of_several_kinds_is_one_value_whatever_the_brackets(base: Base, seed: int, order: list[str]) -> None:
    deltas = [some_delta(base, kind, seed + i) for i, kind in enumerate(order)]
    left, right = deltas[0], deltas[-1]
    for delta in deltas[1:]:
        left = left + delta
    for delta in reversed(deltas[:-1]):
        right = delta + right
    assert left == right
    assert [part.kind for part in left.parts] == ["text-map", "low-rank", "dense"]


@FEW
@given(kind=st.sampled_from((*ADDED,)), dtype=st.sampled_from(FLOATS), seed=seeds, strength=strengths)
def test_a_strength_in_the_value_gives_the_bits_of_a_strength_beside_it(
    base: Base, kind: str, dtype: torch.dtype, seed: int, strength: float
) -> None:
    delta = some_delta(base, kind, seed, 2, dtype)
    if strength:
        assert equal(alone(base, delta * strength), alone(base, delta, strength))
    assert strength * delta == delta * strength


@FEW
@given(kind=st.sampled_from(ADDED), dtype=st.sampled_from(FLOATS), seed=seeds)
def test_a_power_of_two_keeps_the_dtype_and_comes_off_again(
    base: Base, kind: str, dtype: torch.dtype, seed: int
) -> None:
    delta = some_delta(base, kind, seed, 2, dtype)
    assert all(array.dtype == dtype for array in (delta * -2).tensors().values())
    assert (delta * -2) * -0.5 == delta
    negative = -delta
    assert -negative == delta


def test_a_strength_scales_one_factor_once() -> None:
    """Scaling both factors, as some mergers do, squares the strength."""
    delta = TextMap("text_encoder", torch.ones(WIDTH, 1), torch.ones(WIDTH, 1)) * 0.5
    assert isinstance(delta, TextMap)
    assert torch.equal(delta.up @ delta.down.T, torch.full((WIDTH, WIDTH), 0.5))


def test_factors_stand_side_by_side_in_a_sum(base: Base) -> None:
    a, b = (some_delta(base, "text-map", seed, rank) for seed, rank in ((1, 2), (2, 3)))
    both = a + b
    assert isinstance(both, TextMap)
    assert both.up.shape == both.down.shape == (WIDTH, 5)


def test_a_sum_of_factors_is_not_a_sum_of_products() -> None:
    """Why factors of different patches are never added."""
    u1, d1, u2, d2 = (torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(4))
    assert not torch.allclose((u1 + u2) @ (d1 + d2), u1 @ d1 + u2 @ d2)


def test_half_precision_and_bfloat16_join_without_loss() -> None:
    """Neither holds the other's values, float32 holds both."""
    one, other = torch.tensor([[1 + 2**-10]], dtype=torch.float16), torch.tensor([[2.0**100]], dtype=torch.bfloat16)
    both = TextMap("e", one, one) + TextMap("e", other, other)
    assert isinstance(both, TextMap)
    assert both.up.tolist() == [[1 + 2**-10, 2.0**100]]


def test_a_sum_of_dense_changes_loses_nothing() -> None:
    """A float32 sum would round the small one away."""
    a, b = (Dense({"unet/x": torch.tensor([value])}) for value in (1.0, 2.0**-40))
    both = a + b
    assert isinstance(both, Dense)
    assert both.changes["unet/x"].item() == 1 + 2.0**-40


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf")])
def test_a_strength_that_is_not_finite_is_refused(base: Base, strength: float) -> None:
    with pytest.raises(BadDelta, match="finite"):
        some_delta(base, "dense", 0) * strength


@pytest.mark.parametrize("other", [True, "2", None])
def test_only_numbers_are_strengths(base: Base, other: object) -> None:
    with pytest.raises(TypeError):
        some_delta(base, "dense", 0) * other


def test_residual_bits_cannot_be_scaled_or_added(base: Base) -> None:
    bits, dense = some_delta(base, "xor", 0), some_delta(base, "dense", 0)
    for a, b in ((bits, dense), (dense, bits), (Sum((dense, bits)), dense)):
        with pytest.raises(BadDelta, match="residual bits"):
            a + b
        with pytest.raises(BadDelta, match="residual bits"):
            (a if a.has_bits else b) * 0.5
    assert bits * 1 == bits


def test_a_delta_keeps_its_own_arrays_apart_from_a_graph() -> None:
    up = torch.randn(WIDTH, 1, requires_grad=True)
    delta = TextMap("text_encoder", up, up * 2)
    assert not delta.up.requires_grad
    assert not delta.down.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextMap("e", torch.ones(2, 1), torch.ones(3, 1)), "d x k"),
        (lambda: TextMap("e", torch.ones(2, 0), torch.ones(2, 0)), "d x k"),
        (lambda: TextMap("e", torch.ones(2, 1, dtype=torch.int32), torch.ones(2, 1)), "e/up is int32"),
        (
            lambda: TextMap("e", torch.ones(2, 1), torch.full((2, 1), float("inf"))),
            "e/down has values that are not finite",
        ),
        (
            lambda: TextMap("e", torch.ones(2, 1), torch.ones(2, 1)) + TextMap("e", torch.ones(3, 1), torch.ones(3, 1)),
            "2 and 3",
        ),
        (lambda: LowRank({}), "change nothing"),
        (lambda: LowRank({"unet/x": (torch.ones(2, 1), torch.ones(2, 2))}), "do not multiply"),
        (lambda: LowRank({"unet/x": (torch.ones(2, 1), torch.tensor([[float("nan")]]))}), "unet/x has values"),
        (
            lambda: (
                LowRank({"unet/x": (torch.ones(2, 1), torch.ones(1, 2))})
                + LowRank({"unet/x": (torch.ones(3, 1), torch.ones(1, 2))})
            ),
            "another architecture",
        ),
        (lambda: Dense({}), "change nothing"),
        (lambda: Dense({"unet/x": torch.tensor([1.0, float("nan")])}), "not finite"),
        (lambda: Dense({"unet/x": torch.ones(2)}) + Dense({"unet/x": torch.ones(3)}), "another architecture"),
        (lambda: Xor({}), "change nothing"),
        (lambda: _xor([0], [1], at=torch.int64), "int32 positions"),
        (lambda: _xor([0], [1], mask=torch.uint8), "masks"),
        (lambda: _xor([0, 1], [1]), "one mask per position"),
        (lambda: _xor([1, 0], [1, 1]), "ascending"),
        (lambda: _xor([1, 1], [1, 1]), "ascending"),
        (lambda: _xor([-1], [1]), "ascending"),
        (lambda: _xor([0], [0]), "flip something"),
        (lambda: Sum((Dense({"unet/x": torch.ones(2)}),)), "two kinds"),
        (lambda: Sum((Dense({"unet/x": torch.ones(1)}), _xor([0], [1]), _xor([0], [2]))), "twice"),
    ],
)
def test_what_is_no_delta_is_refused(make: Callable[[], Delta], message: str) -> None:
    with pytest.raises(BadDelta, match=message):
        make()


def _xor(at_: list[int], mask_: list[int], at: torch.dtype = torch.int32, mask: torch.dtype = torch.int32) -> Xor:
    return Xor({"unet/x": (torch.tensor(at_, dtype=at), torch.tensor(mask_, dtype=mask))})


@pytest.mark.parametrize(
    ("kind", "arrays", "message"),
    [
        ("new", {"x": 1}, "unknown kind of delta 'new'"),
        ("text-map", {"e/up": 2}, "'e' needs two arrays, up and down"),
        ("text-map", {"e/up": 2, "e/down": 2, "f/up": 2, "f/down": 2}, "one part"),
        ("xor", {"unet/x/at": 1}, "at and mask"),
        ("low-rank", {"unet/x": 2}, "no pair of factors"),
        ("low-rank", {"unet/x/9": 2}, "no pair of factors"),
        ("low-rank", {"unet/x/²": 2}, "no pair of factors"),
        ("sum", {"new/x": 1}, "unknown kind 'new'"),
        ("sum", {"dense/x": 1}, "two kinds"),
        ("sum", {}, "two kinds"),
        ("dense", {}, "change nothing"),
    ],
)
def test_arrays_that_are_no_delta_are_refused(kind: str, arrays: dict[str, int], message: str) -> None:
    with pytest.raises(BadDelta, match=message):
        delta_from(kind, {name: torch.ones((2,) * sides) for name, sides in arrays.items()})


def test_low_rank_factors_of_the_first_format_are_read(tmp_path: Path) -> None:
    up, down = torch.ones(3, 2), torch.ones(2, 4)
    assert delta_from("low-rank", {"unet/x/up": up, "unet/x/down": down}) == LowRank({"unet/x": (up, down)})
