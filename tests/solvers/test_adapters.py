"""What is trained is what the delta says, and taking it off gives the base back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.patches.delta import Delta, Dense, LowRank, Sum, TextMap
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.trained.adapters import (
    Adapter,
    AdapterStack,
    DenseAdapter,
    LowRankAdapter,
    TextMapAdapter,
    encoder_layer_tensors,
    layers,
    modules_by_parameter,
)
from overpaint.solvers.trained.denoiser import Conditioning, Denoiser

Make = Callable[[Denoiser, Base], Adapter]


def weights(model: Denoiser, base: Base) -> Adapter:
    return DenseAdapter(model.pipe, base, layers(base))


def factors(model: Denoiser, base: Base) -> Adapter:
    return LowRankAdapter(model.pipe, base, layers(base), 2, torch.Generator().manual_seed(0))


@pytest.fixture
def model(base: Base) -> Denoiser:
    return Denoiser.of(EditProblem(base, Concept("cat")))


@torch.no_grad()
def stir(change: Adapter, seed: int = 1) -> None:
    """Move everything that can be trained."""
    random = torch.Generator().manual_seed(seed)
    for parameter in change.parameters:
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))


def asked(model: Denoiser, batch: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    random = torch.Generator().manual_seed(2)
    x = torch.randn((batch, *model.shape), generator=random)
    return x, torch.tensor([900, 3])[:batch], model.hidden(["a cat", "a photo of a dog"][:batch])


@torch.no_grad()
def lay(delta: Delta, pipe: Any, base: Base) -> None:
    """Add a delta to a pipeline's weights in float32, where composition would round to the base's own dtype."""
    modules = modules_by_parameter(pipe, base)
    for part in delta.parts:
        for name in part.targets(base):
            weight = getattr(modules[name], name.rpartition(".")[2])
            if isinstance(part, Dense):
                weight += part.changes[name]
            elif isinstance(part, LowRank):
                up, down = part.factors[name]
                weight += (up @ down).view_as(weight)
            else:
                assert isinstance(part, TextMap)
                weight += weight @ part.up @ part.down.T


@pytest.mark.parametrize("make", [weights, factors])
def test_the_delta_holds_what_was_trained(base: Base, model: Denoiser, make: Make) -> None:
    """Linear layers and convolutions, with and without stride; float32 rounding in another order."""
    change = make(model, base)
    stir(change)
    other = Denoiser.of(EditProblem(base, Concept("cat")), shared=False)
    lay(change.delta(), other.pipe, base)
    found, expected, before = model(*asked(model)), other(*asked(model)), None
    with change.off():
        before = model(*asked(model))
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())
    assert not torch.allclose(found, before, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("make", [weights, factors])
@torch.no_grad()
def test_off_is_the_base_to_the_bit_and_only_for_a_while(base: Base, model: Denoiser, make: Make) -> None:
    before = model(*asked(model))
    change = make(model, base)
    stir(change)
    trained = model(*asked(model))
    for gives_up in (False, True):
        with suppress(KeyboardInterrupt), change.off():
            assert torch.equal(model(*asked(model)), before)
            if gives_up:
                raise KeyboardInterrupt
    assert torch.equal(model(*asked(model)), trained)
    assert not torch.equal(trained, before)


@torch.no_grad()
def test_adapters_change_nothing_before_they_are_trained(base: Base, model: Denoiser) -> None:
    before = model(*asked(model))
    factors(model, base)
    assert torch.equal(model(*asked(model)), before)


def test_a_text_map_in_training_is_the_text_map_that_comes_out(base: Base, model: Denoiser) -> None:
    projection = TextMapAdapter(
        "text_encoder", model.inputs["text_encoder"].width, 3, torch.Generator().manual_seed(0), model.device
    )
    stir(projection)
    x, t, text = asked(model)
    found = model(x, t, text.map(projection))
    assert torch.allclose(projection.size(), (projection.parameters[0] @ projection.parameters[1].T).square().sum())
    with projection.off():
        assert torch.equal(projection(text.sequence), text.sequence)
    lay(projection.delta(), model.pipe, base)
    expected = model(x, t, text)
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())


def test_changes_of_several_kinds_train_as_one(base: Base, model: Denoiser) -> None:
    random = torch.Generator().manual_seed(0)
    names = encoder_layer_tensors(base, feed_forward=1, attention=0)
    thin = LowRankAdapter(model.pipe, base, [name for name in names if name.endswith("weight")], 1, random)
    both = AdapterStack(
        thin, TextMapAdapter("text_encoder", model.inputs["text_encoder"].width, 1, random, model.device)
    )
    stir(both)
    assert len(both.parameters) == 6
    delta = both.delta()
    assert isinstance(delta, Sum)
    assert [part.kind for part in delta.parts] == ["text-map", "low-rank"]
    with both.off(), torch.no_grad():
        assert torch.equal(model.encode(["a cat"]).sequence, model.hidden(["a cat"]).sequence)


@pytest.mark.parametrize("make", [weights, factors])
def test_checkpointing_gives_the_same_gradients(base: Base, make: Make) -> None:
    gradients = []
    for checkpoint in (False, True):
        model = Denoiser.of(EditProblem(base, Concept("cat")), checkpoint=checkpoint)
        change = make(model, base)
        stir(change)
        with torch.no_grad(), change.off():
            before = model(*asked(model))
        (model(*asked(model)) - before).square().mean().backward()
        gradients.append([p.grad for p in change.parameters])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [weights, factors])
def test_half_precision_keeps_gradients_after_the_teacher_was_asked(base: Base, make: Make) -> None:
    """Weights that autocast has cast without gradients must not be used again where gradients are wanted."""
    model = Denoiser.of(EditProblem(base, Concept("cat")), precision="bf16")
    change = make(model, base)
    stir(change)
    with torch.no_grad():
        model(*asked(model))
    found = model(*asked(model))
    found.square().mean().backward()
    assert found.dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for p in change.parameters)
