"""Where the noised latents come from: the base's own trajectories, its pictures, a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.trained.denoiser import Denoiser
from overpaint.solvers.trained.training import BadPictures, Trajectories, drawn, from_folder


@pytest.fixture
def model(base: Base) -> Denoiser:
    return Denoiser.of(EditProblem(base, Concept("cat")))


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trajectories(model: Denoiser, **changes: Any) -> Trajectories:
    return Trajectories(model, model.hidden(["a cat", "a dog"]), **{"guidance": 3.0, "steps": 5, **changes})


def test_partial_denoising_is_what_the_pipeline_does(model: Denoiser) -> None:
    """The same noise, the same prompt, the same number of steps: the pipeline's own latents on the way."""
    states = trajectories(model)._states(torch.tensor([0]), random())
    found: list[Tensor] = []

    def listen(pipe: Any, step: int, t: int, told: dict[str, Tensor]) -> dict[str, Tensor]:
        found.append(told["latents"])
        return told

    model.pipe(
        "a cat",
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=states[0][0],
        output_type="latent",
        callback_on_step_end=listen,
    )
    assert [t for _, t in states] == model.pipe.scheduler.timesteps.tolist()
    for (x, _), expected in zip(states[1:], found, strict=False):
        assert torch.allclose(x, expected, atol=1e-4)


def test_a_bank_is_denoised_once_and_drawn_from_often(model: Denoiser) -> None:
    calls = []
    model.pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    reports: list[tuple[int, int, str]] = []
    states = trajectories(model).with_bank(3, random(), lambda *told: reports.append(told))
    assert len(calls) == 4, "one pass for each step but the last state's"
    x, t, which = states.draw(random(1), 200)
    assert len(calls) == 4
    assert x.shape == (200, *model.shape)
    assert set(t.tolist()) == set(model.sampler(5).timesteps.tolist()), "every level within one batch"
    assert set(which.tolist()) <= {0, 1}
    assert reports == [(0, 3, "denoising 0 of 3 trajectories")]


def test_without_a_bank_every_draw_denoises_anew_with_the_model_as_it_should_be(model: Denoiser) -> None:
    entered = []

    class Acting:
        def __enter__(self) -> None:
            entered.append(True)

        def __exit__(self, *_: object) -> None:
            entered.append(False)

    states = trajectories(model, acting=Acting).with_bank(0, random(), lambda *_: None)
    draws = [states.draw(random(seed), 2) for seed in range(8)]
    assert entered == [True, False] * 8
    assert all(len(set(t.tolist())) == 1 for _, t, _ in draws)
    assert len({int(t[0]) for _, t, _ in draws}) > 2
    assert torch.equal(draws[0][0], states.draw(random(0), 2)[0])


def test_more_steps_than_levels_are_taken_as_far_as_there_are_levels(model: Denoiser) -> None:
    times = model.sampler(1000).timesteps
    assert int(times.max()) < model.levels


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_goal_is_what_the_base_was_trained_to_predict(model: Denoiser, kind: str) -> None:
    model.pipe.scheduler.register_to_config(prediction_type=kind)
    latents = torch.randn((3, *model.shape), generator=random(4))
    x, t, goal, which = model.noised(latents, random(), 3)
    share = model.pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    clean = latents[which]
    noise = goal if kind == "epsilon" else (goal + (1 - share).sqrt() * clean) / share.sqrt()
    assert torch.allclose(share.sqrt() * clean + (1 - share).sqrt() * noise, x, atol=1e-4)


def test_no_latent_comes_twice_before_all_have_come_once(model: Denoiser) -> None:
    *_, which = model.noised(torch.zeros(4, *model.shape), random(), 10)
    assert sorted(which[:4]) == sorted(which[4:8]) == [0, 1, 2, 3]


def test_pictures_that_the_base_draws_depend_on_the_seed_alone(base: Base, model: Denoiser) -> None:
    problem = EditProblem(base, Concept("cat"), seed=1)
    few = drawn(model, problem, ["a cat"], 1, 2, 3.0)
    more = drawn(model, problem, ["a cat"], 3, 2, 3.0)
    assert torch.allclose(few.latents[0], more.latents[0], atol=1e-5)
    assert not torch.allclose(more.latents[0], more.latents[1], atol=1e-2)
    assert few.digests == ()


def picture(path: Path, size: tuple[int, int] = (20, 30), colour: str = "red") -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def test_a_folder_of_pictures_is_fitted_encoded_and_known_by_its_digests(tmp_path: Path, model: Denoiser) -> None:
    picture(tmp_path / "b.png", (50, 10))
    picture(tmp_path / "a.jpg", (16, 16), "blue")
    (tmp_path / ".DS_Store").write_bytes(b"not a picture")
    (tmp_path / "folder").mkdir()
    found = from_folder(model, str(tmp_path), 2, random())
    assert found.latents.shape == (2, *model.shape)
    assert len(set(found.digests)) == 2
    again = from_folder(model, str(tmp_path), 2, random())
    assert torch.equal(found.latents, again.latents)
    assert found.digests == again.digests


def test_pictures_stand_as_they_are_shown(tmp_path: Path, model: Denoiser) -> None:
    """A camera notes that it was turned; whoever ignores that learns from pictures that lie on their side."""
    upright = Image.new("RGB", (16, 16), "white")
    upright.paste("black", (0, 0, 16, 8))
    turned = upright.rotate(90)
    for name, image, orientation in (("turned", turned, 6), ("upright", upright, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "a.png", exif=exif)
    found = [from_folder(model, str(tmp_path / name), 1, random()).latents for name in ("turned", "upright")]
    assert torch.equal(*found)


def test_too_few_pictures_are_refused(tmp_path: Path, model: Denoiser) -> None:
    picture(tmp_path / "one.png")
    with pytest.raises(BadPictures, match="holds 1 pictures and at least 4 are needed"):
        from_folder(model, str(tmp_path), 4, random())


def test_a_folder_that_is_none_is_refused(tmp_path: Path, model: Denoiser) -> None:
    with pytest.raises(BadPictures, match="is no folder"):
        from_folder(model, str(tmp_path / "nowhere"), 1, random())
    with pytest.raises(BadPictures, match="is no folder"):
        from_folder(model, str(picture(tmp_path / "file.png")), 1, random())


@pytest.mark.parametrize("broken", [b"", b"just text", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture_is_refused_by_name(tmp_path: Path, model: Denoiser, broken: bytes) -> None:
    picture(tmp_path / "good.png")
    (tmp_path / "notes.png").write_bytes(broken)
    with pytest.raises(BadPictures, match=r"notes.png is no picture that can be read.*take it out of the folder"):
        from_folder(model, str(tmp_path), 1, random())


def test_a_truncated_picture_is_refused(tmp_path: Path, model: Denoiser) -> None:
    whole = picture(tmp_path / "cut.png", (200, 200)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadPictures, match=r"cut.png is no picture"):
        from_folder(model, str(tmp_path), 1, random())


@pytest.mark.parametrize("limit", [60, 40])
def test_a_picture_that_would_fill_the_memory_is_refused(
    tmp_path: Path, model: Denoiser, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Pillow warns above its limit and raises above twice the limit; here both are refusals."""
    picture(tmp_path / "huge.png", (10, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadPictures, match=r"huge.png is too large"):
        from_folder(model, str(tmp_path), 1, random())
