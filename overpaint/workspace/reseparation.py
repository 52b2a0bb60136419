"""Re-separation: patches that were solved for another universe are solved again for the one that the registry knows now.

Separable patches of one universe add up to the joint solution, exactly; patches of different universes do not. When a
concept joins, the others' terms change (by a low-rank update of the second moment that they share), and solving them anew
takes milliseconds each, from nothing but the registry's concepts.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from overpaint.core.concepts import Concept, universe_of
from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import Progress, silent
from overpaint.registry.records import HistoryRecord, PatchRecord
from overpaint.registry.registry import Registry
from overpaint.registry.store import BlobCorrupt, BlobMissing
from overpaint.solvers import is_closed_form, solver_class
from overpaint.workspace.planning import (
    SolveRequest,
    as_texts,
    decoupled_of,
    digest_of_manifest,
    digest_of_request,
    manifest_of,
    plan_solves,
    truncations_of,
    universe_digest,
)

if TYPE_CHECKING:
    from overpaint.workspace.opened import OpenRegistry
    from overpaint.workspace.planning import SolveContext, SolvePlan


class NotReseparable(OverpaintError):
    """A recipe whose patches cannot be exchanged one for one."""


@dataclass(frozen=True)
class RecipeUniverse:
    """The universe that patches of a recipe were solved for: a digest of all its concepts, how many, and whose patches."""

    digest: str
    concepts: int
    patches: tuple[PatchRecord, ...]


def universes(registry: Registry, recipe: str) -> list[RecipeUniverse]:
    """The universes of a recipe's closed-form patches, the largest first. More than one: they do not quite add up.

    Patches of several solvers that knew of the same concepts are of one universe: each leaves alone what the others erase, and
    those of one solver are terms of one sum.
    """
    groups: dict[str, tuple[int, list[PatchRecord]]] = {}
    records = [record for record, _ in registry.patches_on(recipe)]
    closed_form = _closed_form(records)
    known = list(_with_universe(registry, [each for each in records if each.solver in closed_form]))
    newest = dict[str, int]()
    for record, manifest in known:
        newest[record.solver] = max(newest.get(record.solver, 1), _revision(manifest))
    for record, manifest in known:
        concepts, revision = universe_of(manifest), _revision(manifest)
        digest = universe_digest(concepts)
        if revision < newest[record.solver]:  # it saw the universe otherwise than its successor
            digest += f"-{record.solver}-{revision}"
        groups.setdefault(digest, (len(concepts), []))[1].append(record)
    ordered = sorted(groups.items(), key=lambda item: (-item[1][0], item[0]))
    return [RecipeUniverse(digest, count, tuple(patches)) for digest, (count, patches) in ordered]


def _revision(manifest: Mapping[str, Any]) -> int:
    """The revision of the solver that a patch is of."""
    revision: int = manifest["solver"].get("revision", 1)
    return revision


def mixture(registry: Registry, recipe: str) -> str:
    """One sentence when a recipe mixes universes, or when that is not known for lost bytes; else nothing."""
    try:
        groups = universes(registry, recipe)
    except (BlobMissing, BlobCorrupt) as error:
        return f"whether the patches on {recipe} were solved for one universe is not known: {error}"
    if len(groups) < 2:
        return ""
    shares = ", ".join(f"{len(each.patches)} for {_concepts(each.concepts)}" for each in groups)
    return (
        f"the patches on {recipe} were solved for different universes ({shares}), so each may disturb what it does not know "
        f"of; `overpaint recipe reseparate {shlex.quote(recipe)}` solves them again for all concepts"
    )


def _closed_form(records: Iterable[PatchRecord]) -> set[str]:
    """The solvers of some patches that answer at once, from the concepts alone."""
    return {solver for solver in {record.solver for record in records} if is_closed_form(solver)}


def _with_universe(
    registry: Registry, records: Iterable[PatchRecord]
) -> Iterator[tuple[PatchRecord, Mapping[str, Any]]]:
    """Patches whose solver read the universe, with their manifests."""
    for record in records:
        manifest = manifest_of(registry, record)
        if "universe" in manifest["solver"]:
            yield record, manifest


@dataclass(frozen=True)
class Reseparated:
    """The lines of the recipe's new revision, and the patches that stayed although they were solved for another universe."""

    lines: list[HistoryRecord]
    left: tuple[PatchRecord, ...]
    concepts: int


def reseparate(
    opened: OpenRegistry,
    recipe: str,
    exchange: Callable[[Mapping[str, str], str], list[HistoryRecord]],
    *,
    device: str = "auto",
    progress: Progress = silent,
) -> Reseparated:
    """Solve a recipe's closed-form patches for the registry's universe, and `exchange` them: new ids by old ones, and why.

    Each new patch has the settings that were chosen for the old one, its seed and compressions. The concepts are those of the
    registry as they are described now. Patches of other solvers stay. Raises what the solvers raise, and NotReseparable where
    two patches would become one; nothing is exchanged then.
    """
    from overpaint.bases.loading import resolve_device
    from overpaint.workspace.solving import carry_out

    record = opened.registry.recipe(recipe)
    if record.name != recipe:
        raise OverpaintError(f"{recipe!r} is as it was then and cannot be changed; re-separate {record.name!r} itself")
    context = opened.solve_context(record.base)
    stale, left = _stale(opened, recipe, context)
    if not stale:
        return Reseparated([], left, len(context.universe))
    plan = plan_solves(opened.registry, stale.values(), context, base=record.base)
    _refuse_collisions(opened, recipe, stale, plan)
    new_ids = dict[SolveRequest, str]()
    for outcome in carry_out(opened.registry, plan, opened.base, resolve_device(device), report=progress):
        if outcome.record is None:
            raise OverpaintError(
                f"{outcome.task.request.concept.name}: {outcome.error}; the recipe {recipe!r} is as it was"
            )
        new_ids[outcome.task.request] = outcome.record.id
    concepts = len(plan.context.universe)
    lines = exchange(
        {old: new_ids[request] for old, request in stale.items()}, f"re-separated for {_concepts(concepts)}"
    )
    return Reseparated(lines, left, concepts)


def _stale(
    opened: OpenRegistry, recipe: str, context: SolveContext
) -> tuple[dict[str, SolveRequest], tuple[PatchRecord, ...]]:
    """By id, the requests that solve patches again; and patches of other solvers, for another universe than today's."""
    from overpaint.solvers.problem import chosen_settings

    known = {concept.name: concept for concept in context.universe}
    stale, left = dict[str, SolveRequest](), []
    records = [record for record, _ in opened.registry.patches_on(recipe)]
    closed_form = _closed_form(records)
    for record, manifest in _with_universe(opened.registry, records):
        if record.solver in closed_form:
            concept = known.get(record.concept) or Concept.from_json(dict(manifest["concept"]))
            settings = as_texts(chosen_settings(solver_class(record.solver), record.settings, _revision(manifest)))
            rule = decoupled_of(manifest)
            request = SolveRequest(
                concept, record.solver, settings, record.seed, truncations_of(manifest), decoupled=rule
            )
            fingerprint = manifest["subject"]["fingerprint"]
            if digest_of_request(request, request.configured(), context, fingerprint) != digest_of_manifest(manifest):
                stale[record.id] = request
        elif universe_digest(universe_of(manifest)) != universe_digest(each.as_json() for each in context.universe):
            left.append(record)
    return stale, tuple(left)


def _refuse_collisions(opened: OpenRegistry, recipe: str, stale: Mapping[str, SolveRequest], plan: SolvePlan) -> None:
    """Two patches for one concept that differ in nothing but their universe would be one patch afterwards."""
    applied = {record.id for record, _ in opened.registry.patches_on(recipe)}
    reused = {task.request for task in plan.tasks if task.done is not None and task.done.id in applied}
    for request in stale.values():
        if request in reused:
            raise NotReseparable(
                f"two patches for {request.concept.name!r} are on the recipe {recipe!r} and differ in nothing but their "
                "universe; remove one of them first"
            )
        reused.add(request)


def _concepts(count: int) -> str:
    return f"{count} concept{'' if count == 1 else 's'}"
