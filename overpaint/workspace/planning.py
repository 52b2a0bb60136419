"""Planning: what is wanted, what a patch for it follows from, and what of it is solved already. Nothing is stored here.

Equal inputs give equal patches, so nothing is solved twice; the inputs are what a patch's manifest says about them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overpaint.core.concepts import Concept, universe_of
from overpaint.core.encoding import canonical_json, json_digest
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import checked_seed, checked_texts
from overpaint.registry.records import BaseRecord, PatchRecord
from overpaint.registry.registry import ConceptDiffers, Registry, refusals
from overpaint.registry.store import BlobCorrupt, BlobMissing, PatchFiles, embedded_manifest

if TYPE_CHECKING:
    from overpaint.solvers.problem import Solver


DEFAULT_SOLVER = "separable"


class BadTruncation(OverpaintError):
    """An amount to keep that is neither a rank nor a share of energy."""


@dataclass(frozen=True)
class Truncation:
    """How much of a change a compression keeps of each tensor: at most `rank` directions, or as many as hold `energy`.

    The energy of a change is the sum of its squared singular values; a share is above 0 and at most 1. One of the two is
    None.
    """

    rank: int | None = None
    energy: float | None = None

    @classmethod
    def parse(cls, text: str | float) -> Truncation:
        """`4` is a rank, `0.99` (and `1.0`) a share of energy. Raises BadTruncation for anything else."""
        text = str(text)
        try:
            if text.strip().isdecimal():
                return cls.from_json({"rank": int(text)})
            return cls.from_json({"energy": float(text)})
        except ValueError:
            raise BadTruncation(
                f"a compression keeps a rank, such as 4, or a share of energy, such as 0.99; got {text!r}"
            ) from None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Truncation:
        """What `as_json` gave; other keys are passed over. Raises BadTruncation."""
        rank, energy = data.get("rank"), data.get("energy")
        if (type(rank) is int and rank >= 1 and energy is None) or (
            rank is None and isinstance(energy, float) and math.isfinite(energy) and 0 < energy <= 1
        ):
            return cls(rank, energy)
        raise BadTruncation(
            "a compression keeps a rank of at least 1, or a share of energy above 0 and at most 1.0; got "
            f"{energy if rank is None else rank}"
        )

    def as_json(self) -> dict[str, Any]:
        """The one that is set, under its name."""
        return {"energy": self.energy} if self.rank is None else {"rank": self.rank}

    def __str__(self) -> str:
        return f"{self.energy:g} of the energy" if self.rank is None else f"rank {self.rank}"


@dataclass(frozen=True)
class SolveRequest:
    """A concept, the solver that is to erase it with its settings (texts, as `--set` takes them), and the seed.

    `decoupled` is the rule by which the change is decoupled from all other concepts afterwards, empty for not at all, and
    `truncations` are the compressions that follow, one after the other. Of a concept that `is_bare_name`, a name and nothing
    else, the registry's description counts where it knows it.
    """

    concept: Concept
    solver: str = DEFAULT_SOLVER
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    seed: int = 0
    truncations: tuple[Truncation, ...] = ()
    is_bare_name: bool = False
    decoupled: str = ""

    def __post_init__(self) -> None:
        checked_seed(self.seed)
        checked_texts([self.solver], "the names of solvers")

    def configured(self) -> Solver:
        """The configured solver. Raises NotFound for an unknown one, BadSetting for settings that it cannot take."""
        from overpaint.solvers import solver_class
        from overpaint.solvers.problem import configure

        solver: Solver = configure(solver_class(self.solver), self.settings)
        return solver


@dataclass(frozen=True)
class SolveContext:
    """What a solve reads beside its request: all concepts, prompts to preserve, and a cache folder.

    Concepts and prompts decide what comes out, the folder only how fast.
    """

    universe: tuple[Concept, ...] = ()
    preserve_prompts: tuple[str, ...] = ()
    cache: Path | None = None

    @cached_property
    def by_name(self) -> dict[str, Concept]:
        """The universe, sorted by name: once for all requests, since it may be long."""
        return {each.name: each for each in sorted(self.universe, key=lambda each: each.name)}

    @cached_property
    def _digest(self) -> str:
        return universe_digest(each.as_json() for each in self.universe)

    def digest_with(self, concept: Concept) -> str:
        """The digest of the universe in which `concept` is as described."""
        if self.by_name.get(concept.name) == concept:
            return self._digest
        return universe_digest(each.as_json() for each in {**self.by_name, concept.name: concept}.values())


@dataclass(frozen=True)
class Defaults:
    """Defaults for concepts that set nothing themselves. Settings are those of `solver` alone."""

    kind: str = "object"
    anchor: str = ""
    solver: str = DEFAULT_SOLVER
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    seed: int = 0

    def request(
        self,
        concept: Concept,
        solver: str | None = None,
        settings: Mapping[str, str] | None = None,
        seed: int | None = None,
    ) -> SolveRequest:
        """The request for a concept, with its own settings before the defaults."""
        name = solver or self.solver
        inherited = self.settings if name == self.solver else {}
        return SolveRequest(concept, name, {**inherited, **(settings or {})}, self.seed if seed is None else seed)

    def overridden(self, solver: str | None, settings: Mapping[str, str], seed: int | None) -> Defaults:
        """These defaults, with the values of a command line before them."""
        request = self.request(Concept("any"), solver, settings, seed)
        return Defaults(self.kind, self.anchor, request.solver, request.settings, request.seed)


def completed(
    requests: Iterable[SolveRequest], known: Iterable[Concept], truncations: tuple[Truncation, ...], decoupled: str = ""
) -> list[SolveRequest]:
    """Requests completed with the known descriptions of concepts that they only name, with decoupling and compressions."""
    by_name = {concept.name: concept for concept in known}
    return [
        replace(
            request,
            concept=by_name.get(request.concept.name, request.concept) if request.is_bare_name else request.concept,
            truncations=truncations,
            is_bare_name=False,
            decoupled=decoupled,
        )
        for request in requests
    ]


FEW = 20
"""Of so many concepts, patches are asked for one concept at a time."""


def provenance(request: SolveRequest, solver: Solver, context: SolveContext) -> dict[str, Any]:
    """The entry `solver` of a manifest: how the patch was solved, before any compression.

    An input is recorded where the solver declares that it reads it: the universe without the request's own concept,
    preserved prompts, pictures by the digests of their files.
    """
    recorded = _inputs(request, solver, context)
    if solver.uses_universe:
        others = (each for name, each in context.by_name.items() if name != request.concept.name)
        recorded["universe"] = [each.brief() for each in others]
    return recorded


def _inputs(request: SolveRequest, solver: Solver, context: SolveContext) -> dict[str, Any]:
    """All that is recorded but the universe."""
    from overpaint.solvers.problem import distinct_prompts, settings_of
    from overpaint.solvers.trained.training import picture_files

    settings = settings_of(solver)
    recorded: dict[str, Any] = {"name": request.solver, "settings": _without_folder(settings), "seed": request.seed}
    if solver.revision > 1:
        recorded["revision"] = solver.revision
    if solver.uses_preserved_prompts and (prompts := distinct_prompts(context.preserve_prompts)):
        recorded["keep"] = list(prompts)
    if solver.uses_pictures:
        recorded["pictures"] = list(picture_files(settings["images"]))
    return recorded


def _without_folder(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the folder of pictures: what is in the pictures decides, and not where they are."""
    return {**settings, "images": ""} if "images" in settings else dict(settings)


def universe_digest(concepts: Iterable[Mapping[str, Any]]) -> str:
    """A digest of concepts (as `Concept.as_json`), whatever their order."""
    return hashlib.sha256(b"\n".join(sorted(map(canonical_json, concepts)))).hexdigest()


def digest_of_request(request: SolveRequest, solver: Solver, context: SolveContext, fingerprint: str) -> str:
    """The digest of the inputs of a request on a base."""
    inputs = _inputs(request, solver, context)
    if request.truncations:
        inputs["compressed"] = [truncation.as_json() for truncation in request.truncations]
    if request.decoupled:
        inputs["decoupled"] = {
            **decoupling_inputs(request.decoupled, context),
            "of": context.digest_with(request.concept),
        }
    universe = context.digest_with(request.concept) if solver.uses_universe else ""
    return _digest_of_inputs(fingerprint, request.concept.as_json(), inputs, universe)


def digest_of_manifest(manifest: Mapping[str, Any]) -> str:
    """The digest of the inputs that a manifest names: base, concept, and how it was solved.

    Of compressions counts what they were asked to keep, not what came of it; of pictures what they show, not where they are.
    """
    recorded = manifest["solver"]
    not_inputs = ("universe", "vocabulary", "undisturbed", "backend")
    inputs = {key: value for key, value in recorded.items() if key not in not_inputs}
    inputs["settings"] = _without_folder(recorded.get("settings", {}))
    if "compressed" in inputs:
        inputs["compressed"] = [truncation.as_json() for truncation in truncations_of(manifest)]
    if "decoupled" in inputs:
        step = inputs["decoupled"]
        kept = {key: step[key] for key in ("rule", "keep", "after") if key in step}
        inputs["decoupled"] = {**kept, "of": universe_digest(universe_of(manifest, "decoupled"))}
    universe = ""
    if _reads_universe(inputs["name"], canonical_json(inputs["settings"])):
        universe = universe_digest(universe_of(manifest))
    elif {"keep", "universe"} <= recorded.keys():
        # Version 0.1 recorded the universe and preserved prompts for these solvers too, and they read neither.
        universe = "preserved prompts were not read"
    return _digest_of_inputs(manifest["subject"]["fingerprint"], manifest["concept"], inputs, universe)


def same_but_for_universe(manifest: Mapping[str, Any], request: SolveRequest, solver: Solver) -> bool:
    """Whether a patch was solved as a request asks, whatever else was known or preserved then."""
    others = ("universe", "vocabulary", "keep")
    recorded = {key: value for key, value in manifest["solver"].items() if key not in others}
    recorded["settings"] = _without_folder(recorded.get("settings", {}))
    asked = {key: value for key, value in _inputs(request, solver, SolveContext()).items() if key not in others}
    return bool(manifest["concept"] == request.concept.as_json()) and canonical_json(recorded) == canonical_json(asked)


def _digest_of_inputs(fingerprint: str, concept: Mapping[str, Any], inputs: Mapping[str, Any], universe: str) -> str:
    return json_digest([fingerprint, concept, inputs, universe])


@lru_cache(maxsize=1024)
def _reads_universe(name: str, settings: bytes) -> bool:
    """Whether a solver with settings declares that it reads the universe; True for one that is not here."""
    from overpaint.solvers import solver_class

    try:
        solver: Solver = solver_class(name)(**json.loads(settings))
    except (OverpaintError, TypeError):
        return True
    return solver.uses_universe


def decoupling_inputs(rule: str, context: SolveContext) -> dict[str, Any]:
    """The inputs of a decoupling beside the universe: the rule, and the prompts that are preserved."""
    from overpaint.solvers.problem import distinct_prompts

    prompts = distinct_prompts(context.preserve_prompts)
    return {"rule": rule, **({"keep": list(prompts)} if prompts else {})}


def decoupled_of(manifest: Mapping[str, Any]) -> str:
    """The rule by which a patch was decoupled, empty where it was not."""
    step = manifest["solver"].get("decoupled")
    return str(step.get("rule", "")) if isinstance(step, dict) else ""


def truncations_of(manifest: Mapping[str, Any]) -> tuple[Truncation, ...]:
    """The compressions that a patch went through. Raises BadTruncation for what this program cannot do again."""
    steps = manifest["solver"].get("compressed", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise BadTruncation("the patch's manifest does not say how it was compressed; solve its concept again")
    return tuple(Truncation.from_json(step) for step in steps)


def manifest_of(registry: Registry, record: PatchRecord) -> Mapping[str, Any]:
    """The manifest of a stored patch, without reading its arrays where they are stored apart.

    Raises BlobMissing or BlobCorrupt.
    """
    files = PatchFiles(registry.blobs)
    try:
        return files.manifest(record.id).content
    except BlobMissing:
        manifest = embedded_manifest(registry.blob(record))
        if manifest is None:
            raise
        return manifest.content


def solved_before(registry: Registry, base: str, requests: Sequence[SolveRequest]) -> dict[str, PatchRecord]:
    """The patches on a base that may be what `requests` ask for, by the digest of their inputs.

    Only those are read whose row already fits: concept, solver and seed. What cannot be read, or has lost bytes, is as good
    as not solved: solving it puts the bytes back.
    """
    files = PatchFiles(registry.blobs)
    wanted = {(request.concept.name, request.solver, request.seed) for request in requests}
    solved = {}
    for record in _candidates(registry, base, requests):
        if (record.concept, record.solver, record.seed) in wanted and files.holds(record.id, record.blob):
            with suppress(BadTruncation, BlobCorrupt, BlobMissing):
                solved[digest_of_manifest(manifest_of(registry, record))] = record
    return solved


def _candidates(registry: Registry, base: str, requests: Sequence[SolveRequest]) -> Iterator[PatchRecord]:
    """The patches of a few concepts one by one; of many, all that their solvers made."""
    names = sorted({request.concept.name for request in requests})
    if len(names) > FEW:
        for solver in sorted({request.solver for request in requests}):
            yield from registry.patches(base=base, solver=solver)
        return
    for name in names:
        with suppress(NotFound):  # a concept that is new here
            yield from registry.patches(base=base, concept=name)


@dataclass(frozen=True)
class PlannedSolve:
    """A request, and the patch if it is there already."""

    request: SolveRequest
    done: PatchRecord | None = None


@dataclass(frozen=True)
class SolvePlan:
    """Tasks on one base. The universe of `context` has all concepts that will be known; `new` and `changed` are not yet."""

    base: BaseRecord
    tasks: tuple[PlannedSolve, ...]
    context: SolveContext
    new: tuple[Concept, ...]
    changed: tuple[Concept, ...]

    @property
    def open(self) -> list[PlannedSolve]:
        """What is left to solve."""
        return [task for task in self.tasks if task.done is None]


def plan_solves(
    registry: Registry,
    requests: Iterable[SolveRequest],
    context: SolveContext,
    *,
    base: str,
    update: bool = False,
    force: bool = False,
    known_concepts: Iterable[Concept] | None = None,
) -> SolvePlan:
    """The plan for `requests`: which are solved already, and the universe with all concepts asked for added.

    `known_concepts` are those of the registry, where the universe has not all of them.

    A request whose inputs are those of a stored patch is done, unless `force`. Raises ConceptDiffers for concepts that are
    known by another description, unless `update`; NotFound and BadSetting for a base, a solver or settings that are none;
    OverpaintError for a concept that is asked for with two descriptions.
    """
    requests, on = tuple(dict.fromkeys(requests)), registry.base(base)
    asked = _concepts(requests)
    known = {concept.name: concept for concept in (context.universe if known_concepts is None else known_concepts)}
    new = tuple(concept for name, concept in asked.items() if name not in known)
    changed = tuple(concept for name, concept in asked.items() if name in known and known[name] != concept)
    if changed and not update:
        raise ConceptDiffers(refusals([(known[concept.name], concept) for concept in changed]))
    context = replace(context, universe=tuple({**{each.name: each for each in context.universe}, **asked}.values()))
    _check_solvers(requests)
    candidates = {} if force else solved_before(registry, base, requests)
    solved = {(record.concept, record.solver, record.seed) for record in candidates.values()}
    tasks = []
    for request in requests:
        done = None
        # A digest is over all other concepts too: it is worth its time only where there is a patch to compare.
        if (request.concept.name, request.solver, request.seed) in solved:
            done = candidates.get(digest_of_request(request, request.configured(), context, on.fingerprint))
        tasks.append(PlannedSolve(request, done))
    return SolvePlan(on, tuple(tasks), context, new, changed)


def _check_solvers(requests: Iterable[SolveRequest]) -> None:
    """Raise NotFound or BadSetting for the first solver or setting that there is not; each combination is tried once."""
    for request in {(each.solver, *sorted(each.settings.items())): each for each in requests}.values():
        request.configured()


def _concepts(requests: Iterable[SolveRequest]) -> dict[str, Concept]:
    """The concepts asked for, by name. Raises OverpaintError when a name means two of them."""
    concepts: dict[str, Concept] = {}
    for request in requests:
        if concepts.setdefault(request.concept.name, request.concept) != request.concept:
            raise OverpaintError(f"{request.concept.name!r} is asked for with two descriptions; keep one of them")
    return concepts


def truncations(compress: str | None) -> tuple[Truncation, ...]:
    """The compression that a text asks for (`4` or `0.99`), if any. Raises BadTruncation."""
    return () if compress is None else (Truncation.parse(compress),)


def decoupling_rule(rule: str) -> str:
    """A rule by which changes are decoupled, or nothing for nothing. Raises OverpaintError for any other text."""
    from overpaint.solvers import DECOUPLING_RULES

    if rule and rule not in DECOUPLING_RULES:
        raise OverpaintError(f"a change is decoupled by one of {', '.join(DECOUPLING_RULES)}; got {rule!r}")
    return rule


def setting_texts(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings given as keywords, or as a mapping called `settings`, as `--set` takes them."""
    given = dict(settings)
    nested = given.pop("settings", None) or {}
    if not isinstance(nested, Mapping):
        raise OverpaintError(f"settings is a mapping of a solver's settings by name; got {nested!r}")
    return as_texts({**nested, **given})


def as_texts(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings, a manifest's for example, written as `--set` reads them back."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in settings.items()
    }
