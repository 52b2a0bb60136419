"""The loop of every training solver but SepME: seeded, watched, stopped when enough is forgotten; and what it
trains on, pictures of a folder or of the base (`gathered`) and states of the base's own drawing (`Trajectories`).

A solver says what changes and what one step loses (`TrainingTask`); the loop does the rest. How much of the concept is left is
measured alike for all of them: the part of the base's guidance that the prompt still gives,
`<eps(x, c) - eps0(x, c0), eps0(x, c) - eps0(x, c0)> / |eps0(x, c) - eps0(x, c0)|^2`, with eps0 the base and c0 the prompt
without the concept (where a method learns from itself, its own prediction for c0 takes the place of the base's in the first
difference). It is 1 at first, 0 where the concept is drawn as if it were not named, and negative beyond.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.bases.layout import Layout
from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import Progress
from overpaint.solvers.problem import EditProblem, Solution, Solver, Unsolvable, finite, setting, within_memory
from overpaint.solvers.sentences import training_prompts
from overpaint.solvers.trained.adapters import Adapter, MovingAverage
from overpaint.solvers.trained.denoiser import TOGETHER, TRAINABLE, Conditioning, Denoiser, unserved

BEFORE = -1
"""The stream of random numbers that is used up before the first step; pictures are drawn from those below it."""

KEPT = 8
"""Sets of pictures that the base drew are kept for other concepts, at most."""

MakeOptimiser: TypeAlias = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepResult:
    """What one step gives: the loss to descend, and what is left of the concept where the solver knows it.

    `noised`, the x_t and t of the step, lets the loop preserve prompts there; a solver with a way of its own leaves it out.
    """

    loss: Tensor
    left: float | None = None
    noised: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class TrainingTask:
    """What a solver gives the loop: the change that is trained, and the loss of one step from the step's generator.

    `rate(step)` multiplies the learning rate. With an `average`, the result is the averaged change. `facts` join the
    diagnostics, `record` the manifest.
    """

    change: Adapter
    loss: Callable[[torch.Generator], StepResult]
    optimiser: MakeOptimiser = lambda parameters, lr: torch.optim.Adam(parameters, lr)
    rate: Callable[[int], float] = lambda step: 1.0
    average: MovingAverage | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training(Solver):
    """The settings that every training solver has; each solver puts its paper's values in their place."""

    layouts: ClassVar[tuple[str, ...]] = TRAINABLE
    """The layouts of bases that it can train on."""
    trains_whole_tensors: ClassVar[bool] = True
    """Whether what it touches is trained in place; thin factors beside it need no memory to speak of."""

    steps: int = setting(1000, "most gradient steps", low=1)
    lr: float = setting(1e-5, "learning rate", low=0.0)
    batch: int = setting(1, "noised latents per step", low=1)
    sentences: int = setting(
        0, "train on this many sentences that name the concept, spread over its words; 0: on its bare words", low=0
    )
    guidance: float = setting(3.0, "guidance scale of what the base draws to train on", low=0.0)
    sampling_steps: int = setting(50, "denoising steps of what the base draws to train on", low=1, high=1000)
    until: float = setting(1.0, "stop when at most this share of the concept's guidance is left; 1: never", -10.0, 1.0)
    momentum: float = setting(0.9, "weight of earlier steps in the average that `until` looks at", low=0.0, high=0.999)
    clip: float = setting(0.0, "largest norm of all gradients together; 0: any", low=0.0)
    precision: str = setting(
        "fp32", "arithmetic of the models; what is trained is fp32 in any case", choices=("fp32", "bf16")
    )
    checkpoint: bool = setting(
        False, "compute the denoiser's activations again for the gradients: less memory, about a third more time"
    )

    def solve(self, problem: EditProblem) -> Solution:
        """Train on a copy of the base's models. Raises TrainingDiverged, OutOfMemory, Unsolvable, PromptTooLong, BadPictures."""
        started = time.perf_counter()
        with within_memory(f"batch (it is {self.batch}), or set checkpoint=true or precision=bf16"):
            if reason := self.supports(problem.base.layout):
                raise Unsolvable(reason)
            model = Denoiser.of(problem, precision=self.precision, checkpoint=self.checkpoint)
            task = self.task(model, problem)
            prompts = problem.preserved_prompts()
            history = descend(task, self, problem, Preservation(model, task.change, prompts) if prompts else None)
            delta = task.change.delta()
        return Solution(delta, {**task.facts, **history, "seconds": time.perf_counter() - started}, task.record)

    def supports(self, layout: Layout) -> str | None:
        return unserved(layout, self.layouts)

    @property
    def graph_latents(self) -> int:
        """For how many latents a step predicts with gradients, at most; preserved prompts add a `batch`."""
        return 2 * self.batch

    def peak_bytes(self, base: Base) -> int:
        trained = self.touches(base) if self.trains_whole_tensors else ()
        return training_bytes(base, trained, self.graph_latents, checkpoint=self.checkpoint)

    @abstractmethod
    def task(self, model: Denoiser, problem: EditProblem) -> TrainingTask:
        """What to train and what a step loses; may draw what it trains on."""

    @property
    def watches(self) -> bool:
        """Whether what is left has to be known where it costs a solver a pass through the model."""
        return self.until < 1


def training_bytes(base: Base, touched: Sequence[str], latents: int, *, checkpoint: bool = False) -> int:
    """About what training takes of a GPU: the models in float32; for what is trained (names, or patterns of them) its gradients,
    two moments, the base's values and an average; and the activations of so many latents, each of one and a half times the
    denoiser, or a fifth of that where they are computed again.

    Rather too many: on a CPU, Stable Diffusion 1.5's activations take half as much as its denoiser.
    """
    denoisers = {name.partition("/")[0] for name in base.projections()}
    sizes: dict[str, int] = {name: 4 * math.prod(place.shape) for name, place in base.places.items()}
    denoiser = sum(size for name, size in sizes.items() if name.partition("/")[0] in denoisers)
    named = set(touched)
    patterns = [name for name in named if name not in sizes]
    trained = sum(
        size for name, size in sizes.items() if name in named or any(fnmatchcase(name, each) for each in patterns)
    )
    return sum(sizes.values()) + 5 * trained + int(latents * denoiser * (0.3 if checkpoint else 1.5))


class Preservation:
    """What the loop adds for a problem's preserved prompts, which no paper has: their predictions stay the base's.

    `|eps(x_t, p; theta) - eps(x_t, p; theta0)|^2`, with a prompt p for each x_t of the step.
    """

    def __init__(self, model: Denoiser, change: Adapter, prompts: Sequence[str]) -> None:
        self._model, self._change, self._prompts = model, change, prompts

    def loss(self, x: Tensor, t: Tensor, random: torch.Generator) -> Tensor:
        """The term for noised latents x [n, c, h, w] of timesteps t [n]."""
        chosen = [self._prompts[i] for i in torch.randint(len(self._prompts), (len(x),), generator=random).tolist()]
        with torch.no_grad(), self._change.off():
            still = self._model(x, t, self._model.encode(chosen))
        return F.mse_loss(self._model(x, t, self._model.encode(chosen)), still)


def descend(
    task: TrainingTask, settings: Training, problem: EditProblem, preservation: Preservation | None = None
) -> dict[str, Any]:
    """Train `task.change` in place; the steps, first and last loss, and what is left of the concept.

    Every step has a CPU generator of its own, so that devices and interruptions do not change what is drawn. Raises
    TrainingDiverged when a loss or a gradient is no number, naming the step.
    """
    optimiser = task.optimiser(task.change.parameters, settings.lr)
    lower = f"lr (it is {settings.lr:g})"
    losses: list[float] = []
    left, known = 1.0, False
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * task.rate(step)
        optimiser.zero_grad(set_to_none=True)
        random = generator(problem.seed, step)
        result = task.loss(random)
        loss = result.loss
        if preservation is not None and result.noised is not None:
            loss = loss + preservation.loss(*result.noised, random)
        losses.append(finite(loss.item(), step, lower))
        loss.backward()
        size = nn.utils.clip_grad_norm_(task.change.parameters, settings.clip or torch.inf)
        finite(size.item(), step, lower)
        optimiser.step()
        if task.average is not None:
            task.average.update()
        if result.left is not None:
            known, left = True, settings.momentum * left + (1 - settings.momentum) * result.left
        problem.report(
            step + 1, settings.steps, f"loss {losses[-1]:.2e}" + (f", {max(left, 0):.0%} left" if known else "")
        )
        if known and settings.until < 1 and left <= settings.until:
            break
    if task.average is not None:
        task.average.take()
    found = {"steps": len(losses), "first_loss": losses[0], "loss": losses[-1]}
    return {**found, "stopped_early": len(losses) < settings.steps, **({"left": left} if known else {})}


def generator(seed: int, stream: int) -> torch.Generator:
    """The CPU generator of one stream of a seed: steps count from 0, and what comes before them has negative numbers."""
    return torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63)


def share_left(found: Tensor, named: Tensor, unnamed: Tensor) -> float:
    """What the prediction `found` has left of the base's guidance `named - unnamed` (see the module)."""
    way = named - unnamed
    return float(((found.detach() - unnamed) * way).sum() / way.square().sum().clamp_min(1e-30))


@torch.no_grad()
def base_texts(
    model: Denoiser, change: Adapter, named: Sequence[str], unnamed: Sequence[str]
) -> tuple[Conditioning, Conditioning]:
    """What the denoiser of the base reads of prompts, for solvers that train text encoders."""
    with change.off():
        return model.hidden(named), model.hidden(unnamed)


@torch.no_grad()
def concept_remaining(
    found: Tensor,
    model: Denoiser,
    change: Adapter,
    x: Tensor,
    t: Tensor,
    named: Conditioning,
    unnamed: Conditioning,
    own: Tensor | None = None,
) -> float:
    """`share_left` for solvers that have no use for the base's own predictions: they are made here, in one pass.

    `own` is what the model in training predicts without the concept, where that is what it learns from.
    """
    with change.off():
        with_it, without = model.both(x, t, named, unnamed)
    return share_left(found if own is None else found - own + without, with_it, without)


class BadPictures(OverpaintError):
    """A folder of example images that a solver cannot learn from."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Latents [n, c, h, w] as the denoiser knows them, and the SHA-256 of every file they were made of."""

    latents: Tensor
    digests: tuple[str, ...] = ()


def gathered(
    model: Denoiser,
    problem: EditProblem,
    prompts: Sequence[str],
    *,
    folder: str,
    count: int,
    steps: int,
    guidance: float,
) -> Pictures:
    """The pictures of `folder`, of which there must be `count`; or, without one, so many that the base draws."""
    if folder:
        return from_folder(model, folder, count, generator(problem.seed, BEFORE))
    return drawn(model, problem, prompts, count, steps, guidance)


@torch.no_grad()
def from_folder(model: Denoiser, folder: str, least: int, random: torch.Generator) -> Pictures:
    """Every picture of a folder, in the order of their digests: fitted to the base's size, mirrored or not at random, encoded.

    Hidden files and folders in it are passed over. Raises BadPictures for a folder that is missing, holds anything that is no
    picture, or holds fewer than `least`.
    """
    if not Path(folder).expanduser().is_dir():
        raise BadPictures(f"{folder} is no folder; name one with pictures of the concept")
    files = picture_files(folder)
    if len(files) < least:
        raise BadPictures(
            f"{folder} holds {len(files)} pictures and at least {least} are needed; add some of the concept"
        )
    pixels = torch.stack([_pixels_of(model, file, file.read_bytes()) for file in files.values()])
    mirrored = torch.rand(len(pixels), generator=random) < 0.5
    pixels[mirrored] = pixels[mirrored].flip(-1)
    parts = [model.encoded(some, random) for some in pixels.split(TOGETHER)]
    return Pictures(torch.cat(parts), tuple(files))


@torch.no_grad()
def drawn(
    model: Denoiser, problem: EditProblem, prompts: Sequence[str], count: int, steps: int, guidance: float
) -> Pictures:
    """What the base draws, in turn, for the prompts: `count` pictures, each with a seed of its own.

    Asked for before anything is trained. Concepts that are trained on the same prompts (without the concept's words, or with
    one anchor) share the pictures.
    """
    key = (tuple(prompts), count, steps, guidance, problem.seed, model.dtype)
    if (kept := model.pictures.get(key)) is not None:
        return Pictures(kept)
    found = []
    for start in range(0, count, TOGETHER):
        problem.report(0, count, f"drawing {start} of {count} pictures")
        numbers = range(start, min(start + TOGETHER, count))
        named = [prompts[n % len(prompts)] for n in numbers]
        generators = [generator(problem.seed, BEFORE - 1 - n) for n in numbers]
        found.append(model.drawn(named, steps, guidance, generators))
    pictures = torch.cat(found)
    for oldest in list(model.pictures)[: max(0, len(model.pictures) + 1 - KEPT)]:
        model.pictures.pop(oldest, None)  # in another thread it may be gone already
    model.pictures[key] = pictures
    return Pictures(pictures)


def picture_files(folder: str) -> dict[str, Path]:
    """The files of a folder by the SHA-256 of their bytes, sorted: where they are and what they are called decides nothing.

    A picture that is there twice counts once. Hidden files and folders are passed over; without the folder there are none.
    """
    path = Path(folder).expanduser()
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    seen = [file for file in sorted(files) if not file.name.startswith(".")]
    return dict(sorted((hashlib.sha256(file.read_bytes()).hexdigest(), file) for file in seen))


def _pixels_of(model: Denoiser, file: Path, content: bytes) -> Tensor:
    """The middle of a picture in the base's size: float32 [3, h, w] in [-1, 1]."""
    height, width = model.pixels
    try:
        with warnings.catch_warnings():
            # Pillow only warns of a small file that would unpack to gigabytes.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
            picture = ImageOps.fit(upright.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise BadPictures(f"{file} is no picture that can be read ({error}); take it out of the folder") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPictures(f"{file} is too large a picture ({error}); make it smaller") from error
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return raw.permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class Trajectories:
    """x_t by partial denoising under one of several texts, guided as the pipeline guides.

    Without a `bank`, every draw denoises anew down to one random timestep, within the context `acting`, in which the model
    has the weights to denoise with. With one, draws choose among all states of trajectories that were denoised once; that
    costs a small fraction, and t varies within a batch.
    """

    model: Denoiser
    texts: Conditioning
    guidance: float
    steps: int
    acting: Callable[[], AbstractContextManager[Any]] = nullcontext
    bank: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def with_bank(self, size: int, random: torch.Generator, report: Progress) -> Trajectories:
        """The same with a bank of `size` trajectories, denoised now; as it is for 0."""
        if not size:
            return self
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, size, TOGETHER):
            report(0, size, f"denoising {start} of {size} trajectories")
            asked = torch.randint(len(self.texts), (min(TOGETHER, size - start),), generator=random)
            found += [(x.cpu(), torch.full((len(asked),), t), asked) for x, t in self._states(asked, random)]
        states, times, texts = (torch.cat(parts) for parts in zip(*found, strict=True))
        return replace(self, bank=(states, times, texts))

    @torch.no_grad()
    def draw(self, random: torch.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_t [n, c, h, w], t [n], and which of the texts each was drawn under [n]."""
        device = self.model.device
        if self.bank is not None:
            chosen = torch.randint(len(self.bank[0]), (batch,), generator=random)
            states, times, texts = (part[chosen].to(device) for part in self.bank)
            return states, times, texts
        texts = torch.randint(len(self.texts), (batch,), generator=random)
        stop = int(torch.randint(len(self._sampler.timesteps), (1,), generator=random))
        x, t = self._states(texts, random, stop)[-1]
        return x, torch.full((batch,), t, device=device), texts.to(device)

    @cached_property
    def _sampler(self) -> Any:
        return self.model.sampler(self.steps)

    def _states(self, asked: Tensor, random: torch.Generator, last: int = -1) -> list[tuple[Tensor, float]]:
        """The states of a batch of trajectories with their timesteps, from pure noise to number `last`, or to the end."""
        model, times = self.model, self._sampler.timesteps.tolist()
        x = torch.randn((len(asked), *model.shape), generator=random).to(model.device) * self._sampler.init_noise_sigma
        text = self.texts[asked.to(self.texts.device)]
        found = [(x, times[0])]
        with self.acting():
            for t, after in pairwise(times[: last + 1 or None]):
                predicted = model.guided(x, torch.full((len(x),), t, device=model.device), text, self.guidance)
                x = self._sampler.step(predicted, t, x).prev_sample
                found.append((x, after))
        return found


def denoised_pairs(
    model: Denoiser,
    problem: EditProblem,
    method: Training,
    bank: int,
    random: torch.Generator,
    acting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Conditioning, Conditioning, Trajectories]:
    """What the model reads of prompts that name the concept, and of those that should replace them; and x_t denoised under the
    former, from a bank of so many trajectories, by the weights that `acting` puts in their place."""
    pairs = training_prompts(problem, model.encoder, method.sentences)
    named, instead = (model.hidden(side) for side in zip(*pairs, strict=True))
    states = Trajectories(model, named, method.guidance, method.sampling_steps, acting)
    return named, instead, states.with_bank(bank, random, problem.report)
