"""`evaluate`: one suite on a patch or a recipe of a registry, and its numbers kept beside it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import overpaint
from overpaint.bases.base import Base
from overpaint.bases.loading import resolve_device
from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import EvalContext, EvaluatedPatch
from overpaint.evaluation.crosstalk import Crosstalk, Pair, crosstalk, has_closed_form
from overpaint.evaluation.figures import labelled_grid
from overpaint.evaluation.images import ImageCache, ImageGenerator, Sampler, generate
from overpaint.evaluation.judges import open_judge
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.prompts import EmojiPrompts, ListedPrompts, PromptSet, read_prompts
from overpaint.evaluation.suites import Suite, configured
from overpaint.registry.records import PatchRecord
from overpaint.registry.registry import EvaluationRecord, ResultRecord
from overpaint.workspace.recipe import current_user

if TYPE_CHECKING:
    from overpaint.workspace.workspace import Workspace


# `generate`: pictures of a prompt with a recipe applied, alone or beside the base's for the same seeds.


def draw(
    workspace: Workspace,
    recipe: str,
    prompt: str,
    out: Path,
    *,
    compare: bool,
    seed: int,
    count: int,
    steps: int,
    guidance: float | None,
    device: str,
) -> None:
    """Save one labelled picture of `count` drawings to `out`; with `compare`, a row for the base above the recipe's.

    Raises OverpaintError when the recipe is unknown or the file cannot be written.
    """
    if not out.parent.is_dir():
        raise OverpaintError(f"there is no folder {out.parent}; make it first")
    pipe, overlay = workspace.live(recipe, device=device)
    liked = overlay.base.extras.get("guidance", 7.5)
    sampler = Sampler(steps=steps, guidance=liked if guidance is None else guidance)
    seeds = list(range(seed, seed + count))
    rows = [(recipe, list(generate(pipe, [prompt] * count, seeds, sampler)))]
    if compare:
        overlay.clear()
        rows.insert(0, ("base", list(generate(pipe, [prompt] * count, seeds, sampler))))
    picture = labelled_grid(rows, [f"seed {s}" for s in seeds], title=prompt)
    try:
        picture.save(out)
    except (OSError, ValueError) as error:
        raise OverpaintError(
            f"cannot write the picture {out} ({error}); choose a .png file in a folder you may write to"
        ) from error


# Cross-talk for a workshop: which patches are meant, and the table of what each of them moves.


def crosstalk_on(
    workspace: Workspace, recipe: str | None, base: str | None, everything: bool, device: str
) -> Crosstalk:
    """See `Workshop.crosstalk`."""
    if recipe is not None:
        record = workspace.registry.recipe(recipe)
        base, ids = record.base, [patch_id for patch_id, _ in record.patches]
    else:
        base = base or _only_base(workspace)
        ids = list({record.concept: record.id for record in workspace.registry.patches(base=base)}.values())
    if not ids:
        place = f"the recipe {recipe!r}" if recipe is not None else f"the base {base!r}"
        raise OverpaintError(f"there is no patch on {place}; solve one and add it first")
    return crosstalk(
        workspace.base(base),
        [workspace.patch(patch_id) for patch_id in ids],
        workspace.concepts() if everything else (),
        cache=workspace.registry.folder / "cache" / "moments",
        device=resolve_device(device),
    )


def disturbances(workspace: Workspace, recipe: str, patch_id: str) -> list[Pair]:
    """See `Workshop.disturbances`."""
    record = workspace.registry.recipe(recipe)
    base = workspace.base(record.base)
    found = [workspace.patch(other) for other, _ in record.patches]
    known = [patch for patch in found if has_closed_form(base, patch)]
    name = workspace.patch(patch_id).concept.name
    result = crosstalk(base, known, cache=workspace.registry.folder / "cache" / "moments")
    return [pair for pair in result.above() if name in (pair.emitter, pair.receiver)]


def _only_base(workspace: Workspace) -> str:
    known = [record.name for record in workspace.registry.bases()]
    if len(known) != 1:
        raise OverpaintError(f"say which base is meant (known: {', '.join(known) or 'none; add one first'})")
    return known[0]


@dataclass(frozen=True)
class EvaluationRequest:
    """How to evaluate: the suite and its settings, the judge (see `evaluation.judges`), a CSV file of one's own prompts.

    `guidance` None is what the base likes. All seeds follow from `seed`.
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


@dataclass(frozen=True)
class Evaluated:
    """A finished run: its record, and the damaged pictures in the cache that were drawn again."""

    record: EvaluationRecord
    redrawn: tuple[Path, ...]


def evaluate(
    workspace: Workspace,
    name: str,
    request: EvaluationRequest,
    *,
    report: Callable[[int, int, str], None] = lambda done, of, text: None,
) -> Evaluated:
    """Run a suite on the recipe of that name (NAME@REVISION too), or else on the patch; keep and return its numbers.

    Pictures are cached beside the registry, so that a run that was interrupted goes on where it was. Nothing is kept of
    a run that fails. Raises NotFound for a name, suite or judge that is not there, BlindJudge for one that cannot see.
    """
    suite = configured(request.suite, request.settings)
    started = time.monotonic()
    context, subject = open_context(workspace, name, request, report)
    findings = suite.run(context)
    seconds = time.monotonic() - started
    record = workspace.registry.add_evaluation(
        **subject,
        digest=context.image_generator.digest(context.terms()),
        suite=request.suite,
        judge=context.judge.name,
        seed=request.seed,
        settings=_settings(suite, context, request),
        versions=versions(),
        seconds=seconds,
        who=current_user(),
        results=[_kept(found) for found in findings],
    )
    return Evaluated(record, tuple(context.image_generator.image_cache.damaged))


def open_context(
    workspace: Workspace, name: str, request: EvaluationRequest, report: Callable[[int, int, str], None]
) -> tuple[EvalContext, dict[str, str]]:
    """The bench for a recipe or a patch, and which of the two it is, as `Registry.add_evaluation` takes it."""
    base_name, laid, subject = _meant(workspace, name)
    base, device = workspace.base(base_name), resolve_device(request.device)
    held = tuple(
        EvaluatedPatch(workspace.patch(record.id), strength, record.seconds, record.nbytes) for record, strength in laid
    )
    for each in held:
        each.patch.check(base)
    known = tuple(workspace.concepts())
    prompt_set = prompt_set_of(base, (*known, *(each.concept for each in held)))
    guidance = float(base.extras.get("guidance", 7.5)) if request.guidance is None else request.guidance
    sampler = Sampler(request.steps, guidance, request.batch)
    image_cache = ImageCache(workspace.registry.folder / "cache" / "pictures")
    context = EvalContext(
        base=base,
        prompt_set=prompt_set,
        judge=open_judge(request.judge, base, prompt_set, device),
        image_generator=ImageGenerator(base, sampler, image_cache, device, report),
        held=held,
        known=known,
        seed=request.seed,
        device=device,
        own=read_prompts(request.prompts, prompt_set) if request.prompts else {},
    )
    return context, subject


def prompt_set_of(base: Base, concepts: tuple[Concept, ...]) -> PromptSet:
    """The catalogue for the embedded base and others that ship its judge; for any other base, `concepts`."""
    return EmojiPrompts() if (base.path / "judge" / "judge.json").is_file() else ListedPrompts(dict.fromkeys(concepts))


def versions() -> dict[str, str]:
    """What computed: the versions of this package and of the libraries that draw."""
    import diffusers
    import torch
    import transformers

    return {
        "overpaint": overpaint.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _meant(workspace: Workspace, name: str) -> tuple[str, list[tuple[PatchRecord, float]], dict[str, str]]:
    """The base's name, what lies on it, and the subject. A recipe goes before a patch of the same name."""
    registry = workspace.registry
    if registry.has_recipe(name) or "@" in name:
        recipe = workspace.known_recipe(name)
        return recipe.record.base, recipe.patches(), {"recipe": name}
    record = registry.patch(name)
    return record.base, [(record, 1.0)], {"patch": record.id}


def _settings(suite: Suite, context: EvalContext, request: EvaluationRequest) -> dict[str, Any]:
    """What one must know to run it again: the suite's own settings, the sampler, the list of prompts."""
    sampler = context.image_generator.sampler
    drawn = {"steps": sampler.steps, "guidance": sampler.guidance, "device": context.device.type}
    own: dict[str, Any] = asdict(suite)  # type: ignore[call-overload]
    return {"suite": own, "sampler": drawn, "judge": request.judge, "prompts": str(request.prompts or "")}


def _kept(found: Measurement) -> ResultRecord:
    return ResultRecord(found.subject, found.metric, found.value, found.low, found.high, found.n)
