"""Pictures and evaluations of what a registry holds; the numbers are stored in it. A studio draws for callers that take turns."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings, resolve_device
from overpaint.core import __version__
from overpaint.core.atomic import require_parent
from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.core.executors import Executor, open_executor
from overpaint.core.names import checked_seed
from overpaint.core.reporting import Progress, html_table, silent
from overpaint.evaluation.context import EvalContext, EvaluatedPatch
from overpaint.evaluation.images import ImageCache, ImageGenerator, Pixels, Sampler, preferred_guidance
from overpaint.evaluation.judges import open_judge
from overpaint.evaluation.metrics import plain_words
from overpaint.evaluation.prompts import EmojiPrompts, EvalPrompt, ListedPrompts, PromptSet, catalogue, read_prompts
from overpaint.evaluation.report_page import labelled_grid
from overpaint.evaluation.suites import Suite, configured
from overpaint.patches.compose import Term
from overpaint.registry.records import EvaluationRecord, PatchRecord, ResultRecord
from overpaint.registry.registry import Registry

if TYPE_CHECKING:
    from overpaint.workspace.opened import OpenRegistry


def draw(
    base: Base,
    terms: Sequence[Term],
    prompt: str,
    out: Path,
    *,
    label: str,
    compare: bool = False,
    seed: int = 0,
    count: int = 4,
    steps: int = 20,
    guidance: float | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> None:
    """Save `count` pictures of a prompt under `terms` as one labelled sheet; with `compare`, the base's stand above them.

    `guidance` None is the base's own. Raises OverpaintError when the file cannot be written.
    """
    require_parent(out)
    sampler = Sampler.of(base, steps, guidance)
    generator = ImageGenerator(base, sampler, ImageCache(None), resolve_device(device), progress)
    prompts = [EvalPrompt(prompt, seed + i, {}) for i in range(count)]
    shown: list[tuple[str, Sequence[Term]]] = [*([("base", ())] if compare else []), (label, terms)]
    generator.expect(count * len(shown))
    rows = [(name, list(generator.draw(applied, prompts))) for name, applied in shown]
    try:
        labelled_grid(rows, [f"seed {each.seed}" for each in prompts], title=prompt).save(out)
    except (OSError, ValueError) as error:
        raise OverpaintError(
            f"cannot write the picture {out} ({error}); choose a .png file in a folder you may write to"
        ) from error


@dataclass(frozen=True)
class EvaluationRequest:
    """How to evaluate: the suite and its settings, the judge (see `evaluation.judges`), a CSV file of one's own prompts.

    `guidance` None is the base's own. All seeds follow from `seed`. `on` says where pictures are drawn: here, or `ray`
    or `ray://HOST:PORT`.
    """

    suite: str = "quick"
    settings: Mapping[str, str] = field(default_factory=dict)
    judge: str = ""
    prompts: Path | None = None
    seed: int = 0
    steps: int = 20
    guidance: float | None = None
    batch: int = 50
    device: str = "auto"
    on: str = ""

    def __post_init__(self) -> None:
        if checked_seed(self.seed) < 0:
            raise OverpaintError(f"the seed of an evaluation is at least 0; got {self.seed}")


@dataclass(frozen=True)
class Evaluated:
    """A finished run: its record, and the damaged pictures in the cache that were drawn again."""

    record: EvaluationRecord
    redrawn: tuple[Path, ...]

    def __repr__(self) -> str:
        run = self.record
        of = f"recipe {run.recipe}@{run.revision}" if run.recipe else f"patch {(run.patch or '')[:12]}"
        return f"<Evaluated {of}: {run.suite} by {run.judge}, seed {run.seed}, {len(run.results)} numbers>"

    def _repr_html_(self) -> str:
        rows = [
            (
                plain_words(r.subject),
                plain_words(r.metric),
                *("" if value is None else f"{value:.4g}" for value in (r.value, r.low, r.high)),
                r.n,
            )
            for r in self.record.results
        ]
        return html_table(repr(self), ["about", "metric", "value", "low", "high", "n"], rows)


@dataclass(frozen=True)
class Subject:
    """What is evaluated, a recipe (as it is, or NAME@REVISION) or one patch: its base, and patches with their strengths."""

    base: str
    entries: tuple[tuple[PatchRecord, float], ...]
    recipe: str | None = None
    patch: str | None = None

    @classmethod
    def named(cls, registry: Registry, name: str) -> Subject:
        """The recipe of that name, or else the patch. Raises NotFound."""
        if registry.has_recipe(name) or "@" in name:
            entries = [(record, entry.strength) for record, entry in registry.patches_on(name)]
            ordered = sorted(entries, key=lambda entry: entry[0].concept)
            return cls(registry.recipe(name).base, tuple(ordered), recipe=name)
        record = registry.patch(name)
        return cls(record.base, ((record, 1.0),), patch=record.id)


@own_torch_settings()
def evaluate(
    opened: OpenRegistry, name: str, request: EvaluationRequest, *, who: str, progress: Progress = silent
) -> Evaluated:
    """Run a suite on a recipe, or on a patch alone; store and return its numbers.

    Pictures are cached beside the registry, so that an interrupted run continues where it was. Nothing is stored of
    a run that fails. Raises NotFound for an unknown suite or judge, BlindJudge for a judge that recognises too little.
    """
    registry, subject = opened.registry, Subject.named(opened.registry, name)
    patches = [opened.patch(record.id) for record, _ in subject.entries]
    suite = configured(request.suite, request.settings)
    started = time.monotonic()
    evaluated = [
        EvaluatedPatch(patch, strength, record.seconds, record.nbytes)
        for patch, (record, strength) in zip(patches, subject.entries, strict=True)
    ]
    with closing(open_executor(request.on)) as executor:
        drawing = executor if request.on else None
        context = open_context(registry, opened.base(subject.base), evaluated, request, progress, executor=drawing)
        measurements = suite.run(context)
    seconds = time.monotonic() - started
    record = registry.add_evaluation(
        recipe=subject.recipe,
        patch=subject.patch,
        digest=context.image_generator.digest(context.terms()),
        suite=request.suite,
        judge=context.judge.name,
        seed=request.seed,
        settings=_settings(suite, context, request),
        versions=versions(),
        seconds=seconds,
        who=who,
        results=[ResultRecord(m.subject, m.metric, m.value, m.low, m.high, m.n) for m in measurements],
    )
    return Evaluated(record, tuple(context.image_generator.image_cache.damaged))


def open_context(
    registry: Registry,
    base: Base,
    evaluated: Sequence[EvaluatedPatch],
    request: EvaluationRequest,
    progress: Progress,
    *,
    fresh: bool = False,
    executor: Executor | None = None,
) -> EvalContext:
    """What a suite works with, for patches on a base; with `fresh`, no picture that was drawn before is used.

    Raises WrongBase for a patch of another base.
    """
    for each in evaluated:
        each.patch.check(base)
    device, known = resolve_device(request.device), tuple(registry.concepts())
    prompt_set = prompt_set_of(base, (*known, *(each.concept for each in evaluated)))
    sampler = Sampler.of(base, request.steps, request.guidance, batch=request.batch)
    return EvalContext(
        base=base,
        prompt_set=prompt_set,
        judge=open_judge(request.judge, base, prompt_set, device),
        image_generator=ImageGenerator(
            base,
            sampler,
            ImageCache(None) if fresh else image_cache(registry),
            device,
            progress,
            executor=executor,
        ),
        patches=tuple(evaluated),
        known=known,
        seed=request.seed,
        device=device,
        own_prompts=read_prompts(request.prompts, prompt_set) if request.prompts else {},
    )


def image_cache(registry: Registry) -> ImageCache:
    """The pictures that evaluations and reports of a registry share."""
    return ImageCache(registry.folder / "cache" / "pictures")


def prompt_set_of(base: Base, concepts: Sequence[Concept]) -> PromptSet:
    """The catalogue for the embedded bases and others that ship their judge; for any other base, `concepts`."""
    if (base.path / "judge" / "judge.json").is_file():
        return EmojiPrompts(catalogue(base.path))
    return ListedPrompts(dict.fromkeys(concepts))


def versions() -> dict[str, str]:
    """What computed: the versions of this package and of the libraries that draw."""
    import diffusers
    import torch
    import transformers

    return {
        "overpaint": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _settings(suite: Suite, context: EvalContext, request: EvaluationRequest) -> dict[str, Any]:
    """What one must know to run it again: the suite's own settings, the sampler, the list of prompts."""
    sampler = context.image_generator.sampler
    drawn = {"steps": sampler.steps, "guidance": sampler.guidance, "device": context.device.type}
    own: dict[str, Any] = asdict(suite)  # type: ignore[call-overload]
    return {"suite": own, "sampler": drawn, "judge": request.judge, "prompts": str(request.prompts or "")}


@dataclass(frozen=True, eq=False)
class DrawnPicture:
    """A picture, uint8 [h, w, 3], the PNG file that holds it, and the digest of the weights that drew it."""

    pixels: Pixels
    file: Path
    weights: str


class Studio:
    """Draws on one loaded base; another patch or strength shows in the next picture, and loads nothing.

    Callers in any thread: `lock` is held while a picture is drawn, so that nobody's patches are in another's picture. Hold it
    for other heavy work on the same registry. A base is loaded when its first picture is asked for, and let go for another.
    Pictures are drawn one at a time, so that the same request gives the same bytes, and kept in `folder`.
    """

    def __init__(self, opened: OpenRegistry, folder: Path, *, device: str = "auto") -> None:
        self.lock = RLock()
        self._opened, self._cache, self._device = opened, ImageCache(folder), resolve_device(device)
        self._generator: ImageGenerator | None = None

    def guidance(self, base: str) -> float:
        """The guidance scale that a base is best drawn with."""
        with self.lock:
            return preferred_guidance(self._opened.base(base))

    def draw(
        self, base: str, strengths: Mapping[str, float], prompt: str, seed: int, *, steps: int, guidance: float
    ) -> DrawnPicture:
        """A prompt drawn with these patches (strengths by id) on a base of the registry.

        Raises NotFound for an unknown base or patch, WrongBase for a patch of another base, LostPatch for lost bytes,
        OverpaintError for what `Sampler` and `EvalPrompt` refuse, or where the picture cannot be written.
        """
        with self.lock:
            opened = self._opened.base(base)
            sampler = Sampler.of(opened, steps, guidance, batch=1)
            terms = [self._opened.term_on(*each, opened) for each in strengths.items() if each[1] != 0]
            generator = self._loaded(opened)
            generator.sampler = sampler
            question = EvalPrompt(prompt, seed, {})
            pixels, weights = generator.draw(terms, [question])[0], generator.digest(terms)
            file = self._cache.place(weights, generator.how, question)
        if not file.exists():
            raise OverpaintError(f"the picture cannot be written to {file.parent}; make room on that disk")
        return DrawnPicture(pixels, file, weights)

    def _loaded(self, base: Base) -> ImageGenerator:
        if self._generator is None or self._generator.base is not base:
            self._generator = None  # first, so that two bases are never in memory at once
            self._generator = ImageGenerator(base, Sampler(batch=1), self._cache, self._device)
        return self._generator
