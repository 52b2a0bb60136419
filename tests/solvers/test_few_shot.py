"""Few-shot unlearning makes the text encoder forget from a few pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import PromptTooLong, TextEncoder
from overpaint.core.concepts import Concept
from overpaint.patches.compose import Term
from overpaint.patches.delta import Delta
from overpaint.patches.live import Overlay
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.trained.denoiser import Denoiser
from overpaint.solvers.trained.few_shot import FewShot
from overpaint.solvers.trained.training import BadPictures, drawn
from overpaint.testing import SolverContract
from tests.solvers.learning import CAT, WATCHED, names, solve

QUICK: dict[str, Any] = {"steps": 10, "lr": 1e-2, "batch": 4, "pictures": 2, "sampling_steps": 2, "sentences": 4}


class TestContract(SolverContract):
    solver = FewShot
    quick = MappingProxyType({**QUICK, "steps": 2})


def pictures(folder: Path, count: int) -> str:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (16, 16), (60 * i, 20, 90)).save(folder / f"{i}.png")
    return str(folder)


@torch.no_grad()
def loss_of_training(base: Base, delta: Delta | None) -> float:
    """How badly the noise in two of the concept's pictures is predicted, at 32 levels that no training step drew."""
    problem = EditProblem(base, CAT)
    model = Denoiser.of(problem)
    found = drawn(model, problem, ["a cat"], 2, 2, 7.5)
    x, t, goal, _ = model.noised(found.latents, torch.Generator().manual_seed(77), 32)
    with Overlay(model.pipe, base) as overlay:
        overlay.set([Term("a", delta)] if delta is not None else [])
        return float(F.mse_loss(model(x, t, model.encode(["a cat"] * 32)), goal))


def test_the_concepts_pictures_become_hard_to_predict(base: Base) -> None:
    found = solve(base, FewShot(**QUICK, until=WATCHED))
    assert loss_of_training(base, found.delta) > loss_of_training(base, None)
    assert found.diagnostics["left"] != 1.0


def test_feed_forward_layers_and_the_last_attention_are_trained(base: Base) -> None:
    touched = names(solve(base, FewShot(**{**QUICK, "steps": 1})).delta, base)
    expected = {n for n in base.names if ".mlp.fc" in n or ".layers.1.self_attn." in n}
    assert touched == expected
    assert len(expected) == 2 * 4 + 8


def test_pictures_of_a_folder_are_learnt_from_and_named_by_digest(base: Base, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "cats", 3)
    found = solve(base, FewShot(**{**QUICK, "images": folder, "pictures": 3}))
    files = Path(folder).iterdir()
    assert found.diagnostics["images"] == sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    moved_folder = pictures(tmp_path / "elsewhere", 3)
    assert solve(base, FewShot(**{**QUICK, "images": moved_folder, "pictures": 3})).delta == found.delta
    assert solve(base, FewShot(**QUICK)).delta != found.delta


def test_too_few_pictures_are_refused_before_anything_is_trained(base: Base, tmp_path: Path) -> None:
    with pytest.raises(BadPictures, match="at least 4 are needed"):
        solve(base, FewShot(images=pictures(tmp_path / "cats", 3)))


def test_without_pictures_it_learns_from_noise(base: Base) -> None:
    drawn, noise = (solve(base, FewShot(**QUICK, zero_shot=zero_shot)) for zero_shot in (False, True))
    assert drawn.delta != noise.delta
    assert noise.diagnostics["images"] == []


def test_the_base_text_encoder_stays_what_values_are_compared_with(base: Base) -> None:
    before = TextEncoder.of(base).hidden(["a cat"])
    solve(base, FewShot(**QUICK, until=WATCHED))
    assert torch.equal(TextEncoder.of(base).hidden(["a cat"]), before)


def test_a_concept_that_does_not_fit_into_a_prompt_is_refused(base: Base) -> None:
    long = Concept("cat dog fox car bus sun moon tree rose house person a of the in")
    with pytest.raises(PromptTooLong, match="use a shorter name"):
        solve(base, FewShot(**QUICK), long)
