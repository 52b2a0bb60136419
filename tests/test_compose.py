"""The laws of composition, over random deltas, dtypes and histories."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.errors import OverpaintError
from overpaint.patches.compose import Term, compose, composition_digest
from overpaint.patches.delta import BadDelta, Delta, Dense, LowRank, TextMap
from overpaint.patches.live import ForeignChange, Overlay
from tests.conftest import tiny_pipeline

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def some_terms(base: Base, seed: int, count: int = 6) -> list[Term]:
    """Deltas of every kind on the base's cross-attention, with strengths of both signs."""
    rng = torch.Generator().manual_seed(seed)
    names = base.readers()
    found: list[Term] = []
    for i in range(count):
        shapes = {n: base.tensor(n).shape for n in names}
        width = shapes[names[0]][1]
        delta: Delta
        if i % 3 == 0:
            delta = TextMap("text_encoder", *(torch.randn(width, 2, generator=rng) * 0.1 for _ in range(2)))
        elif i % 3 == 1:
            delta = LowRank(
                {
                    n: (torch.randn(s[0], 2, generator=rng), torch.randn(2, s[1], generator=rng) * 0.1)
                    for n, s in shapes.items()
                }
            )
        else:
            delta = Dense({names[i % len(names)]: torch.randn(shapes[names[i % len(names)]], generator=rng) * 0.1})
        found.append(Term(f"{seed}-{i * 7919 % 101:03}", delta, (-1) ** i * (0.3 + 0.2 * i)))
    return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32], ids=str, scope="module")
def any_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("dtypes") / "base"
    tiny_pipeline().to(dtype=request.param).save_pretrained(folder)
    return Base.open(folder)


@FEW
@given(seed=st.integers(0, 10**6), order=st.randoms(use_true_random=False))
def test_order_does_not_matter(any_base: Base, seed: int, order: random.Random) -> None:
    terms = some_terms(any_base, seed)
    shuffled = list(terms)
    order.shuffle(shuffled)
    assert equal(compose(any_base, terms), compose(any_base, shuffled))


def test_composition_agrees_with_a_sum_in_float64(any_base: Base) -> None:
    terms = some_terms(any_base, 3)
    for name, found in compose(any_base, terms).items():
        weight = any_base.tensor(name).double()
        wanted = weight.clone()
        for term in terms:
            if isinstance(term.delta, TextMap):
                wanted += term.strength * weight @ term.delta.up.double() @ term.delta.down.double().T
            elif isinstance(term.delta, LowRank):
                up, down = term.delta.factors[name]
                wanted += term.strength * up.double() @ down.double()
            elif name in term.delta.changes:
                wanted += term.strength * term.delta.changes[name].double()
        # One unit in the last place: the sums above are not sorted.
        assert torch.allclose(found.double(), wanted, rtol=2 * torch.finfo(found.dtype).eps, atol=1e-7)


def test_nothing_composed_is_the_base(base: Base) -> None:
    assert compose(base, []) == {}
    assert composition_digest(base, {}) == base.fingerprint


def test_a_thousand_random_changes_end_in_the_same_bits_and_restore_the_base(base: Base) -> None:
    pipe = tiny_pipeline().to(dtype=torch.float16)
    pristine = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    overlay, terms, rng = Overlay(pipe, base), some_terms(base, 5), random.Random(0)
    present: dict[str, Term] = {}
    for _ in range(1000):
        term = rng.choice(terms)
        if present.pop(term.id, None) is None:
            present[term.id] = term
        overlay.set(present.values())
    fresh = tiny_pipeline().to(dtype=torch.float16)
    Overlay(fresh, base).set(present.values())
    assert equal(dict(pipe.unet.state_dict()), dict(fresh.unet.state_dict()))
    assert present
    assert not equal(dict(pipe.unet.state_dict()), pristine)
    overlay.clear()
    assert equal(dict(pipe.unet.state_dict()), pristine)


def test_subtracting_would_not_restore() -> None:
    """Why nothing is ever subtracted."""
    w, d = (torch.randn(1000, generator=torch.Generator().manual_seed(i)).half() for i in (0, 1))
    assert not torch.equal((w + d) - d, w)


def test_a_sum_of_factors_is_not_a_sum_of_products() -> None:
    """Why factors of different patches are never added."""
    u1, d1, u2, d2 = (torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(4))
    assert not torch.allclose((u1 + u2) @ (d1 + d2), u1 @ d1 + u2 @ d2)


def test_a_failure_half_way_leaves_the_pipeline_as_it_was(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline().to(dtype=torch.float16)
    overlay, terms = Overlay(pipe, base), some_terms(base, 1)
    overlay.set(terms[:1])
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    last = overlay._parameters[base.readers()[-1]]
    monkeypatch.setattr(type(last), "copy_", _failing_copy(last), raising=False)
    with pytest.raises(RuntimeError, match="planted"):
        overlay.set(terms[1:3])
    monkeypatch.undo()
    assert equal(dict(pipe.unet.state_dict()), before)
    overlay.set(terms[:1])


def _failing_copy(victim: Tensor):  # type: ignore[no-untyped-def]
    real = torch.Tensor.copy_
    calls: list[int] = []

    def copy_(self: Tensor, source: Tensor) -> Tensor:
        if self is victim and not calls:
            calls.append(1)
            raise RuntimeError("planted")
        return real(self, source)

    return copy_


def test_a_foreign_change_is_noticed_and_refused(base: Base) -> None:
    pipe = tiny_pipeline().to(dtype=torch.float16)
    overlay, terms = Overlay(pipe, base), some_terms(base, 1)
    overlay.set(terms[:1])
    with torch.no_grad():
        overlay._parameters[base.readers()[0]].add_(1)
    with pytest.raises(ForeignChange, match="something else"):
        overlay.clear()


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_not_finite_is_refused(base: Base, strength: float) -> None:
    with pytest.raises(OverpaintError, match="finite"):
        Term("a", some_terms(base, 0)[0].delta, strength)


def test_a_patch_is_composed_once(base: Base) -> None:
    term = some_terms(base, 0)[0]
    with pytest.raises(OverpaintError, match="once"):
        compose(base, [term, term])


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(BadDelta, match="not finite"):
        Dense({"unet/x": torch.tensor([1.0, float("nan")])})


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (TextMap("text_encoder", torch.ones(7, 1), torch.ones(7, 1)), "text width 7"),
        (Dense({"unet/nothing.weight": torch.ones(1)}), "lacks"),
        (TextMap("text_encoder_2", torch.ones(7, 1), torch.ones(7, 1)), "no projection"),
    ],
)
def test_a_delta_that_does_not_fit_is_refused(base: Base, delta: Delta, message: str) -> None:
    with pytest.raises(BadDelta, match=message):
        compose(base, [Term("a", delta)])


def test_a_sum_that_overflows_is_refused(base: Base) -> None:
    name = base.readers()[0]
    with pytest.raises(BadDelta, match="overflows"):
        compose(base, [Term("a", Dense({name: torch.full(base.tensor(name).shape, 1e6)}))])


def test_a_folder_without_a_tensor_it_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OverpaintError, match="not a folder"):
        Base.open(tmp_path / "nowhere")
