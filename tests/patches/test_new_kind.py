"""A kind of delta that only this file knows, listed in `DELTAS` and nowhere else, does all that the others do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.patches import delta as deltas
from overpaint.patches.compose import Term, compose, plan
from overpaint.patches.delta import BadDelta, Delta, Dense, LowRank, Sum, TextMap, Xor, delta_from, paired, present
from overpaint.patches.formats.exporting import stored_difference, stored_truncated
from overpaint.patches.patch import BadPatch, make_patch, read_patch
from overpaint.workspace.derived_patches import truncate
from overpaint.workspace.planning import Truncation
from tests.patches.exact import exactly
from tests.patches.plain_composition import compose_plainly
from tests.small_bases import WIDTH, equal, small_base, some_delta

KEY, VALUE = "unet/down.attn2.to_k.weight", "unet/down.attn2.to_v.weight"


@dataclass(frozen=True, eq=False)
class Kronecker(Delta):
    """`a x b` (Kronecker's product) per tensor: no thin factors, and far fewer numbers than the tensor has."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    kind: ClassVar[str] = "kronecker"
    since_format: ClassVar[int] = 3

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}/{side}": pair[i] for name, pair in self.pairs.items() for i, side in enumerate("ab")}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> Sequence[Delta]:
        return [cls(paired(arrays, "a", "b"))]

    def targets(self, base: Base) -> list[str]:
        return present(base, self.pairs)

    def change(self, base: Base, name: str, original: Tensor | None = None) -> Tensor:
        a, b = self.pairs[name]
        return torch.kron(a.double(), b.double())

    def _scaled(self, strength: float) -> Delta:
        return Kronecker({name: (a * strength, b) for name, (a, b) in self.pairs.items()})

    def _merged(self, other: Delta) -> Delta | None:
        return None


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return small_base(tmp_path / "base", torch.float32)


@pytest.fixture
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "DELTAS", (TextMap, LowRank, Dense, Kronecker, Xor))


def product(seed: int = 0, columns: int = 2) -> Kronecker:
    """On a projection of 6 x 8: 2 x `columns` times 3 x the rest."""
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, columns, generator=rng), torch.randn(3, WIDTH // columns, generator=rng)
    return Kronecker({KEY: (a, b)})


@pytest.mark.usefixtures("_listed")
def test_it_is_composed_alone_at_any_strength_and_beside_every_other_kind(base: Base) -> None:
    a, b = product().pairs[KEY]
    composed = compose(base, [Term("a", product(), -0.5)])
    assert torch.equal(composed[KEY], (base.tensor(KEY).double() - 0.5 * torch.kron(a.double(), b.double())).float())
    others = [Term(kind, some_delta(base, kind, 1)) for kind in ("text-map", "low-rank", "dense")]
    terms = [Term("a", product()), *others]
    composed, plain = compose(base, terms), compose_plainly(base, terms)
    assert all(torch.allclose(composed[name], plain[name], rtol=1e-6, atol=1e-6) for name in plain)
    assert not torch.allclose(composed[KEY], compose(base, others)[KEY], atol=1e-2)


@pytest.mark.usefixtures("_listed")
def test_it_is_stored_and_read_alone_in_a_sum_and_under_residual_bits(base: Base) -> None:
    wanted = {KEY: compose(base, [Term("a", product())])[KEY] + torch.randn(6, WIDTH) * 1e-6}
    whole = exactly(base, product(), wanted)
    assert [part.kind for part in whole.parts] == ["kronecker", "xor"]
    for delta in (product(), product() + some_delta(base, "dense", 1), whole):
        patch = make_patch(base, Concept("cat"), delta, {"name": "mine", "settings": {}, "seed": 0})
        assert patch.manifest["format"] == 3
        assert equal(read_patch(patch.blob).delta.tensors(), delta.tensors())
    assert equal(compose(base, [Term("a", read_patch(patch.blob).delta)]), wanted)
    assert delta_from("kronecker", product().tensors()) == product()


@pytest.mark.usefixtures("_listed")
def test_it_is_exported(base: Base) -> None:
    planned = plan(base, [Term("a", product(), 2.0), Term("b", some_delta(base, "low-rank", 1, names=[KEY]))])
    change = planned.change(KEY)
    a, b = product().pairs[KEY]
    assert not torch.allclose(change, 2 * torch.kron(a, b).double())
    assert torch.allclose(stored_difference(planned, KEY, torch.float32).arrays[0].double(), change, atol=1e-6)
    down, up, _ = stored_truncated(planned, KEY, torch.float32, 6).arrays
    assert torch.allclose((up @ down).double(), change, atol=1e-5)


@pytest.mark.usefixtures("_listed")
def test_compressing_loses_what_is_measured_and_nothing_else(base: Base) -> None:
    both = product() + some_delta(base, "low-rank", 1, names=[KEY])
    found = truncate(base, both, Truncation(rank=1))
    (pair,) = found.delta.parts
    assert isinstance(pair, LowRank)
    sizes = torch.linalg.svdvals(plan(base, [Term("a", both)]).change(KEY))
    assert found.errors[KEY] == pytest.approx(float(sizes[1:].norm() / sizes.norm()), abs=1e-5)


def test_what_is_not_listed_is_refused_where_it_could_not_be_read_back(base: Base) -> None:
    with pytest.raises(BadDelta, match="list it in DELTAS"):
        Sum((product(), some_delta(base, "dense", 1)))
    patch = make_patch(base, Concept("cat"), product(), {"name": "mine", "settings": {}, "seed": 0})
    with pytest.raises(BadPatch, match="reads up to format 2"):
        read_patch(patch.blob)
    with pytest.raises(BadDelta, match="unknown kind of delta 'kronecker'"):
        delta_from("kronecker", product().tensors())
