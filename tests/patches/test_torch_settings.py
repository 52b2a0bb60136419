"""What PyTorch is set to by a caller changes no bit of what is composed, written, read or encoded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.patches.build import build
from overpaint.patches.compose import Term, compose, composition_digest
from overpaint.patches.delta import Dense, LowRank, TextMap
from overpaint.patches.inspect import inspect
from overpaint.patches.live import Overlay
from overpaint.patches.patch import make_patch, read_patch
from tests.patches.exact import exactly
from tests.small_bases import WIDTH, equal, small_base, small_pipeline, weights
from tests.torch_settings import SETTINGS

CONV, KEY = "unet/conv.weight", "unet/down.attn2.to_k.weight"


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[object]]:
    return SETTINGS[request.param]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return small_base(tmp_path_factory.mktemp("settings") / "base", torch.float32)


@pytest.fixture(scope="module")
def terms(small: Base) -> list[Term]:
    """More text maps than a quarter of the text width, a map of few directions is among them, factors and an array."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng) * 0.1

    maps = [Term(f"t{i}", TextMap("text_encoder", draw(WIDTH, 1), draw(WIDTH, 1)), 1 + i / 7) for i in range(6)]
    low = LowRank({CONV: (draw(4, 2), draw(2, 27)), KEY: (draw(6, 1), draw(1, WIDTH))})
    tiny = Dense({"unet/up.attn2.to_v.weight": torch.full((5, WIDTH), 1e-40)})
    return [*maps, Term("u", low, 0.3), Term("v", Dense({KEY: draw(6, WIDTH)})), Term("w", tiny)]


@pytest.mark.parametrize("count", [2, 6, 9])
def test_composing_gives_the_same_bits(
    small: Base, terms: list[Term], count: int, setting: Callable[[], AbstractContextManager[object]]
) -> None:
    wanted = compose(small, terms[:count])
    digest = composition_digest(small, wanted)
    with setting():
        found = compose(small, terms[:count])
        assert composition_digest(Base.open(small.path), found) == digest
    assert equal(found, wanted)


def test_a_pipeline_carries_and_gives_back_the_same_bits(
    small: Base, terms: list[Term], setting: Callable[[], AbstractContextManager[object]]
) -> None:
    """Also where it was changed under one setting and is verified and restored under another."""
    pipe = small_pipeline()
    before = weights(pipe)
    with setting():
        overlay = Overlay(pipe, small)
        overlay.set(terms)
        overlay.verify()
        overlay.remove("t3")
    wanted = compose(small, [term for term in terms if term.id != "t3"])
    assert equal(weights(pipe), {**before, **wanted})
    overlay.verify()
    overlay.add(terms[3])
    with setting():
        overlay.close()
    assert equal(weights(pipe), before)


def test_building_and_inspecting_give_the_same_files(
    base: Base, tmp_path: Path, setting: Callable[[], AbstractContextManager[object]]
) -> None:
    maps = [Term(f"{i}", TextMap("text_encoder", *torch.randn(2, 64, 9) * 0.05)) for i in range(2)]
    wanted = build(base, maps, tmp_path / "wanted")
    with setting():
        found = build(Base.open(base.path), maps, tmp_path / "found")
        assert inspect(found.path).sound
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert found.digest == wanted.digest
    assert (found.path / unet).read_bytes() == (wanted.path / unet).read_bytes()


def test_patches_and_exact_imports_are_the_same(
    small: Base, terms: list[Term], setting: Callable[[], AbstractContextManager[object]]
) -> None:
    delta = terms[0].delta + terms[1].delta + terms[6].delta
    wanted = make_patch(small, Concept("cat"), exactly(small, delta, compose(small, [Term("a", delta)])), {})
    with setting():
        delta = terms[0].delta + terms[1].delta + terms[6].delta
        found = make_patch(small, Concept("cat"), exactly(small, delta, compose(small, [Term("a", delta)])), {})
        assert read_patch(found.blob).id == wanted.id
    assert found.blob == wanted.blob


def test_prompts_are_encoded_the_same(base: Base, setting: Callable[[], AbstractContextManager[object]]) -> None:
    wanted = TextEncoder.of(base).hidden(["a photo of a cat", ""])
    with setting():
        found = TextEncoder.of(base).hidden(["a photo of a cat", ""])
    assert torch.equal(found, wanted)


def test_a_pipeline_loads_with_the_base_values(
    base: Base, setting: Callable[[], AbstractContextManager[object]]
) -> None:
    with setting():
        pipe = base.pipeline()
    name = "unet/conv_in.weight"
    assert torch.equal(pipe.unet.conv_in.weight.detach(), base.tensor(name).float())


def test_the_settings_of_the_caller_come_back(setting: Callable[[], AbstractContextManager[object]]) -> None:
    def state() -> list[object]:
        return [
            torch.is_autocast_enabled("cpu"),
            torch.get_default_device(),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            float("0") == 5e-324,
        ]

    usual = state()
    with setting():
        before = state()
        with own_torch_settings():
            assert state() == usual
        with pytest.raises(ZeroDivisionError), own_torch_settings():
            raise ZeroDivisionError
        assert state() == before
    assert state() == usual
