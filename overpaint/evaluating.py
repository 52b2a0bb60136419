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
from overpaint.bases.device import resolve_device
from overpaint.concepts import Concept
from overpaint.evaluation.bench import Bench, Held
from overpaint.evaluation.estimates import Finding
from overpaint.evaluation.gallery import Gallery
from overpaint.evaluation.images import Sampler
from overpaint.evaluation.judges import open_judge
from overpaint.evaluation.studio import Studio
from overpaint.evaluation.suites import Suite, configured
from overpaint.evaluation.worlds import EmojiWorld, ListedWorld, World, read_questions
from overpaint.recipes import me
from overpaint.registry.evaluations import EvaluationRecord, ResultRecord
from overpaint.registry.records import PatchRecord

if TYPE_CHECKING:
    from overpaint.workshop import Workshop


@dataclass(frozen=True)
class Request:
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
    shop: Workshop,
    name: str,
    request: Request,
    *,
    report: Callable[[int, int, str], None] = lambda done, of, text: None,
) -> Evaluated:
    """Run a suite on the recipe of that name (NAME@REVISION too), or else on the patch; keep and return its numbers.

    Pictures are cached beside the registry, so that a run that was interrupted goes on where it was. Nothing is kept of
    a run that fails. Raises NotFound for a name, suite or judge that is not there, BlindJudge for one that cannot see.
    """
    suite = configured(request.suite, request.settings)
    started = time.monotonic()
    bench, subject = open_bench(shop, name, request, report)
    findings = suite.run(bench)
    seconds = time.monotonic() - started
    record = shop.registry.add_evaluation(
        **subject,
        digest=bench.studio.digest(bench.terms()),
        suite=request.suite,
        judge=bench.judge.name,
        seed=request.seed,
        settings=_settings(suite, bench, request),
        versions=versions(),
        seconds=seconds,
        who=me(),
        results=[_kept(found) for found in findings],
    )
    return Evaluated(record, tuple(bench.studio.gallery.damaged))


def open_bench(
    shop: Workshop, name: str, request: Request, report: Callable[[int, int, str], None]
) -> tuple[Bench, dict[str, str]]:
    """The bench for a recipe or a patch, and which of the two it is, as `Registry.add_evaluation` takes it."""
    base_name, laid, subject = _meant(shop, name)
    base, device = shop.base(base_name), resolve_device(request.device)
    held = tuple(Held(shop.patch(record.id), strength, record.seconds, record.nbytes) for record, strength in laid)
    for each in held:
        each.patch.check(base)
    known = tuple(shop.concepts())
    world = world_of(base, (*known, *(each.concept for each in held)))
    guidance = float(base.extras.get("guidance", 7.5)) if request.guidance is None else request.guidance
    sampler = Sampler(request.steps, guidance, request.batch)
    gallery = Gallery(shop.registry.folder / "cache" / "pictures")
    bench = Bench(
        base=base,
        world=world,
        judge=open_judge(request.judge, base, world, device),
        studio=Studio(base, sampler, gallery, device, report),
        held=held,
        known=known,
        seed=request.seed,
        device=device,
        own=read_questions(request.prompts, world) if request.prompts else {},
    )
    return bench, subject


def world_of(base: Base, concepts: tuple[Concept, ...]) -> World:
    """The catalogue for the embedded base and others that ship its judge; for any other base, `concepts`."""
    return EmojiWorld() if (base.path / "judge" / "judge.json").is_file() else ListedWorld(dict.fromkeys(concepts))


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


def _meant(shop: Workshop, name: str) -> tuple[str, list[tuple[PatchRecord, float]], dict[str, str]]:
    """The base's name, what lies on it, and the subject. A recipe goes before a patch of the same name."""
    registry = shop.registry
    if registry.has_recipe(name) or "@" in name:
        recipe = shop.known_recipe(name)
        return recipe.record.base, recipe.patches(), {"recipe": name}
    record = registry.patch(name)
    return record.base, [(record, 1.0)], {"patch": record.id}


def _settings(suite: Suite, bench: Bench, request: Request) -> dict[str, Any]:
    """What one must know to run it again: the suite's own settings, the sampler, the list of prompts."""
    sampler = bench.studio.sampler
    drawn = {"steps": sampler.steps, "guidance": sampler.guidance, "device": bench.device.type}
    own: dict[str, Any] = asdict(suite)  # type: ignore[call-overload]
    return {"suite": own, "sampler": drawn, "judge": request.judge, "prompts": str(request.prompts or "")}


def _kept(found: Finding) -> ResultRecord:
    return ResultRecord(found.subject, found.metric, found.value, found.low, found.high, found.n)
