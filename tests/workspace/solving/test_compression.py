"""Compression: what is lost is exactly what the discarded singular values say, and the patch tells it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.patches.arithmetic import product_svd
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import Delta, Dense, LowRank, Sum, TextMap, Xor, residual
from overpaint.workspace.derived_patches import NothingSmaller, directions, size_of, truncate
from overpaint.workspace.planning import BadTruncation, Truncation
from overpaint.workspace.workspace import Workspace
from tests.shell import Shell

CONV = "unet/conv_in.weight"
BIAS = "unet/conv_in.bias"
# Errors are measured on factors that were rounded to float32.
ROUNDING = 1e-5


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lost(matrix: Tensor, rank: int) -> float:
    """The relative error of a matrix without its singular values beyond `rank`."""
    sizes = torch.linalg.svdvals(matrix.double())
    return float(sizes[rank:].norm() / sizes.norm())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    width=st.integers(1, 15),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_factors_are_decomposed_without_multiplying_them_out(
    rows: int, columns: int, width: int, seed: int, data: st.DataObject
) -> None:
    """Also where there are more directions than the matrix has sides, and where some of them are the same."""
    left, right = random(seed, rows, width), random(seed + 1, columns, width)
    if data.draw(st.booleans()):
        left[:, -1] = left[:, 0]
    u, sizes, v = product_svd(left, right)
    whole = left @ right.T
    assert torch.allclose(u * sizes @ v.T, whole, atol=1e-12 * max(1.0, float(whole.norm())))
    wanted = torch.linalg.svdvals(whole)[: len(sizes)]
    # Relative to the largest: singular values that are zero come out as rounding.
    assert torch.allclose(sizes[: len(wanted)], wanted, atol=1e-12 * float(wanted[0]))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.floats(0, 100, allow_subnormal=False), min_size=1, max_size=9), energy=st.floats(0.01, 1.0))
def test_energy_takes_the_fewest_directions_that_hold_it(sizes: list[float], energy: float) -> None:
    ordered = torch.tensor(sorted(sizes, reverse=True), dtype=torch.float64)
    count = directions(ordered, Truncation(energy=energy))
    assert 1 <= count <= len(sizes)
    total = float(ordered.square().sum())
    if total > 1e-200:
        # Directions that are rounding error beside the largest are never kept.
        assert float(ordered[:count].square().sum()) >= energy * total * (1 - 1e-9)
        assert count == 1 or float(ordered[: count - 1].square().sum()) < energy * total * (1 + 1e-9)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_of_a_matrix_is_its_discarded_singular_values(base: Base, rank: int) -> None:
    name = base.projections()[0]
    change = random(1, *base.places[name].shape)
    found = truncate(base, Dense({name: change}), Truncation(rank=rank))
    assert isinstance(found.delta, LowRank)
    assert found.delta.factors[name][0].shape[1] == rank
    assert found.errors[name] == pytest.approx(lost(change, rank), abs=ROUNDING)
    assert found.worst == (name, found.errors[name])


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_a_share_of_energy_bounds_the_error(base: Base, energy: float) -> None:
    name = base.projections()[0]
    change = random(2, base.places[name].shape[0], 12) @ random(3, 12, base.places[name].shape[1])
    found = truncate(base, Dense({name: change}), Truncation(energy=energy))
    assert found.errors[name] <= math.sqrt(1 - energy) + ROUNDING


def test_a_kernel_counts_as_the_matrix_of_its_rows_and_a_bias_stays(base: Base) -> None:
    kernel, bias = random(4, *base.places[CONV].shape), random(5, *base.places[BIAS].shape)
    found = truncate(base, Dense({CONV: kernel, BIAS: bias}), Truncation(rank=2))
    assert isinstance(found.delta, Sum)
    assert found.errors == {CONV: pytest.approx(lost(kernel.flatten(1), 2), abs=ROUNDING), BIAS: 0.0}
    (dense,) = (part for part in found.delta.parts if isinstance(part, Dense))
    assert torch.equal(dense.changes[BIAS], bias)


def test_low_rank_factors_are_truncated_like_their_product(base: Base) -> None:
    name = base.projections()[0]
    out, width = base.places[name].shape
    up, down = random(6, out, 8), random(7, 8, width)
    found = truncate(base, LowRank({name: (up, down)}), Truncation(rank=3))
    assert found.errors[name] == pytest.approx(lost(up @ down, 3), abs=ROUNDING)


def test_a_text_map_loses_the_least_that_all_its_readers_together_can(base: Base) -> None:
    up, down = random(8, 64, 9), random(9, 64, 9)
    delta = TextMap("text_encoder", up, down)
    found = truncate(base, delta, Truncation(rank=4))
    assert isinstance(found.delta, TextMap)
    assert found.delta.up.shape[1] == 4
    projections = {name: base.tensor(name).double() for name in base.projections("text_encoder")}
    stacked = torch.cat([weight @ up @ down.T for weight in projections.values()])
    squares = [(found.errors[name] * float((weight @ up @ down.T).norm())) ** 2 for name, weight in projections.items()]
    assert math.sqrt(sum(squares)) / float(stacked.norm()) == pytest.approx(lost(stacked, 4), abs=ROUNDING)


def test_parts_that_lie_on_one_tensor_are_truncated_together(base: Base) -> None:
    name = base.projections()[0]
    out, width = base.places[name].shape
    up, down, change = random(10, out, 2), random(11, 2, width), random(12, out, width)
    found = truncate(base, Sum((LowRank({name: (up, down)}), Dense({name: change}))), Truncation(rank=3))
    assert isinstance(found.delta, LowRank)
    assert found.errors[name] == pytest.approx(lost(up @ down + change, 3), abs=ROUNDING)


def test_residual_bits_count_as_part_of_the_change(base: Base) -> None:
    name = base.projections()[0]
    before = base.tensor(name)
    edited = (before.double() + 0.1 * random(13, *before.shape)).to(before.dtype)
    bits = residual(before, edited)
    assert bits is not None
    found = truncate(base, Xor({name: bits}), Truncation(energy=0.9))
    assert found.errors[name] <= math.sqrt(0.1) + ROUNDING
    assert not found.delta.has_bits


def test_what_would_not_get_smaller_stays_bit_for_bit(base: Base) -> None:
    name = base.projections()[0]
    out, width = base.places[name].shape
    deltas: list[Delta] = [
        LowRank({name: (random(14, out, 2).float(), random(15, 2, width).float())}),
        TextMap("text_encoder", random(16, 64, 2).float(), random(17, 64, 2).float()),
        Dense({name: random(18, out, width).float()}),
        Dense({name: torch.zeros(out, width)}),
    ]
    for delta, keep in zip(
        deltas, [Truncation(rank=2), Truncation(rank=9), Truncation(rank=out), Truncation(rank=1)], strict=True
    ):
        found = truncate(base, delta, keep)
        assert size_of(found.delta) <= size_of(delta)
        assert set(found.errors.values()) == {0.0}
        assert set(found.delta.targets(base)) == set(delta.targets(base))
    assert truncate(base, deltas[0], Truncation(rank=2)).delta == deltas[0]
    assert truncate(base, deltas[1], Truncation(rank=9)).delta == deltas[1]
    assert truncate(base, deltas[2], Truncation(rank=out)).delta == deltas[2]


@pytest.mark.parametrize(
    ("text", "keep"), [("4", Truncation(rank=4)), ("0.99", Truncation(energy=0.99)), ("1.0", Truncation(energy=1.0))]
)
def test_what_to_keep_is_a_rank_or_a_share(text: str, keep: Truncation) -> None:
    assert Truncation.parse(text) == keep
    assert Truncation.from_json(json.loads(json.dumps(keep.as_json()))) == keep


@pytest.mark.parametrize("text", ["0", "-1", "0.0", "1.01", "nan", "inf", "", "many", "1e-400"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(BadTruncation):
        Truncation.parse(text)


def test_compressing_at_once_or_afterwards_gives_the_same_patch(workspace: Workspace) -> None:
    settings = {"dense": "true"}
    whole = workspace.solve("cat", base="tiny", solver="counting", settings=settings, device="cpu")
    later, found = workspace.compress(whole.id, "3")
    at_once = workspace.solve("cat", base="tiny", solver="counting", settings=settings, compress="3", device="cpu")
    assert later.id == at_once.id
    assert later.nbytes < whole.nbytes
    assert later.kind == "low-rank"
    assert later.settings == whole.record.settings
    assert at_once.diagnostics["compression error"] == max(found.errors.values())


def test_a_compressed_patch_names_its_source_and_its_error(workspace: Workspace) -> None:
    whole = workspace.solve("cat", base="tiny", solver="counting", settings={"dense": "true"}, device="cpu")
    once, found = workspace.compress(whole.id, "8")
    twice, _ = workspace.compress(once.id, "2")
    steps = workspace.patch(twice.id).manifest["solver"]["compressed"]
    tensor, error = max(found.errors.items(), key=lambda item: item[1])
    assert steps[0] == {"rank": 8, "from": whole.id, "error": float(f"{error:.3g}"), "tensor": tensor}
    assert (steps[1]["rank"], steps[1]["from"]) == (2, once.id)
    assert len(workspace.patches(concept="cat")) == 3
    recipe = workspace.create_recipe("small", exist_ok=True)
    recipe.add(twice.id)
    composed = compose(workspace.base("tiny"), [Term(twice.id, workspace.patch(twice.id).delta)])
    assert recipe.digest() == recipe.log()[-1].digest_after
    assert set(composed) == {tensor}


def test_a_patch_that_would_not_be_smaller_is_refused(workspace: Workspace) -> None:
    whole = workspace.solve(Concept("cat"), base="tiny", solver="counting", device="cpu")
    with pytest.raises(NothingSmaller, match="nothing was stored"):
        workspace.compress(whole.id, "4")
    assert len(workspace.patches()) == 1


def test_a_run_with_compression_is_resumed_too(workspace: Workspace) -> None:
    for compress, before in (("2", False), ("2", True), (None, False), ("0.9", False), ("0.9", True)):
        plan = workspace.plan(["cat"], solver="counting", compress=compress, base="tiny")
        assert [outcome.before for outcome in workspace.carry_out(plan, device="cpu")] == [before]


def test_the_commands_report_the_error_of_compression(workspace: Workspace, tmp_path: Path) -> None:
    shell = Shell(tmp_path / "registry")
    solved = json.loads(
        shell.ok("solve", "cat", "--base", "tiny", "--solver", "counting", "--set", "dense=true", "--json")
    )
    (row,) = json.loads(shell.ok("patch", "compress", "cat", "--to", "0.5", "--json"))
    assert row["from"] == solved[0]["patch"]
    assert row["bytes"] < row["bytes before"]
    assert row["errors"] == {row["tensor"]: row["largest error"]}
    assert 0 < row["largest error"] < 0.71
    shown = {line["what"]: line["value"] for line in json.loads(shell.ok("patch", "show", row["patch"], "--json"))}
    assert solved[0]["patch"] in shown["compressed from"]
    assert "%" in shell.ok("patch", "compress", solved[0]["patch"], "--to", "1")
    assert "nothing was stored" in shell("patch", "compress", row["patch"], "--to", "60").stderr
