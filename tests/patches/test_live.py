"""Patches on a loaded pipeline: what is there is the composition, what was there comes back, and nobody is overwritten."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from overpaint.bases.base import Base, BrokenBase
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.patches.compose import CompositionPlan, Term, compose
from overpaint.patches.delta import BadDelta, Dense, TextMap
from overpaint.patches.live import BadPipeline, ForeignChange, Overlay
from overpaint.testing import tiny_pipeline
from overpaint.testing.contract import tiny_base
from tests.small_bases import WIDTH, equal, small_base, small_pipeline, some_delta, some_terms, weights

KEY, VALUE, OTHER = (f"unet/{n}.weight" for n in ("down.attn2.to_k", "down.attn2.to_v", "up.attn2.to_v"))
CONV, LAST = "unet/conv.weight", "unet/up.attn2.to_v.weight"
BASES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=BASES, ids=str, scope="module")
def any_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return small_base(tmp_path_factory.mktemp("live") / "base", request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return small_base(tmp_path_factory.mktemp("small") / "base", torch.float32)


def a_text_map(seed: int = 0, id: str = "a", strength: float = 1.0) -> Term:
    rng = torch.Generator().manual_seed(seed)
    return Term(id, TextMap("text_encoder", *(torch.randn(2, WIDTH, 1, generator=rng))), strength)


def expected(base: Base, pristine: dict[str, Tensor], terms: list[Term]) -> dict[str, Tensor]:
    """What a pipeline must hold: the composition in the base's dtype, cast to the pipeline's."""
    return {**pristine, **{name: t.to(pristine[name].dtype) for name, t in compose(base, terms).items()}}


def pipeline_of(base: Base, dtype: torch.dtype | None = None) -> Any:
    """The small pipeline with the base's own values, cast."""
    pipe = small_pipeline(base.tensor(KEY).dtype)
    for model in vars(pipe).values():
        model.to(dtype or base.tensor(KEY).dtype)
    return pipe


@pytest.mark.parametrize("dtype", BASES, ids=str)
def test_a_pipeline_carries_the_composition_and_gives_it_back(any_base: Base, dtype: torch.dtype) -> None:
    """Also in another dtype than the base's: composed in the base's own, then cast."""
    pipe = pipeline_of(any_base, dtype)
    pristine, terms = weights(pipe), some_terms(any_base, 1, 8)
    overlay = Overlay(pipe, any_base)
    overlay.set(terms)
    assert equal(weights(pipe), expected(any_base, pristine, terms))
    assert not equal(weights(pipe), pristine)
    assert overlay.touched == sorted(compose(any_base, terms))
    overlay.clear()
    assert equal(weights(pipe), pristine)
    assert overlay.touched == []


def test_a_thousand_random_changes_end_in_the_same_bits_and_restore_the_base(any_base: Base) -> None:
    pipe = pipeline_of(any_base)
    pristine, terms, rng = weights(pipe), some_terms(any_base, 5, 10, [KEY, CONV]), random.Random(0)
    overlay, present = Overlay(pipe, any_base), dict[str, Term]()
    for i in range(1000):
        term = rng.choice(terms)
        if term.id in present and rng.random() < 0.6:
            del present[term.id]
            overlay.remove(term.id)
        else:
            present[term.id] = Term(term.id, term.delta, rng.uniform(-2, 2))
            overlay.add(present[term.id])
        if i % 100 == 99:
            assert equal(weights(pipe), expected(any_base, pristine, list(present.values())))
    assert present
    fresh = pipeline_of(any_base)
    Overlay(fresh, any_base).set(present.values())
    assert equal(weights(pipe), weights(fresh))
    overlay.clear()
    assert equal(weights(pipe), pristine)


def test_adding_again_changes_the_strength(small: Base) -> None:
    pipe = small_pipeline()
    pristine, overlay = weights(pipe), Overlay(pipe, small)
    overlay.add(a_text_map())
    overlay.add(a_text_map(strength=0.5))
    assert overlay.terms == (a_text_map(strength=0.5),)
    assert equal(weights(pipe), expected(small, pristine, [a_text_map(strength=0.5)]))


def test_a_patch_that_is_not_there_cannot_be_removed(small: Base) -> None:
    overlay = Overlay(small_pipeline(), small)
    overlay.add(a_text_map())
    with pytest.raises(NotFound, match="is not on this pipeline"):
        overlay.remove("b")
    assert overlay.terms == (a_text_map(),)


def test_a_block_ends_with_what_was_carried_before(small: Base) -> None:
    pipe, (first, second) = small_pipeline(), (a_text_map(1, "a"), a_text_map(2, "b"))
    pristine, overlay = weights(pipe), Overlay(pipe, small)
    with overlay.applied([first]):
        one = weights(pipe)
        with overlay.applied([first, second]):
            assert not equal(weights(pipe), one)
        assert equal(weights(pipe), one)
    assert equal(weights(pipe), pristine)


def test_a_block_that_fails_ends_like_any_other(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    with pytest.raises(ZeroDivisionError), overlay.applied([a_text_map()]):
        raise ZeroDivisionError
    assert equal(weights(pipe), weights(small_pipeline()))


# Only what changed


def versions(pipe: Any) -> dict[str, int]:
    return {name: p._version for name, p in pipe.unet.named_parameters()}


def test_only_tensors_on_which_something_else_lies_are_written(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    overlay.set([a_text_map()])
    before = versions(pipe)
    overlay.add(Term("b", some_delta(small, "low-rank", 0, names=[OTHER])))
    assert {n for n, v in versions(pipe).items() if v != before[n]} == {OTHER.removeprefix("unet/")}


def test_what_is_carried_already_is_not_written(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    overlay.set([a_text_map(1, "a"), a_text_map(2, "b")])
    before = versions(pipe)
    overlay.set([a_text_map(2, "b"), a_text_map(1, "a")])
    assert versions(pipe) == before
    assert [term.id for term in overlay.terms] == ["a", "b"]


def test_the_base_is_read_once(small: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = Overlay(small_pipeline(), small)
    overlay.set([a_text_map()])
    monkeypatch.delattr(Base, "_read")
    overlay.clear()
    overlay.set([a_text_map(3)])
    overlay.add(a_text_map(4, "b"))


# All or nothing


def overflowing(name: str = LAST) -> Term:
    return Term("z", Dense({name: torch.full((5, WIDTH), 3e38)}), 10.0)


@pytest.mark.parametrize("before", [[], [a_text_map()]], ids=["nothing before", "a patch before"])
def test_a_patch_that_does_not_fit_half_way_changes_nothing(small: Base, before: list[Term]) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    overlay.set(before)
    kept = weights(pipe)
    with pytest.raises(BadDelta, match="overflows"):
        overlay.set([a_text_map(2, "b"), overflowing()])
    assert equal(weights(pipe), kept)
    assert overlay.terms == tuple(before)
    overlay.set([a_text_map(2, "b")])
    assert equal(weights(pipe), expected(small, weights(small_pipeline()), [a_text_map(2, "b")]))


class Interrupting:
    """A `Plan.write` that is interrupted at some of its calls."""

    def __init__(self, *at: int) -> None:
        self.at, self.calls, self.real = at, 0, CompositionPlan.write

    def __call__(self, plan: CompositionPlan, *args: Any) -> None:
        self.calls += 1
        if self.calls in self.at:
            raise KeyboardInterrupt
        self.real(plan, *args)


@pytest.mark.parametrize("at", range(1, 5))
def test_an_interrupt_at_any_tensor_changes_nothing(small: Base, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    overlay.set([a_text_map()])
    kept, interrupting = weights(pipe), Interrupting(at)
    monkeypatch.setattr(CompositionPlan, "write", lambda *args: interrupting(*args))
    with pytest.raises(KeyboardInterrupt):
        overlay.set([a_text_map(2)])
    assert equal(weights(pipe), kept)


def test_an_interrupt_while_taking_back_is_mended_by_the_next_change(
    small: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    pristine = weights(pipe)
    overlay.set([a_text_map()])
    interrupting = Interrupting(3, 4)
    monkeypatch.setattr(CompositionPlan, "write", lambda *args: interrupting(*args))
    with pytest.raises(KeyboardInterrupt):
        overlay.set([a_text_map(2)])
    monkeypatch.undo()
    overlay.clear()
    assert equal(weights(pipe), pristine)


# Somebody else


def shift(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(0.25)


def shift_data(parameter: nn.Parameter) -> None:
    """As merging a LoRA does; the version counter stays."""
    parameter.data += 0.25


def step(parameter: nn.Parameter) -> None:
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.25).step()
    parameter.grad = None


FOREIGN: list[Callable[[nn.Parameter], None]] = [shift, shift_data, step]


@pytest.mark.parametrize("change", FOREIGN)
@pytest.mark.parametrize("act", [Overlay.clear, lambda o: o.set([a_text_map(2)]), lambda o: o.add(overflowing())])
def test_a_foreign_change_is_noticed_and_left_alone(
    small: Base, change: Callable[[nn.Parameter], None], act: Callable[[Overlay], None]
) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    overlay.set([a_text_map()])
    change(pipe.unet.down.attn2.to_v.weight)
    kept = weights(pipe)
    with pytest.raises(ForeignChange, match=rf"{VALUE} is not what Overpaint left there: something else"):
        act(overlay)
    assert equal(weights(pipe), kept)


@pytest.mark.parametrize("change", FOREIGN)
def test_a_change_from_before_the_first_patch_is_noticed(small: Base, change: Callable[[nn.Parameter], None]) -> None:
    pipe = small_pipeline()
    change(pipe.unet.down.attn2.to_v.weight)
    overlay, kept = Overlay(pipe, small), weights(pipe)
    with pytest.raises(ForeignChange, match="not what the base has there"):
        overlay.set([a_text_map()])
    assert equal(weights(pipe), kept)
    with torch.no_grad():
        pipe.unet.down.attn2.to_v.weight.copy_(small.tensor(VALUE))
    overlay.set([a_text_map()])


def test_a_foreign_change_between_two_patches_is_noticed(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    overlay.set([a_text_map()])
    overlay.clear()
    shift(pipe.unet.down.attn2.to_v.weight)
    with pytest.raises(ForeignChange, match=VALUE):
        overlay.set([a_text_map()])


def test_other_weights_are_none_of_the_overlays_business(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    overlay.set([a_text_map()])
    shift(pipe.unet.conv.weight)
    overlay.set([a_text_map(2)])
    with pytest.raises(ForeignChange, match=CONV):
        overlay.add(Term("b", some_delta(small, "low-rank", 0, names=[CONV])))


def test_a_single_value_changed_behind_all_counters_is_found_by_looking_at_all(tmp_path: Path) -> None:
    pipe: Any = tiny_pipeline(width=256)
    pipe.save_pretrained(tmp_path / "base")
    base = Base.open(tmp_path / "base")
    overlay = Overlay(pipe, base)
    overlay.set([Term("a", TextMap("text_encoder", torch.ones(256, 1), torch.ones(256, 1)))])
    overlay.verify()
    name = base.projections()[0]
    pipe.unet.get_parameter(name.removeprefix("unet/")).detach().numpy()[3, 77] += 1
    with pytest.raises(ForeignChange, match=name):
        overlay.verify()
    with pytest.raises(ForeignChange, match=name):
        overlay.clear()


def test_a_parameter_that_was_replaced_is_not_written_in_vain(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    pristine, projection = weights(pipe), pipe.unet.down.attn2.to_v
    overlay.set([a_text_map()])
    projection.weight = nn.Parameter(projection.weight.detach().clone())
    overlay.clear()
    assert equal(weights(pipe), pristine)
    projection.weight = nn.Parameter(projection.weight.detach() + 1)
    with pytest.raises(ForeignChange, match=VALUE):
        overlay.set([a_text_map()])


def test_a_parameter_that_was_turned_in_memory_is_written_as_it_lies_now(small: Base) -> None:
    """Where neither its address nor its values show it."""
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    pristine, projection = weights(pipe), pipe.unet.down.attn2.to_v
    overlay.set([a_text_map()])
    turned = projection.weight.detach().clone().T.contiguous()
    projection.weight.data = turned.T
    overlay.set([a_text_map(2)])
    assert torch.equal(projection.weight, compose(small, [a_text_map(2)])[VALUE])
    overlay.clear()
    assert equal(weights(pipe), pristine)


class Wrapped(nn.Module):
    """As PEFT wraps a layer, with an adapter beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.adapter = layer, nn.Linear(WIDTH, 6, bias=False)


def test_an_adapter_beside_a_layer_may_come_and_go(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    attention, pristine = pipe.unet.down.attn2, weights(pipe)
    bare = attention.to_v
    overlay.set([a_text_map()])
    attention.to_v = Wrapped(bare)
    overlay.set([a_text_map(2)])
    assert torch.equal(bare.weight, compose(small, [a_text_map(2)])[VALUE])
    with Overlay(pipe, small) as late, pytest.raises(ForeignChange, match=VALUE):
        late.set([Term("b", some_delta(small, "low-rank", 0, names=[VALUE]))])
    attention.to_v = bare
    overlay.clear()
    assert equal(weights(pipe), pristine)


def test_a_layer_that_was_replaced_is_not_written_in_vain(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    overlay.set([a_text_map()])
    pipe.unet.down.attn2.to_v = nn.Linear(WIDTH, 6, bias=False)
    kept = weights(pipe)
    with pytest.raises(ForeignChange, match=VALUE):
        overlay.clear()
    assert equal(weights(pipe), kept)


@pytest.mark.parametrize(
    "move",
    [
        lambda unet: unet.load_state_dict({k: v.clone() for k, v in unet.state_dict().items()}),
        lambda unet: unet.to(memory_format=torch.channels_last),
        lambda unet: unet.double(),
        lambda unet: unet.double().float(),
        lambda unet: unet.half(),
        lambda unet: unet.requires_grad_(False),
    ],
    ids=["loaded again", "channels last", "wider", "there and back", "narrower", "frozen"],
)
def test_what_leaves_the_values_as_they_are_is_no_change(small: Base, move: Callable[[nn.Module], object]) -> None:
    pipe, overlay, terms = (p := small_pipeline()), Overlay(p, small), some_terms(small, 3)
    overlay.set(terms)
    move(pipe.unet)
    overlay.set(terms[:2])
    fresh = small_pipeline()
    move(fresh.unet)
    assert equal(weights(pipe), expected(small, weights(fresh), terms[:2]))
    overlay.clear()
    assert equal(weights(pipe), weights(fresh))


def test_a_loss_of_precision_and_back_is_a_foreign_change(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    overlay.set([a_text_map()])
    pipe.unet.half().float()
    with pytest.raises(ForeignChange):
        overlay.clear()


def test_patched_weights_are_not_taken_for_the_bases(small: Base) -> None:
    """Two pipelines that share a U-Net, each with its overlay: one at a time."""
    one = small_pipeline()
    two = small_pipeline()
    two.unet = one.unet
    pristine, first, second = weights(one), Overlay(one, small), Overlay(two, small)
    first.set([a_text_map()])
    with pytest.raises(ForeignChange, match="another overlay"):
        second.set([a_text_map(2)])
    first.clear()
    second.set([a_text_map(2)])
    assert equal(weights(one), expected(small, pristine, [a_text_map(2)]))
    with pytest.raises(ForeignChange):
        first.set([a_text_map()])
    second.close()
    first.set([a_text_map()])
    first.close()
    assert equal(weights(one), pristine)


# Pipelines of many kinds


def test_a_compiled_model_computes_with_the_patch(small: Base) -> None:
    text = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    plain, pipe = small_pipeline(), small_pipeline()
    pipe.unet.down = torch.compile(pipe.unet.down, backend="eager")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    overlay = Overlay(pipe, small)
    for overlays in ([a_text_map()], [a_text_map(2)], []):
        overlay.set(overlays)
        with Overlay(plain, small).applied(overlays), torch.no_grad():
            assert torch.equal(pipe.unet(text), plain.unet(text))


def test_compiling_after_the_first_patch_changes_nothing(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    pristine = weights(pipe)
    overlay.set([a_text_map()])
    bare = pipe.unet
    pipe.unet = torch.compile(bare, backend="eager")
    overlay.clear()
    pipe.unet = bare
    assert equal(weights(pipe), pristine)


def test_a_channels_last_kernel_is_patched(small: Base) -> None:
    pipe = small_pipeline()
    pipe.unet.to(memory_format=torch.channels_last)
    term = Term("a", some_delta(small, "low-rank", 0, 2, names=[CONV]))
    with Overlay(pipe, small).applied([term]):
        assert pipe.unet.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(pipe.unet.conv.weight, compose(small, [term])[CONV])
    assert torch.equal(pipe.unet.conv.weight, small.tensor(CONV))


def test_weights_from_inference_mode_are_patched(small: Base) -> None:
    with torch.inference_mode():
        pipe = small_pipeline()
    with torch.inference_mode():
        pristine = weights(pipe)
    overlay = Overlay(pipe, small)
    overlay.set([a_text_map()])
    assert torch.equal(pipe.unet.down.attn2.to_v.weight, compose(small, [a_text_map()])[VALUE])
    overlay.verify()
    overlay.clear()
    with torch.inference_mode():
        assert equal(weights(pipe), pristine)


@pytest.mark.parametrize("dtype", BASES, ids=str)
def test_weights_from_inference_mode_and_others_take_turns(small: Base, dtype: torch.dtype) -> None:
    """Memory that was made in inference mode may be written to in it only."""
    pipe = small_pipeline(dtype)
    with torch.inference_mode():
        pipe.unet = small_pipeline(dtype).unet
    terms = [a_text_map(), Term("b", some_delta(small, "dense", 1))]
    overlay = Overlay(pipe, small)
    for _ in range(2):
        overlay.set(terms)
        overlay.verify()
        assert equal(weights(pipe), expected(small, weights(small_pipeline(dtype)), terms))
        overlay.clear()


def test_a_patch_may_be_laid_on_in_inference_mode(small: Base) -> None:
    pipe = small_pipeline()
    with torch.inference_mode():
        overlay = Overlay(pipe, small)
        overlay.set([a_text_map()])
    overlay.clear()
    assert equal(weights(pipe), weights(small_pipeline()))
    pipe.unet(torch.ones(1, WIDTH)).sum().backward()


def without(pipe: Any) -> None:
    del pipe.unet.down.attn2.to_v


def offload(pipe: Any) -> None:
    pipe.unet.down.attn2.to_v.to("meta")


def fuse(pipe: Any) -> None:
    pipe.unet.down.attn2.fused_projections = True


def pack(pipe: Any) -> None:
    """As quantisation does: the same values, another shape."""
    pipe.unet.down.attn2.to_v.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without, f"no parameter {VALUE}"),
        (offload, "offloaded"),
        (fuse, "fused copy"),
        (pack, "quantisation"),
    ],
)
def test_a_pipeline_that_cannot_take_a_patch_is_refused(
    small: Base, spoil: Callable[[Any], None], message: str
) -> None:
    pipe, late = small_pipeline(), small_pipeline()
    spoil(pipe)
    with pytest.raises(BadPipeline, match=message):
        Overlay(pipe, small).set([a_text_map()])
    assert torch.equal(pipe.unet.down.attn2.to_k.weight, small.tensor(KEY))
    overlay = Overlay(late, small)
    spoil(late)
    with pytest.raises((BadPipeline, ForeignChange)):
        overlay.set([a_text_map()])
    assert torch.equal(late.unet.down.attn2.to_k.weight, small.tensor(KEY))


def test_a_pipeline_with_another_model_is_refused(small: Base) -> None:
    pipe = small_pipeline()
    overlay = Overlay(pipe, small)
    pipe.unet = small_pipeline().unet
    with pytest.raises(BadPipeline, match="replaced"):
        overlay.set([a_text_map()])


def test_a_base_with_values_that_are_not_finite_is_refused(small: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Base, "tensor", lambda self, name: torch.full(self.places[name].shape, float("nan")))
    with pytest.raises(BrokenBase, match="not finite"):
        Overlay(small_pipeline(), small).set([a_text_map()])


# Closing


def test_closing_gives_everything_back(small: Base) -> None:
    pipe = small_pipeline()
    pristine = weights(pipe)
    with Overlay(pipe, small) as overlay:
        overlay.set([a_text_map(), Term("b", some_delta(small, "dense", 0))])
        held = [weakref.ref(original.values) for original in overlay._originals.values()]
        held += [weakref.ref(memory) for memory in overlay._work._memory.values()]
        assert len(held) > 4
    gc.collect()
    assert equal(weights(pipe), pristine)
    assert [ref for ref in held if ref() is not None] == []
    overlay.close()
    with pytest.raises(OverpaintError, match="closed"):
        overlay.set([a_text_map()])
    with pytest.raises(OverpaintError, match="closed"):
        overlay.clear()


def test_a_closed_overlay_does_not_keep_the_pipeline(small: Base) -> None:
    pipe = small_pipeline()
    overlay, unet = Overlay(pipe, small), weakref.ref(pipe.unet)
    overlay.set([a_text_map()])
    overlay.close()
    del pipe
    gc.collect()
    assert unet() is None


def test_closing_after_a_foreign_change_says_so_and_lets_go(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    overlay.set([a_text_map()])
    shift(pipe.unet.down.attn2.to_v.weight)
    with pytest.raises(ForeignChange):
        overlay.close()
    assert overlay._originals == {}
    overlay.close()


# On a GPU

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@cuda
@pytest.mark.parametrize("dtype", BASES, ids=str)
def test_a_gpu_gets_the_bits_of_the_cpu(any_base: Base, dtype: torch.dtype) -> None:
    pipe, there, terms = pipeline_of(any_base, dtype), pipeline_of(any_base, dtype), some_terms(any_base, 2, 9)
    for model in vars(there).values():
        model.to("cuda")
    pristine, overlay = weights(pipe), Overlay(there, any_base)
    overlay.set(terms)
    assert equal({n: t.cpu() for n, t in weights(there).items()}, expected(any_base, pristine, terms))
    assert all(original.values.is_pinned() for original in overlay._originals.values())
    overlay.clear()
    assert equal({n: t.cpu() for n, t in weights(there).items()}, pristine)


@cuda
def test_a_pipeline_may_move_to_a_gpu_and_back(small: Base) -> None:
    pipe, overlay = (p := small_pipeline()), Overlay(p, small)
    overlay.set([a_text_map()])
    pipe.unet.to("cuda")
    overlay.set([a_text_map(2)])
    pipe.unet.to("cpu")
    assert equal(weights(pipe), expected(small, weights(small_pipeline()), [a_text_map(2)]))
    overlay.clear()
    assert equal(weights(pipe), weights(small_pipeline()))


@cuda
@pytest.mark.parametrize("change", [shift, shift_data])
def test_a_foreign_change_on_a_gpu_is_noticed(small: Base, change: Callable[[nn.Parameter], None]) -> None:
    pipe = small_pipeline()
    pipe.unet.to("cuda")
    overlay = Overlay(pipe, small)
    overlay.set([a_text_map()])
    change(pipe.unet.down.attn2.to_v.weight)
    with pytest.raises(ForeignChange, match=VALUE):
        overlay.clear()


def test_patches_go_on_again_once_fused_projections_are_undone(tmp_path: Path) -> None:
    """diffusers computes with the copies while an attention has a processor for them; its flag stays afterwards."""
    base, pipe = tiny_base(tmp_path / "base", torch.float32), tiny_pipeline()
    overlay = Overlay(pipe, base)
    overlay.set([Term("a", TextMap("text_encoder", torch.ones(64, 1), torch.ones(64, 1)))])
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(BadPipeline, match="fused copy"):
        overlay.clear()
    pipe.unet.unfuse_qkv_projections()
    overlay.clear()
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(pipe.unet.state_dict()[layer], base.tensor(f"unet/{layer}"))
