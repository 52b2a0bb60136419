"""Which patches a checkpoint holds is found from its weights alone, also where Overpaint did not build it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.patches.build import build
from overpaint.patches.compose import Term
from overpaint.patches.delta import Delta, Dense, LowRank, TextMap
from overpaint.patches.inspect import explain
from overpaint.patches.patch import Patch, make_patch
from overpaint.testing import tiny_base


def random_patches(base: Base) -> list[Patch]:
    """Four patches: two text maps, low-rank factors and dense arrays."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) / 8

    name = base.projections()[0]
    out, width = base.places[name].shape
    deltas: list[Delta] = [TextMap("text_encoder", normal(width, 1), normal(width, 1)) for _ in range(2)]
    deltas += [LowRank({name: (normal(out, 2), normal(2, width))}), Dense({name: normal(out, width)})]
    solver = {"name": "test", "settings": {}, "seed": 0}
    return [make_patch(base, Concept(f"thing {i}"), delta, solver) for i, delta in enumerate(deltas)]


def test_the_patches_in_a_checkpoint_and_their_strengths_are_found(base: Base, tmp_path: Path) -> None:
    patches = random_patches(base)
    applied = [(patches[0], 1.0), (patches[2], 0.5), (patches[3], -0.25)]
    build(base, [Term(patch.id, patch.delta, strength) for patch, strength in applied], tmp_path / "built")
    found = explain(Base.open(tmp_path / "built"), base, patches)
    assert {patch.id: round(strength, 2) for patch, strength in found.present} == {p.id: s for p, s in applied}
    assert found.residual < 0.02
    assert not found.unexplained


def test_a_change_that_no_patch_makes_is_a_residual(base: Base, tmp_path: Path) -> None:
    patches = random_patches(base)
    build(base, [Term(patches[3].id, patches[3].delta)], tmp_path / "built")
    found = explain(Base.open(tmp_path / "built"), base, patches[:2])
    assert found.residual > 0.8
    assert not explain(Base.open(tmp_path / "built"), base, []).strengths


def test_a_tensor_that_no_patch_reaches_is_named(base: Base, tmp_path: Path) -> None:
    patches = random_patches(base)
    other = next(name for name in base.names if name not in base.projections() and name.endswith("weight"))
    extra = Dense({other: torch.ones(base.places[other].shape)})
    build(base, [Term(patches[0].id, patches[0].delta), Term("f" * 64, extra)], tmp_path / "built")
    found = explain(Base.open(tmp_path / "built"), base, patches)
    assert found.unexplained == (other,)
    assert [patch.id for patch, _ in found.present] == [patches[0].id]


def test_the_base_itself_holds_no_patch(base: Base) -> None:
    found = explain(base, base, random_patches(base))
    assert (found.present, found.residual, found.changed) == ((), 0.0, 0)


def test_patches_of_another_base_are_left_out(base: Base, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "other", seed=1)
    assert not explain(base, base, random_patches(other)).strengths


def test_a_checkpoint_of_another_architecture_is_refused(base: Base, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "other", width=32)
    with pytest.raises(OverpaintError, match="different architectures"):
        explain(other, base, [])
