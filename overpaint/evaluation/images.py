"""Where pictures come from: a base with any set of patches on, each picture drawn once and then remembered.

Pictures are known by the digest of the composed weights, so that the base, and any two recipes that compose to the same
bits, are drawn once; what an interrupted run has drawn is there for the next one. One seed per picture: it does not depend on
its neighbours in the batch.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from overpaint.bases.base import Base, BaseReference
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.pipelines import blank_inputs, pipeline_beside
from overpaint.core.atomic import replacing
from overpaint.core.encoding import canonical_json, json_digest
from overpaint.core.errors import OverpaintError
from overpaint.core.executors import Executor, Piece, Resources, available_cores
from overpaint.core.names import checked_number, checked_seed
from overpaint.core.reporting import Progress, silent
from overpaint.evaluation.prompts import EvalPrompt, checked_prompt
from overpaint.patches.compose import Term, compose, composition_digest
from overpaint.patches.live import Overlay


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn: denoising steps, guidance scale, and how many pictures go through the model at once.

    `size` is (width, height) in pixels, `prompt_length` how many tokens of a prompt are read; None is the pipeline's own. Raises
    OverpaintError on fewer than one step or picture per batch, and for numbers that are not whole, or not finite.
    """

    steps: int = 20
    guidance: float = 4.0
    batch: int = 50
    size: tuple[int, int] | None = None
    prompt_length: int | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(each, Integral) and each >= 1 for each in (self.steps, self.batch)):
            raise OverpaintError(
                "a sampler needs at least one step and one picture per batch, and a whole number of each; got "
                f"{self.steps!r} and {self.batch!r}"
            )
        checked_number(self.guidance, "a guidance scale")
        length = self.prompt_length
        if length is not None and not (isinstance(length, Integral) and length >= 1):
            raise OverpaintError(f"a prompt is read for at least one token, a whole number; got {length!r}")

    @classmethod
    def of(
        cls,
        base: Base,
        steps: int = 20,
        guidance: float | None = None,
        *,
        batch: int = 50,
        size: tuple[int, int] | None = None,
    ) -> Sampler:
        """How a base is drawn: by its own guidance scale where none is given, with prompts as long as it was trained on."""
        chosen = preferred_guidance(base) if guidance is None else guidance
        return cls(steps, chosen, batch, size, base.extras.get("prompt_length"))


def preferred_guidance(base: Base) -> float:
    """The guidance scale that a base is best drawn with: its own, else 7.5, the usual one of Stable Diffusion."""
    return float(base.extras.get("guidance", 7.5))


@own_torch_settings()
@torch.no_grad()
def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler | None = None,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Pixels:
    """Draw `prompts[i]` with `seeds[i]`: uint8 [n, height, width, 3], as the pipeline's own postprocessing rounds them.

    Each picture has a CPU generator of its own, so that its noise is the same in any batch; batches of other sizes may
    still move a value by a grey level or two, because the arithmetic is summed in another order. The caller's own PyTorch
    settings (autocast, default device and type) change no picture. `on_batch` is
    called after each batch with the number of pictures done so far. The pipeline is left as it was. Raises
    OverpaintError when there is nothing to draw, the two lists differ in length, or a prompt or seed is none.

    A small model on the CPU draws as many batches at once as the process has cores (or as OMP_NUM_THREADS says).
    """
    if not prompts or len(prompts) != len(seeds):
        raise OverpaintError(f"one seed per prompt is needed; got {len(prompts)} prompts and {len(seeds)} seeds")
    for prompt, seed in zip(prompts, seeds, strict=True):
        checked_prompt(prompt)
        checked_seed(seed)
    sampler = sampler or Sampler()
    pictures: list[Pixels] = []
    at_once = min(_batches_at_once(pipe), len(prompts) // FEWEST)
    parts = _parts(len(prompts), sampler.batch, at_once)

    def draw(own: Any, part: slice) -> list[Pixels]:
        return _draw(own, list(prompts[part]), seeds[part], sampler)

    with _silenced(pipe), _in_order(pipe, draw, parts, at_once) as batches:
        for batch in batches:
            pictures += batch
            if on_batch is not None:
                on_batch(len(pictures))
    return np.stack(pictures)


SMALL_DENOISER = 100 << 20
"""Bytes of a denoiser below which its operations are too small to be shared out among threads; whole batches are not."""
FEWEST = 4
"""Pictures for which a thread of their own is worth while."""


def _batches_at_once(pipe: Any) -> int:
    """How many batches a pipeline draws at once: one, but for a small model in plain modules on the CPU."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if denoiser is None or denoiser.device.type != "cpu":
        return 1
    if sum(value.nbytes for value in denoiser.parameters()) > SMALL_DENOISER:
        return 1
    if not all(map(_keeps_nothing, (*denoiser.modules(), *pipe.vae.modules()))):
        return 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else available_cores()


def _keeps_nothing(module: nn.Module) -> bool:
    """Whether a call of a module leaves another one that is under way alone: no offloading or casting around it, no hooks, and
    not compiled."""
    around = ("_hf_hook", "_diffusers_hook", "_orig_mod")
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._compiled_call_impl)
    return not any(name in module.__dict__ or name in module._modules for name in around) and not any(hooks)


def _parts(count: int, batch: int, at_once: int) -> list[slice]:
    """`count` pictures in batches; where several are drawn at once, in even ones, as many as keep all threads busy."""
    if at_once <= 1:
        return [slice(start, min(start + batch, count)) for start in range(0, count, batch)]
    batches = -(-count // (batch * at_once)) * at_once
    return [slice(count * i // batches, count * (i + 1) // batches) for i in range(batches)]


@contextmanager
def _in_order(
    pipe: Any, draw: Callable[[Any, slice], list[Pixels]], parts: Sequence[slice], at_once: int
) -> Iterator[Iterator[list[Pixels]]]:
    """What `draw` gives of each part, in order; where several are drawn at once, each in a thread of one core, by a pipeline
    that no other thread uses meanwhile."""
    if at_once <= 1:
        yield (draw(pipe, part) for part in parts)
        return
    free: SimpleQueue[Any] = SimpleQueue()
    for each in (pipe, *(pipeline_beside(pipe) for _ in range(at_once - 1))):
        free.put(each)

    def draw_by_a_free_one(part: slice) -> list[Pixels]:
        own = free.get()
        try:
            return draw(own, part)
        finally:
            free.put(own)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map(draw_by_a_free_one, parts)
    finally:
        torch.set_num_threads(threads)


# Autocast, the default device and whether gradients are kept are each thread's own: what `generate` sets does not reach others.
@own_torch_settings()
@torch.no_grad()
def _draw(pipe: Any, prompts: list[str], seeds: Sequence[int], sampler: Sampler) -> list[Pixels]:
    size = {} if sampler.size is None else {"width": sampler.size[0], "height": sampler.size[1]}
    has_length = sampler.prompt_length and "max_sequence_length" in inspect.signature(pipe.__call__).parameters
    length = {"max_sequence_length": sampler.prompt_length} if has_length else {}
    result = pipe(
        prompts,
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pil",
        **size,
        **length,
        **blank_inputs(pipe, len(prompts)),
    )
    return [np.asarray(picture.convert("RGB")) for picture in result.images]


@contextmanager
def _silenced(pipe: Any) -> Iterator[None]:
    """No progress bar within the block; the caller's setting afterwards."""
    kept = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**kept, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**kept)


Pixels = NDArray[np.uint8]
"""A picture, [h, w, 3], or several of one size, [n, h, w, 3]."""


class ImageCache:
    """A folder of pictures by what determines them: weights, sampler, prompt and seed; None keeps nothing.

    Each is a PNG file that has in its own text what it shows and the digest of its pixels, so that a damaged one is noticed when
    it is read, and drawn again; `damaged` lists them. A cache that cannot be written costs time and nothing else.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.damaged: list[Path] = []

    def find(self, weights: str, sampler: str, questions: Sequence[EvalPrompt]) -> list[Pixels | None]:
        """For each question its picture, uint8 [h, w, 3], or None where there is no sound one."""
        if self.folder is None or not (self.folder / weights).is_dir():
            return [None] * len(questions)
        return [self._read(self.place(weights, sampler, each)) for each in questions]

    def remember(self, weights: str, sampler: str, questions: Sequence[EvalPrompt], pictures: Sequence[Pixels]) -> None:
        """Keep one picture for each question; a file is there whole or not at all."""
        if self.folder is None:
            return
        try:
            for question, picture in zip(questions, pictures, strict=True):
                text = PngInfo()
                text.add_itxt("prompt", question.prompt)
                text.add_text("seed", str(question.seed))
                text.add_text("sampler", sampler)
                text.add_text("sha256", _digest(picture))
                with replacing(self.place(weights, sampler, question)) as scratch:
                    Image.fromarray(picture).save(scratch, "PNG", pnginfo=text)
        except OSError:
            pass

    def place(self, weights: str, sampler: str, question: EvalPrompt) -> Path:
        """The file of a picture, which is there once it is kept."""
        assert self.folder is not None
        return self.folder / weights / f"{json_digest([sampler, question.prompt, question.seed])}.png"

    def _read(self, place: Path) -> Pixels | None:
        try:
            with Image.open(place) as file:
                picture = np.asarray(file.convert("RGB"))
                sound = file.info.get("sha256") == _digest(picture)
        except FileNotFoundError:
            return None
        except (OSError, SyntaxError, ValueError, EOFError):  # what Pillow raises depends on which byte is damaged
            sound = False
        if not sound:
            self.damaged.append(place)
            return None
        return picture


def _digest(picture: Pixels) -> str:
    return hashlib.sha256(canonical_json(list(picture.shape)) + picture.tobytes()).hexdigest()


class ImageGenerator:
    """Draws questions on a base under any terms. The pipeline is loaded when the first picture is missing.

    `report(done, of, text)` is called after every batch; `expect` says beforehand how many pictures there will be.
    """

    def __init__(
        self,
        base: Base,
        sampler: Sampler,
        image_cache: ImageCache,
        device: torch.device,
        report: Progress = silent,
        pipe: Any = None,
        executor: Executor | None = None,
    ) -> None:
        self.base, self.sampler, self.image_cache, self.device = base, sampler, image_cache, device
        self._report, self._pipe, self._executor = report, pipe, executor
        self._overlay: Overlay | None = None
        self._digests: dict[tuple[tuple[str, float], ...], str] = {(): base.fingerprint}
        self._seen: set[tuple[str, str, int]] = set()
        self._of = self._drawn = 0
        self._seconds = 0.0

    def expect(self, count: int) -> None:
        """Announce `count` more pictures."""
        self._of += count

    def digest(self, terms: Iterable[Term]) -> str:
        """The digest of the weights that `terms` compose to; the base's fingerprint for none."""
        ordered = sorted(terms, key=lambda term: term.id)
        key = tuple((term.id, term.strength) for term in ordered)
        if key not in self._digests:
            self._digests[key] = composition_digest(self.base, compose(self.base, ordered))
        return self._digests[key]

    def draw(self, terms: Sequence[Term], questions: Sequence[EvalPrompt]) -> Pixels:
        """The pictures of `questions`, uint8 [n, h, w, 3]: remembered ones, and the others drawn now."""
        weights, how = self.digest(terms), self.how
        stored = self.image_cache.find(weights, how, questions)
        missing = [i for i, picture in enumerate(stored) if picture is None]
        self._report_drawn(
            weights, [question for question, picture in zip(questions, stored, strict=True) if picture is not None]
        )
        parts = [missing[start : start + self.sampler.batch] for start in range(0, len(missing), self.sampler.batch)]
        for part, pictures in self._drawn_parts(terms, questions, parts):
            asked = [questions[i] for i in part]
            self.image_cache.remember(weights, how, asked, pictures)
            for i, picture in zip(part, pictures, strict=True):
                stored[i] = picture
            self._report_drawn(weights, asked)
        return np.stack([picture for picture in stored if picture is not None])

    @property
    def how(self) -> str:
        """What beside weights, prompt and seed determines a picture."""
        guidance = f"{self.sampler.guidance:g}"
        if float(guidance) != self.sampler.guidance:
            guidance = repr(self.sampler.guidance)
        length = f"{self.sampler.prompt_length} tokens, " if self.sampler.prompt_length else ""
        return f"{self.sampler.steps} steps, guidance {guidance}, {length}{self.device.type}"

    @property
    def overlay(self) -> Overlay:
        """What changes the pipeline; made, and the pipeline loaded, when first asked for."""
        if self._overlay is None:
            if self._pipe is None:
                self._pipe = self.base.pipeline(device=str(self.device))
            self._overlay = Overlay(self._pipe, self.base)
        return self._overlay

    @property
    def pipe(self) -> Any:
        """The pipeline that `overlay` changes."""
        assert self.overlay is not None
        return self._pipe

    def _drawn_parts(
        self, terms: Sequence[Term], questions: Sequence[EvalPrompt], parts: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], list[Pixels]]]:
        """Every part of the questions with its pictures, here or where the executor has room; batches are the same."""
        if self._executor is None:
            for part in parts:
                yield part, self._draw(terms, [questions[i] for i in part])
            return
        inputs = DrawInputs(BaseReference(self.base), tuple(terms), self.sampler, self.device.type)
        pieces = [Piece(f"drawing {len(part)} pictures", draw_piece, ([questions[i] for i in part],)) for part in parts]
        needs = Resources(gpus=float(self.device.type == "cuda"))
        for result in self._executor.results(pieces, inputs, needs):
            if result.error:
                raise OverpaintError(f"pictures could not be drawn: {result.error}")
            yield parts[result.index], result.value

    def _draw(self, terms: Sequence[Term], questions: Sequence[EvalPrompt]) -> list[Pixels]:
        self.overlay.set(terms)
        started = time.monotonic()
        prompts, seeds = [each.prompt for each in questions], [each.seed for each in questions]
        pictures = list(generate(self.pipe, prompts, seeds, self.sampler))
        self._drawn += len(pictures)
        self._seconds += time.monotonic() - started
        return pictures

    def _report_drawn(self, weights: str, questions: Sequence[EvalPrompt]) -> None:
        """Report pictures that are there now; one that is looked at twice counts once."""
        self._seen |= {(weights, question.prompt, question.seed) for question in questions}
        done = len(self._seen)
        self._of = max(self._of, done)
        left = (self._of - done) * self._seconds / self._drawn if self._drawn else 0.0
        self._report(done, self._of, f"pictures, {left:.0f} s left" if left >= 1 else "pictures")


@dataclass(frozen=True, eq=False)
class DrawInputs:
    """What all pieces of a drawing read: the base, the patches on it, how it is drawn and on what device."""

    base: BaseReference
    terms: tuple[Term, ...]
    sampler: Sampler
    device: str


def draw_piece(inputs: DrawInputs, questions: Sequence[EvalPrompt], progress: Progress) -> list[Pixels]:
    """Draw one batch, in whichever process; its pipeline stays loaded for the next."""
    generator = _generator(inputs.base.open(), inputs.device)
    generator.sampler = inputs.sampler
    return list(generator.draw(inputs.terms, questions))


@lru_cache(maxsize=1)
def _generator(base: Base, device: str) -> ImageGenerator:
    return ImageGenerator(base, Sampler(), ImageCache(None), torch.device(device))
