"""Blocks: a tensor's rows are summed some at a time, and nobody can tell from the result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from overpaint.patches import arithmetic
from overpaint.patches.arithmetic import (
    PARTS,
    DenseMap,
    FactoredMap,
    Original,
    ScratchBuffers,
    Target,
    TensorUpdate,
    side_by_side,
)
from overpaint.patches.delta import TextMap

WIDTH = 24
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=[1, 5 * WIDTH, 16 * WIDTH, 1 << 19], ids=lambda b: f"{b} values a block")
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(arithmetic, "BLOCK", request.param)
    return int(request.param)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def a_change(rank: int, text_inputs: int, seed: int = 0) -> TensorUpdate:
    """Text maps of so many directions through text inputs side by side."""
    rng, width = torch.Generator().manual_seed(seed), WIDTH // text_inputs
    factors = [torch.randn(2, rank, width, generator=rng, dtype=torch.float64) for _ in range(text_inputs)]
    return TensorUpdate(
        tuple((slice(i * width, (i + 1) * width), FactoredMap(*pair)) for i, pair in enumerate(factors))
    )


def squared(change: TensorUpdate) -> TensorUpdate:
    """The same text maps, as their sums."""
    return TensorUpdate(
        tuple((c, DenseMap((t.up.T @ t.down).float())) for c, t in change.texts if isinstance(t, FactoredMap))
    )


def plainly(change: TensorUpdate, original: Tensor) -> Tensor:
    """The sum in float64, all rows at once."""
    weight = original.double()
    total = weight.clone()
    for columns, text in change.texts:
        assert isinstance(text, FactoredMap)
        total[:, columns] += weight[:, columns] @ text.up.T @ text.down
    return total


def written(change: TensorUpdate, original: Tensor, work: ScratchBuffers | None = None) -> Tensor:
    out = torch.empty_like(original)
    change.write(Target(Original(original, 0.0), out, work or ScratchBuffers()))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text_inputs", [1, 2], ids=lambda n: f"{n} text inputs")
@pytest.mark.parametrize("rank", [1, 2, 5], ids=lambda k: f"{k} directions")
def test_any_number_of_rows_is_summed_as_if_at_once(
    dtype: torch.dtype, rank: int, text_inputs: int, block: int
) -> None:
    change = a_change(rank, text_inputs)
    for rows in (1, PARTS - 1, PARTS, 2 * PARTS, 3 * PARTS + 1, 67, 128):
        original = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)
        wanted = plainly(change, original)
        room = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-13
        assert torch.allclose(written(change, original).double(), wanted, rtol=room, atol=room / 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [FactoredMap, DenseMap])
@pytest.mark.parametrize("text_inputs", [1, 2], ids=lambda n: f"{n} text inputs")
@given(rows=st.integers(1, 70), rank=st.integers(1, 4))
def test_a_target_that_is_written_again_gets_the_same_bits(
    text_inputs: int, form: type[FactoredMap] | type[DenseMap], dtype: torch.dtype, rows: int, rank: int
) -> None:
    """Also after others had the scratch memory, and where the original lies."""
    with torch.inference_mode():
        change, work = a_change(rank, text_inputs), ScratchBuffers()
        if form is DenseMap:
            change = squared(change)
        original = torch.randn(rows, WIDTH).to(dtype)
        target = Target(Original(original, 0.0), torch.empty_like(original), work)
        change.write(target)
        once = target.out.clone()
        written(a_change(3, text_inputs, 1), torch.randn(40 * PARTS, WIDTH), work)
        change.write(target)
        assert torch.equal(target.out, once)
        change.write(Target(Original(original, 0.0), original, work))
        assert torch.equal(original, once)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64, 100])
def test_every_row_is_in_one_block_and_most_blocks_can_be_divided(rows: int, block: int) -> None:
    values = torch.arange(rows * WIDTH, dtype=torch.float32).view(rows, WIDTH)
    found = Target(Original(values, 0.0), values, ScratchBuffers()).blocks(torch.float64)
    assert torch.equal(torch.cat([each.weight for each in found]), values)
    assert all(each.weight.shape[0] % PARTS == 0 for each in found[:-1])
    assert all(each.weight.shape[0] <= max(PARTS, block // WIDTH + PARTS) for each in found)


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (6, 2, 3, 3)], ids=str)
def test_a_tensor_of_any_shape_is_written(shape: tuple[int, ...]) -> None:
    original, array = torch.randn(shape), torch.randn(shape)
    out = torch.empty_like(original)
    TensorUpdate(arrays=((array, 0.5),)).write(Target(Original(original, 0.0), out, ScratchBuffers()))
    assert torch.equal(out, (original.double() + array.double() * 0.5).float())


def test_text_inputs_that_share_columns_read_the_original_values() -> None:
    whole, original = slice(0, WIDTH), torch.randn(16, WIDTH)
    both = TensorUpdate(tuple((whole, a_change(2, 1, seed).texts[0][1]) for seed in range(2)))
    wanted = plainly(both, original)
    for change in (both, squared(both)):
        found = written(change, original)
        assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float16, torch.float64]], ids=str)
@pytest.mark.parametrize("count", [1, 3, 9], ids=lambda n: f"{n} maps")
def test_maps_side_by_side_are_the_sum_of_their_products(count: int, dtypes: list[torch.dtype]) -> None:
    """Whatever their dtypes and directions, and also once the scratch memory has served others."""
    rng, work = torch.Generator().manual_seed(count), ScratchBuffers()

    def a_map(number: int) -> TextMap:
        factors = torch.randn(2, WIDTH, 1 + number % 2, generator=rng).to(dtypes[number % len(dtypes)])
        return TextMap("text_encoder", *factors)

    maps = [(a_map(number), 0.5 - number) for number in range(count)]
    found = side_by_side(maps, work)
    side_by_side([(a_map(0), 1.0) for _ in range(20)], work)
    assert isinstance(found, FactoredMap if count < 4 else DenseMap)
    wanted = torch.stack([strength * m.up.double() @ m.down.double().T for m, strength in maps]).sum(0)
    exactly = found.up.T @ found.down if isinstance(found, FactoredMap) else found.map.double()
    assert torch.allclose(exactly, wanted, rtol=2**-23, atol=1e-12)
