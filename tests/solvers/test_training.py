"""The loop of all training solvers: it descends, watches, stops, averages, and says what went wrong."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.patches.delta import Delta, Dense
from overpaint.solvers.problem import EditProblem, OutOfMemory, TrainingDiverged, Unsolvable
from overpaint.solvers.trained.adapters import DenseAdapter, MovingAverage, modules_by_parameter
from overpaint.solvers.trained.denoiser import Denoiser, releasing
from overpaint.solvers.trained.guidance import Ablation
from overpaint.solvers.trained.training import KEPT, StepResult, Training, TrainingTask, descend, generator
from overpaint.testing import tiny_base


class Point:
    """The smallest change there is: one vector."""

    def __init__(self, *values: float) -> None:
        self.at = nn.Parameter(torch.tensor(values))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.at]

    def off(self) -> Any:
        return nullcontext()

    def delta(self) -> Delta:
        return Dense({"unet/point": self.at})


@dataclass(frozen=True)
class Settings(Training):
    """The loop's settings without a solver."""

    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        raise AssertionError("not asked for")


def run(base: Base, task: TrainingTask, **settings: Any) -> tuple[dict[str, Any], list[tuple[int, int, str]]]:
    reports: list[tuple[int, int, str]] = []
    problem = EditProblem(base, Concept("cat"), report=lambda *what: reports.append(what))
    return descend(task, Settings(**settings), problem), reports


def to(point: Point, goal: float) -> Callable[[torch.Generator], StepResult]:
    return lambda random: StepResult((point.at - goal).square().sum())


def test_it_descends_and_reports_the_loss_of_every_step(base: Base) -> None:
    point = Point(0.0, 5.0)
    found, reports = run(base, TrainingTask(point, to(point, 2.0)), steps=400, lr=0.1)
    assert torch.allclose(point.at, torch.full((2,), 2.0), atol=1e-2)
    assert found["steps"] == 400
    assert found["first_loss"] == 13.0
    assert not found["stopped_early"]
    assert [step for step, _, _ in reports] == list(range(1, 401))
    assert reports[0][2] == "loss 1.30e+01"


def test_it_stops_when_enough_is_forgotten(base: Base) -> None:
    """The average begins at 1: after n steps at zero it is momentum^n, and 0.5^3 is the first below 0.2."""
    point = Point(1.0)
    task = TrainingTask(point, lambda random: StepResult(point.at.sum(), left=0.0))
    found, reports = run(base, task, steps=50, until=0.2, momentum=0.5)
    assert found["steps"] == 3
    assert found["stopped_early"]
    assert found["left"] == 0.125
    assert reports[-1][2].endswith("12% left")


def test_it_stops_early_only_where_that_is_set(base: Base) -> None:
    point = Point(1.0)
    found, _ = run(base, TrainingTask(point, lambda random: StepResult(point.at.sum(), left=-5.0)), steps=7)
    assert found["steps"] == 7
    assert found["left"] < 0


def test_a_loss_that_is_no_number_stops_at_its_step(base: Base) -> None:
    point, losses = Point(1.0), iter([1.0, 2.0, float("nan")])
    task = TrainingTask(point, lambda random: StepResult(point.at.sum() * next(losses)))
    with pytest.raises(TrainingDiverged, match=r"nan at step 2.*lower lr \(it is 0.5\)"):
        run(base, task, steps=9, lr=0.5)


def test_a_gradient_that_is_no_number_stops_it_before_it_is_used(base: Base) -> None:
    point = Point(0.0)
    with pytest.raises(TrainingDiverged, match="step 0"):
        run(base, TrainingTask(point, lambda random: StepResult(point.at.square().sum().sqrt())), steps=2)
    assert point.at.item() == 0.0


def test_the_average_is_what_comes_out(base: Base) -> None:
    """Plain gradient descent on a slope of 1 moves by the learning rate, so that the average has a closed form."""
    point = Point(0.0)
    average = MovingAverage(point.parameters, 0.5)
    sgd = torch.optim.SGD
    run(base, TrainingTask(point, lambda random: StepResult(point.at.sum()), sgd, average=average), steps=3, lr=1.0)
    assert point.at.item() == ((0 - 1) / 2 - 2) / 2 / 2 - 3 / 2


def test_within_an_average_the_parameters_are_it_and_afterwards_they_are_not() -> None:
    point = Point(0.0)
    average = MovingAverage(point.parameters, 0.75)
    with torch.no_grad():
        point.at.add_(4.0)
    average.update()
    with average.held():
        assert point.at.item() == 1.0
    assert point.at.item() == 4.0


def test_gradients_are_clipped_together(base: Base) -> None:
    point = Point(0.0, 0.0)
    task = TrainingTask(point, lambda random: StepResult(3 * point.at[0] + 4 * point.at[1]), torch.optim.SGD)
    run(base, task, steps=1, lr=1.0, clip=1.0)
    assert torch.allclose(point.at, torch.tensor([-0.6, -0.8]))


def test_the_learning_rate_follows_its_schedule(base: Base) -> None:
    point = Point(0.0)
    task = TrainingTask(
        point, lambda random: StepResult(point.at.sum()), torch.optim.SGD, rate=lambda step: float(step == 1)
    )
    run(base, task, steps=3, lr=0.25)
    assert point.at.item() == -0.25


def test_every_step_draws_numbers_of_its_own_and_the_same_ones_every_time(base: Base) -> None:
    drawn: list[Tensor] = []
    point = Point(0.0)

    def loss(random: torch.Generator) -> StepResult:
        drawn.append(torch.rand(2, generator=random))
        return StepResult(point.at.sum())

    run(base, TrainingTask(point, loss), steps=3)
    run(base, TrainingTask(point, loss), steps=3)
    assert all(torch.equal(a, b) for a, b in zip(drawn[:3], drawn[3:], strict=True))
    assert len({tuple(values.tolist()) for values in drawn}) == 3


def test_seeds_and_streams_of_any_sign_and_size_have_generators() -> None:
    found = {generator(seed, stream).initial_seed() for seed in (-1, 0, 1, 2**62) for stream in (-9, -1, 0, 999_999)}
    assert len(found) == 16


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()])
def test_out_of_memory_names_the_setting_to_lower(
    base: Base, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    @dataclass(frozen=True)
    class Greedy(Settings):
        """Asks for too much."""

        def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
            raise error

    with pytest.raises(OutOfMemory, match=r"batch \(it is 3\), or set checkpoint=true or precision=bf16"):
        Greedy(batch=3).solve(EditProblem(base, Concept("cat")))


@dataclass(frozen=True)
class InPlace(Settings):
    """Writes into the weights that it was lent, which no solver should."""

    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        with torch.no_grad():
            next(iter(model.network.parameters())).add_(1.0)
        point = Point(0.0)
        return TrainingTask(point, to(point, 1.0))


def test_concepts_share_the_memory_of_weights_and_nothing_that_is_trained(base: Base) -> None:
    first, second = (Denoiser.of(EditProblem(base, Concept(name))) for name in ("cat", "dog"))
    names = base.projections()
    change = DenseAdapter(first.pipe, base, names)
    with torch.no_grad():
        for parameter in change.parameters:
            parameter.add_(1.0)
    ours, theirs = (modules_by_parameter(each.pipe, base) for each in (first, second))
    here, there = (
        {name: getattr(side[name], own(name)).data_ptr() for name in base.names if name in side}
        for side in (ours, theirs)
    )
    assert {name for name in here if here[name] != there[name]} == set(names)
    for name in names:
        assert torch.equal(getattr(theirs[name], own(name)), base.tensor(name).float())


def test_what_is_done_to_a_lent_model_is_seen_by_nobody_else(base: Base) -> None:
    first, second = (Denoiser.of(EditProblem(base, Concept(name))) for name in ("cat", "dog"))
    before = second.network.state_dict()
    first.network.to(torch.bfloat16).requires_grad_(True)
    next(iter(first.network.parameters())).data = torch.zeros(1)
    first.pipe.scheduler.set_timesteps(3)
    for model in (second, Denoiser.of(EditProblem(base, Concept("car")))):
        assert not any(parameter.requires_grad for parameter in model.network.parameters())
        assert all(torch.equal(before[name], value) for name, value in model.network.state_dict().items())
        assert len(model.pipe.scheduler.timesteps) > 3


def own(name: str) -> str:
    """The name by which a module knows its parameter."""
    return name.rpartition(".")[2]


def test_weights_that_a_solver_wrote_into_are_loaded_anew(base: Base) -> None:
    before = next(iter(Denoiser.of(EditProblem(base, Concept("cat"))).network.parameters())).clone()
    InPlace(steps=1).solve(EditProblem(base, Concept("cat")))
    after = next(iter(Denoiser.of(EditProblem(base, Concept("dog"))).network.parameters()))
    assert torch.equal(before, after)


def test_pictures_for_the_same_prompts_are_drawn_once(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    drawings: list[list[str]] = []
    whole = Denoiser.drawn

    def counted(self: Denoiser, prompts: list[str], *rest: Any) -> Tensor:
        drawings.append(prompts)
        return whole(self, prompts, *rest)

    monkeypatch.setattr(Denoiser, "drawn", counted)
    quick = Ablation(steps=1, sampling_steps=2, pictures=2, sentences=2)
    first = quick.solve(EditProblem(base, Concept("cat", anchor="car")))
    other = quick.solve(EditProblem(base, Concept("dog", anchor="car")))
    assert (len(drawings), first.delta == other.delta) == (1, False)
    quick.solve(EditProblem(base, Concept("dog", anchor="car"), seed=1))
    quick.solve(EditProblem(base, Concept("dog", anchor="bus")))
    assert len(drawings) == 3
    quick.solve(EditProblem(base, Concept("cat", anchor="car")))
    assert len(drawings) == 3, "what was drawn before the others is kept beside them"
    for seed in range(2, 2 + KEPT):
        quick.solve(EditProblem(base, Concept("cat", anchor="car"), seed=seed))
    kept = Denoiser.of(EditProblem(base, Concept("cat"))).pictures
    assert len(kept) == KEPT < len(drawings)


def with_scheduler(folder: Path, kind: str) -> Base:
    """A tiny base that draws by another scheduler of diffusers."""
    import diffusers

    base = tiny_base(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}))
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    getattr(diffusers, kind).from_config(config).save_pretrained(folder / "scheduler")
    return Base.open(base.path)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Euler scheduler, with NumPy 2
@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_what_was_drawn_before_changes_nothing_whatever_scheduler_the_base_has(tmp_path: Path, kind: str) -> None:
    def solved(base: Base, name: str, steps: int) -> Delta:
        solver = Ablation(steps=2, sampling_steps=steps, batch=2, pictures=2, lr=1e-2)
        return solver.solve(EditProblem(base, Concept(name, anchor="car"))).delta

    base = with_scheduler(tmp_path / "base", kind)
    alone = solved(Base.open(base.path), "cat", 5)
    assert solved(base, "cat", 5) == alone
    solved(base, "dog", 7)
    assert solved(base, "cat", 5) == alone


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Euler scheduler, with NumPy 2
def test_noise_is_that_of_the_levels_that_the_base_was_trained_on(tmp_path: Path, base: Base) -> None:
    euler = Denoiser.of(EditProblem(with_scheduler(tmp_path / "euler", "EulerDiscreteScheduler"), Concept("cat")))
    euler.drawn(["a cat"], 3, 1.0, [generator(0, 0)])
    clean, noise = torch.randn(2, 2, *euler.shape, generator=generator(0, 1))
    expected = Denoiser.of(EditProblem(base, Concept("cat"))).add_noise(clean, noise, torch.tensor([10, 900]))
    assert torch.equal(euler.add_noise(clean, noise, torch.tensor([10, 900])), expected)


def test_two_concepts_can_be_trained_at_once(base: Base) -> None:
    def solved(base: Base, name: str, steps: int) -> Delta:
        solver = Ablation(steps=3, sampling_steps=steps, batch=2, pictures=2, lr=1e-2)
        return solver.solve(EditProblem(base, Concept(name, anchor="car"))).delta

    asked = [("cat", 3), ("dog", 5)]
    alone = [solved(Base.open(base.path), *each) for each in asked]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda each: solved(base, *each), asked)) == alone


def test_models_are_let_go_when_a_run_ends(base: Base) -> None:
    def parameters() -> int:
        gc.collect()
        return sum(issubclass(type(each), nn.Parameter) for each in gc.get_objects())

    before = parameters()
    with releasing(base):
        Denoiser.of(EditProblem(base, Concept("cat")))
        assert parameters() > before
    assert parameters() == before


def test_a_base_that_a_solver_does_not_serve_is_refused_plainly(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "layouts", ("flux",))
    with pytest.raises(Unsolvable, match=r"of the layouts flux; this is a stable-diffusion base: use `separable`"):
        Settings().solve(EditProblem(base, Concept("cat")))
