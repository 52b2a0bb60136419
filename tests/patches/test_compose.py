"""The laws of composition, over every kind of delta, every dtype and random histories; and how far the arithmetic may be off."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import reduce
from itertools import permutations
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from overpaint.bases.base import Base, BrokenBase, Unchangeable
from overpaint.core.errors import OverpaintError
from overpaint.patches import arithmetic
from overpaint.patches.compose import Term, compose, composition_digest, plan
from overpaint.patches.delta import BadDelta, Delta, Dense, LowRank, Sum, TextMap, Xor
from tests.patches.exact import exactly
from tests.patches.plain_composition import compose_plainly
from tests.small_bases import KINDS, WIDTH, equal, small_base, some_delta, some_terms

FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HALVES = (torch.float16, torch.bfloat16)
BASES = (torch.float32, *HALVES)
KEY, CONV, BIAS = "unet/down.attn2.to_k.weight", "unet/conv.weight", "unet/conv.bias"
seeds = st.integers(0, 10**6)


@pytest.fixture(params=BASES, ids=str, scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return small_base(tmp_path_factory.mktemp("compose") / "base", request.param)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return small_base(tmp_path_factory.mktemp("half") / "base", torch.float16)


# The laws


@FEW
@given(seed=seeds, count=st.integers(0, 12), order=st.randoms(use_true_random=False))
def test_order_does_not_matter(base: Base, seed: int, count: int, order: random.Random) -> None:
    terms = some_terms(base, seed, count)
    shuffled = list(terms)
    order.shuffle(shuffled)
    assert equal(compose(base, terms), compose(base, shuffled))


def test_order_does_not_matter_where_float64_itself_depends_on_it(base: Base) -> None:
    """Why terms are sorted: added as they come, these would be off by one."""
    assert 2.0**60 + 1 - 2.0**60 != 2.0**60 - 2.0**60 + 1
    values = {"a": 2.0**60, "b": 1.0, "c": -(2.0**60)}
    terms = [Term(id, Dense({BIAS: torch.full((4,), value, dtype=torch.float64)})) for id, value in values.items()]
    results = [compose(base, order) for order in permutations(terms)]
    assert all(equal(found, results[0]) for found in results)


def test_nothing_composed_is_the_base(base: Base) -> None:
    assert compose(base, []) == {}
    assert composition_digest(base, {}) == base.fingerprint


def test_subtracting_would_not_restore() -> None:
    """Why nothing is ever subtracted."""
    w, d = (torch.randn(1000, generator=torch.Generator().manual_seed(i)).half() for i in (0, 1))
    assert not torch.equal((w + d) - d, w)


@FEW
@given(seed=seeds)
def test_the_same_input_gives_the_same_bytes(base: Base, seed: int) -> None:
    again = Base.open(base.path)
    one, two = compose(base, some_terms(base, seed)), compose(again, some_terms(again, seed))
    assert composition_digest(base, one) == composition_digest(again, two)


def test_composing_leaves_base_and_deltas_as_they_are(base: Base) -> None:
    terms = some_terms(base, 1)
    before, digests = base.tensors(base.names), [term.delta.digest for term in terms]
    compose(base, terms)
    assert equal(base.tensors(base.names), before)
    assert [some_terms(base, 1)[i].delta.digest for i in range(len(terms))] == digests


@FEW
@given(seed=seeds, kind=st.sampled_from(KINDS))
def test_a_strength_of_zero_is_no_patch(base: Base, seed: int, kind: str) -> None:
    """Not even the sign of a zero changes."""
    others = some_terms(base, seed, 3)
    idle = Term("idle", some_delta(base, kind, seed), 0.0)
    assert equal(compose(base, [*others, idle]), compose(base, others))


# Plainly


@FEW
@given(seed=seeds, count=st.integers(1, 12))
def test_composing_gives_what_the_plain_reference_gives(base: Base, seed: int, count: int) -> None:
    """Without residual bits: where two roundings differ by a unit, flipping their bits makes that several."""
    terms = [term for term in some_terms(base, seed, count) if not term.delta.has_bits]
    composed, plain = compose(base, terms), compose_plainly(base, terms)
    assert composed.keys() == plain.keys()
    for name, value in composed.items():
        # Both round once to the base's dtype, on top of float32 products.
        room = 4 * torch.finfo(value.dtype).eps
        assert torch.allclose(value.double(), plain[name].double(), rtol=room, atol=room), name


@pytest.mark.parametrize("kind", ["low-rank", "dense", "sum", "xor"])
def test_one_patch_of_float32_arrays_has_the_bits_of_the_plain_reference(base: Base, kind: str) -> None:
    """A sum of one product per tensor leaves nothing to the order of additions."""
    terms = [Term("a", some_delta(base, kind, 3))]
    assert equal(compose(base, terms), compose_plainly(base, terms))


def test_factors_and_change_of_every_delta_agree(base: Base) -> None:
    for kind in ("text-map", "low-rank", "sum"):
        planned = plan(base, [Term("a", some_delta(base, kind, 2, rank=2), 0.5)])
        for name in planned.names:
            original = base.tensor(name)
            for _, part in planned.pieces[name]:
                if (factors := part.thin_factors(base, name, original)) is None:
                    assert part.directions(name) is None
                    continue
                assert factors[0].shape[1] == part.directions(name) == 2
                change = part.change(base, name, original)
                product = (factors[0] @ factors[1]).reshape(original.shape)
                assert torch.allclose(change, product, rtol=1e-12, atol=1e-15)


def test_the_change_of_a_plan_is_what_composing_adds(base: Base) -> None:
    for count in (1, 2, 7):
        planned = plan(base, some_terms(base, 11, count))
        for name in planned.names:
            added = planned.tensor(name).double() - base.tensor(name).double()
            room = 4 * torch.finfo(base.tensor(name).dtype).eps
            assert torch.allclose(planned.change(name), added, rtol=room, atol=room)


# Plans


def test_a_plan_reads_no_tensor_before_one_is_asked_for(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    terms, real = some_terms(base, 4), Base.tensor
    read: list[str] = []

    def tensor(self: Base, name: str) -> Tensor:
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(Base, "tensor", tensor)
    planned = plan(base, terms)
    assert planned.names == sorted(planned.names)
    assert read == []
    value = planned.tensor(KEY)
    assert read == [KEY]
    monkeypatch.undo()
    assert torch.equal(value, compose(base, terms)[KEY])
    assert torch.equal(value, planned.tensor(KEY))


def test_tensors_may_be_asked_for_in_any_order(base: Base) -> None:
    planned, whole = plan(base, some_terms(base, 7, 10)), compose(base, some_terms(base, 7, 10))
    assert equal({name: planned.tensor(name) for name in reversed(planned.names)}, whole)


def test_blocks_of_rows_only_save_memory(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = [Term(kind, some_delta(base, kind, 5)) for kind in ("dense", "xor")]
    whole = compose(base, terms)
    monkeypatch.setattr(arithmetic, "BLOCK", 2 * WIDTH)
    assert equal(compose(base, terms), whole)


# Accuracy


Matrix = list[list[Fraction]]


def matrix(values: Tensor) -> Matrix:
    """A tensor in exact arithmetic; a kernel's rows are its output channels, a vector's its values."""
    return [[Fraction(v) for v in row] for row in values.double().reshape(values.shape[0], -1).tolist()]


def product(a: Matrix, b: Matrix) -> Matrix:
    return [
        [sum((x * y for x, y in zip(row, column, strict=True)), Fraction()) for column in zip(*b, strict=True)]
        for row in a
    ]


def plus(a: Matrix, b: Matrix, times: Fraction) -> Matrix:
    return [[x + times * y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def magnitude(a: Matrix) -> Matrix:
    return [[abs(x) for x in row] for row in a]


def flat(a: Matrix) -> list[Fraction]:
    return [x for row in a for x in row]


def exact(base: Base, name: str, terms: list[Term]) -> tuple[Matrix, Matrix, Matrix]:
    """The composed values in exact arithmetic, and the sums of all magnitudes: of text maps, and of everything else."""
    weight = matrix(base.tensor(name))
    total, texts, rest = weight, plus(weight, weight, Fraction(-1)), magnitude(weight)
    for term in terms:
        part, strength = term.delta, Fraction(term.strength)
        if isinstance(part, TextMap) and name in part.targets(base):
            factors = [weight, matrix(part.up), matrix(part.down.T)]
        elif isinstance(part, LowRank) and name in part.factors:
            factors = [matrix(factor) for factor in part.factors[name]]
        elif isinstance(part, Dense):
            factors = [matrix(part.changes[name])]
        else:
            continue
        total = plus(total, reduce(product, factors), strength)
        size = reduce(product, map(magnitude, factors))
        if isinstance(part, TextMap):
            texts = plus(texts, size, abs(strength))
        else:
            rest = plus(rest, size, abs(strength))
    return total, texts, rest


def unit(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The distance between neighbouring values of a dtype around a value."""
    digits, least = {torch.float16: (11, -14), torch.bfloat16: (8, -126), torch.float32: (24, -126)}[dtype]
    exponent = max(math.frexp(float(value))[1] - 1, least) if value else least
    return Fraction(2) ** (exponent - digits + 1)


@pytest.mark.parametrize("rank", [1, 2, 5], ids=lambda r: f"{r} directions")
@pytest.mark.parametrize("name", [KEY, CONV, BIAS])
def test_the_arithmetic_is_as_exact_as_promised(base: Base, name: str, rank: int) -> None:
    """The bound of the module `arithmetic`; more than WIDTH / 4 directions are applied in float32."""
    deltas = [some_delta(base, kind, seed, rank) for seed, kind in enumerate(KINDS[:3])]
    terms = [Term(str(i), delta, s) for i, (delta, s) in enumerate(zip(deltas, (0.7, -1.3, 2.1), strict=True))]
    eps, single = Fraction(2) ** -53, Fraction(2) ** -24
    count = 2 * WIDTH + rank + len(terms) + 4
    dtype = base.tensor(name).dtype
    text_eps = single if arithmetic.THIN * rank > WIDTH else eps
    for found, wanted, texts, rest in zip(
        *map(flat, (matrix(compose(base, terms)[name]), *exact(base, name, terms))), strict=True
    ):
        bound = count * (text_eps * texts + eps * rest)
        rounding = unit(max(abs(wanted), abs(found)), dtype) / 2 + (single * abs(wanted) if dtype in HALVES else 0)
        assert abs(found - wanted) <= bound + rounding


def test_many_text_maps_agree_with_the_same_applied_one_by_one(base: Base) -> None:
    """Text maps that fill the text width are summed in text space first."""
    terms = [Term(f"{i:03}", some_delta(base, "text-map", i, 2), 0.1) for i in range(50)]
    whole = plan(base, terms)
    weight = base.tensor(KEY).double()
    wanted = weight.clone()
    for term in terms:
        assert isinstance(term.delta, TextMap)
        wanted += 0.1 * weight @ term.delta.up.double() @ term.delta.down.double().T
    change = whole._change(KEY, whole.stacks[KEY], whole.original(KEY))
    assert [type(text) for _, text in change.texts] == [arithmetic.DenseMap]
    # One rounding to the base's dtype, on top of float32 products.
    found = whole.tensor(KEY)
    assert torch.allclose(found.double(), wanted, rtol=torch.finfo(found.dtype).eps, atol=1e-6)


@FEW
@given(seed=seeds, strength=st.floats(-4, 4).filter(bool))
def test_a_float32_sum_of_text_maps_has_the_bits_of_a_float64_sum(base: Base, seed: int, strength: float) -> None:
    terms = [Term(str(i), some_delta(base, "text-map", seed + i, 2), strength) for i in range(5)]
    planned = plan(base, terms)
    original = planned.original(KEY)
    change = planned._change(KEY, planned.stacks[KEY], original)
    assert change._precision(original.values.dtype) == torch.float32
    wide = torch.empty_like(original.values)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(arithmetic.TensorUpdate, "_precision", lambda self, stored: torch.float64)
        change.write(arithmetic.Target(original, wide, arithmetic.ScratchBuffers()))
    assert torch.equal(planned.tensor(KEY), wide)


def test_in_company_and_on_a_float64_base_sums_stay_float64() -> None:
    square = arithmetic.DenseMap(torch.eye(4))
    alone, apart = ((slice(0, 4), square),), ((slice(0, 4), square), (slice(4, 8), square))
    array, thin = (torch.ones(2, 4), 1.0), arithmetic.FactoredMap(torch.ones(1, 4).double(), torch.ones(1, 4).double())
    for texts in (alone, apart):
        assert arithmetic.TensorUpdate(texts)._precision(torch.float16) == torch.float32
        assert arithmetic.TensorUpdate(texts)._precision(torch.float64) == torch.float64
        assert arithmetic.TensorUpdate(texts, arrays=(array,))._precision(torch.float16) == torch.float64
    assert arithmetic.TensorUpdate()._precision(torch.float32) == torch.float64
    for other in (alone[0], (slice(4, 8), thin)):
        assert arithmetic.TensorUpdate((*alone, other))._precision(torch.float32) == torch.float64


def test_patches_on_many_tensors_are_sorted_once(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where something else lies on one of them."""
    asked, real = list[int](), arithmetic.side_by_side

    def counted(
        maps: Sequence[tuple[TextMap, float]], work: arithmetic.ScratchBuffers
    ) -> arithmetic.FactoredMap | arithmetic.DenseMap:
        asked.append(len(maps))
        return real(maps, work)

    monkeypatch.setattr("overpaint.patches.compose.side_by_side", counted)
    terms = [Term(f"{i:03}", some_delta(base, "text-map", i)) for i in range(20)]
    planned = plan(base, [*terms, Term("x", some_delta(base, "low-rank", 0, names=[KEY]))])
    for name in planned.names:
        planned.tensor(name)
    assert len(planned.names) > 2
    assert len({id(stack) for stack in planned.stacks.values()}) == 2
    assert asked == [20]


# Residual bits


@FEW
@given(seed=seeds, kind=st.sampled_from(KINDS[:3]))
def test_residual_bits_make_an_import_exact(base: Base, seed: int, kind: str) -> None:
    delta = some_delta(base, kind, seed)
    noise = torch.Generator().manual_seed(seed)
    wanted = {
        name: value + 1e-3 * torch.randn(value.shape, generator=noise).to(value.dtype)
        for name, value in compose(base, [Term("a", delta)]).items()
    }
    imported = exactly(base, delta, wanted)
    assert isinstance(imported, Sum)
    assert equal(compose(base, [Term("a", imported)]), wanted)


def test_an_import_that_is_exact_needs_no_bits(base: Base) -> None:
    delta = some_delta(base, "low-rank", 1)
    assert exactly(base, delta, compose(base, [Term("a", delta)])) is delta


def test_residual_bits_reach_values_that_no_difference_could(base: Base) -> None:
    """1 - 1e-20 is 1 in float64: only bits give 1e-20 back."""
    zero, tiny = Dense({BIAS: -base.tensor(BIAS).double()}), torch.full_like(base.tensor(BIAS), 6e-8)
    assert torch.equal(compose(base, [Term("a", exactly(base, zero, {BIAS: tiny}))])[BIAS], tiny)


@FEW
@given(seed=seeds, strength=st.sampled_from((-1.0, 0.5, 2.0)))
def test_in_company_residual_bits_count_as_the_difference_they_make(base: Base, seed: int, strength: float) -> None:
    imported, other = some_delta(base, "sum", seed), some_delta(base, "low-rank", seed + 9)
    made = compose(base, [Term("a", imported)])
    differences = Dense({name: value.double() - base.tensor(name).double() for name, value in made.items()})
    together = compose(base, [Term("a", imported, strength), Term("b", other)])
    assert equal(together, compose(base, [Term("b", other), Term("c", differences, strength)]))


def test_bits_that_do_not_fit_the_base_are_refused(base: Base) -> None:
    wrong = torch.int16 if base.tensor(BIAS).element_size() == 4 else torch.int32
    for at, mask in (([9], torch.int32), ([0], wrong)):
        delta = Xor({BIAS: (torch.tensor(at, dtype=torch.int32), torch.ones(1, dtype=mask))})
        with pytest.raises(BadDelta, match="another base"):
            plan(base, [Term("a", delta)])


def test_an_import_must_know_all_it_changes(base: Base) -> None:
    delta = some_delta(base, "dense", 0, names=[BIAS])
    with pytest.raises(BadDelta, match="no edited value"):
        exactly(base, delta, {})
    with pytest.raises(BadDelta, match="convert the import"):
        exactly(base, delta, {BIAS: base.tensor(BIAS).double()})


# What is refused


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_not_finite_is_refused(base: Base, strength: float) -> None:
    with pytest.raises(OverpaintError, match="finite"):
        Term("a", some_delta(base, "dense", 0), strength)


def test_a_patch_is_composed_once(base: Base) -> None:
    term = some_terms(base, 0)[0]
    with pytest.raises(OverpaintError, match="once"):
        compose(base, [term, term])


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (TextMap("text_encoder", torch.ones(7, 1), torch.ones(7, 1)), "text width 7"),
        (TextMap("text_encoder_2", torch.ones(7, 1), torch.ones(7, 1)), "no projection"),
        (Dense({"unet/nothing.weight": torch.ones(1)}), "lacks"),
        (Dense({BIAS: torch.ones(5)}), r"shape \[4\], but the change is for \[5\]"),
        (LowRank({KEY: (torch.ones(5, 1), torch.ones(1, 8))}), "another architecture"),
        (LowRank({BIAS: (torch.ones(4, 1), torch.ones(1, 1))}), "another architecture"),
        (LowRank({CONV: (torch.ones(4, 1), torch.ones(1, 3))}), r"shape \[4, 3, 3, 3\]"),
    ],
)
def test_a_delta_that_does_not_fit_is_refused_before_anything_is_read(
    half: Base, delta: Delta, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Base, "_read")
    with pytest.raises(BadDelta, match=message):
        plan(half, [Term("a", delta, 0.0)])


OVERFLOWING: list[Callable[[Base], Delta]] = [
    lambda base: Dense({KEY: torch.full(base.places[KEY].shape, 1e38)}) * 100,
    lambda base: LowRank({KEY: (torch.full((6, 1), 1e20), torch.full((1, 8), 1e20))}),
    lambda base: TextMap("text_encoder", torch.eye(8)[:, :1] * 1e20, torch.ones(8, 1) * 1e20),
    lambda base: TextMap("text_encoder", torch.eye(8) * 1e20, torch.eye(8) * 1e20),
    lambda base: Sum((Dense({KEY: torch.full(base.places[KEY].shape, 1e38)}) * 100, some_delta(base, "xor", 0))),
]


@pytest.mark.parametrize("make", OVERFLOWING)
def test_a_sum_that_overflows_is_refused(base: Base, make: Callable[[Base], Delta]) -> None:
    with pytest.raises(BadDelta, match=r"overflows .* under patches a; lower"):
        compose(base, [Term("a", make(base))])


@FEW
@given(seed=seeds, kind=st.sampled_from(KINDS))
def test_no_composed_value_exceeds_its_bound(base: Base, seed: int, kind: str) -> None:
    """Values are only searched for an overflow where the bound leaves room for one."""
    planned = plan(base, [Term("a", some_delta(base, kind, seed, 3), 1.7), Term("b", some_delta(base, "dense", seed))])
    for name in planned.names:
        original = planned.original(name)
        bound = planned._change(name, planned.stacks[name], original).bound(original.peak)
        assert planned.tensor(name).double().abs().max() <= bound * (1 + torch.finfo(original.values.dtype).eps)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_with_values_that_are_not_finite_is_refused(half: Base, tmp_path: Path, value: float) -> None:
    broken = small_base(tmp_path / "broken", torch.float16)
    file = broken.places[KEY].file
    tensors = safetensors.torch.load_file(file)
    tensors["down.attn2.to_k.weight"][1, 1] = value
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(BrokenBase, match=KEY):
        compose(Base.open(broken.path), some_terms(half, 0, 1))


def test_a_tensor_of_whole_numbers_is_refused(tmp_path: Path) -> None:
    whole = small_base(tmp_path / "whole", torch.float16)
    file = whole.places[KEY].file
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: v.to(torch.int8) for k, v in tensors.items()}, file)
    with pytest.raises(Unchangeable, match="is int8, whose steps"):
        compose(Base.open(whole.path), [Term("a", Dense({BIAS: torch.ones(4)}))])


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OverpaintError, match="not a folder"):
        Base.open(tmp_path / "nowhere")
