"""The loop resumes where it stopped, and what is baked into weights changes no picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tools.emoji_base import autoencoder, text_encoders, transformer
from tools.emoji_base.loop import Place, Schedule, train


def _fit(folder: Path, steps: int, stop_at: int | None = None) -> Tensor:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        if step == stop_at:
            raise RuntimeError("power cut")
        x = torch.randn(8, 3, generator=generator)
        loss: Tensor = (module(x) - x.sum(1, keepdim=True)).square().mean()
        return loss

    place = Place(folder, folder, folder, torch.device("cpu"))
    train("line", module, loss_of, place, Schedule(steps, 8, 0.1, warm=5))
    return module.weight.detach().clone()


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.emoji_base.loop.SAVE_EVERY", 0.0)
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    whole = _fit(tmp_path / "whole", 40)
    with pytest.raises(RuntimeError, match="power cut"):
        _fit(tmp_path / "halves", 40, stop_at=17)
    assert torch.equal(whole, _fit(tmp_path / "halves", 40))


def test_the_rate_warms_up_stays_and_falls() -> None:
    schedule = Schedule(steps=1000, batch=1, lr=1.0, warm=100, fall=0.4)
    assert schedule.rate(0) == pytest.approx(0.01)
    assert schedule.rate(100) == schedule.rate(599) == 1.0
    assert schedule.rate(999) < 0.02


def test_normalised_latents_decode_to_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae: Any = autoencoder.architecture()
    vae.eval()
    pictures = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8)
    latents = autoencoder.encoded(vae, pictures)
    before = autoencoder.decoded(vae, latents)
    other = transformer.normalised(vae, latents)
    found = autoencoder.encoded(other, pictures)
    assert found.mean((0, 2, 3)).abs().max() < 1e-4
    assert (found.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert (autoencoder.decoded(other, found) - before).abs().max() < 1e-4


def test_the_transformer_hears_both_inputs() -> None:
    torch.manual_seed(0)
    tok = text_encoders.t5_tokenizer()
    model = transformer.Model(transformer.architecture(), text_encoders.t5(tok))
    for weight in model.transformer.proj_out.parameters():
        nn.init.normal_(weight)
    clip = torch.zeros(2, text_encoders.LENGTH, 2 * text_encoders.CLIP_WIDTH)
    tokens = text_encoders.ids(tok, ["a cat", "a dog"])
    found = model(
        torch.zeros(2, 8, 8, 8), torch.full((2,), 0.5), clip, torch.zeros(2, 2 * text_encoders.POOLED), tokens
    )
    assert found.shape == (2, 8, 8, 8)
    assert not torch.allclose(found[0], found[1])
