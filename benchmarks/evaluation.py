"""The published comparison: the suites on the embedded base, for every solver, as JSON and as `docs/results.md`.

The registry, its patches and all pictures are kept in a folder (`--work`); a run that is interrupted, or asked for more, goes
on where it was. `--only` and `--suites` narrow it down. Several processes may share a folder: with `--shard 0/2` and
`--shard 1/2`, or with `--only` and `--no-page`, they write no page; `--pages` then writes it from what is there. In full it
takes one to two hours on two cores, the greater part for the solvers that train.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import overpaint
from benchmarks.cells import Shard, write
from benchmarks.protocol import tuned
from benchmarks.results_page import results_page
from benchmarks.tables import arguments, save, show
from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, OverpaintError
from overpaint.registry.registry import EvaluationRecord
from overpaint.solvers import SOLVERS, solver_class
from overpaint.solvers.problem import configure, settings_of
from overpaint.workspace.evaluating import EvaluationRequest, evaluate
from overpaint.workspace.recipe import current_user
from overpaint.workspace.workspace import Workspace

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
BASE = "emoji"
SIX = ("cat", "car", "sun", "pistol", "rose", "ink")
TWELVE = (*SIX, "bomb", "pizza", "robot", "boat", "skull", "neon")
STYLES = {"ink": "flat", "neon": "flat"}
"""Concepts that are styles, with what they should become."""
TWELVE_TOO = ("separable",)
"""Solvers whose scenes are also played with twelve concepts."""
SUITES = ("quick", "generality", "grid", "scenes", "crosstalk", "probes", "cost")
"""What every solver goes through."""
SCALED = ("separable", "uce", "rece", "nullspace")
"""Solvers of the suite `scale`, which belongs to no recipe in particular and is run with `separable`."""
FEWER: Mapping[str, Mapping[str, str]] = {
    "generality": {"erased": "8", "synonyms": "4", "others": "2"},
    "crosstalk": {"pictures": "4", "unlisted": "2"},
    "grid": {"objects": "10"},
    "scenes": {"pictures": "3", "regular": "2"},
    "probes": {"pictures": "4", "inversion": "60", "revival": "40"},
    "scale": {"solvers": ",".join(SCALED), "most": "32", "pictures": "40"},
}
"""Settings of suites, so that all solvers fit into two hours; the numbers of pictures stand beside the results."""


def main() -> None:
    """Run what is asked for and write the page."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "evaluation", help="registry and pictures")
    parser.add_argument("--only", default=",".join(SOLVERS), help="solvers, with commas between")
    parser.add_argument("--suites", default=",".join(SUITES), help="suites, with commas between; scale is one more")
    parser.add_argument(
        "--shard", default="0/1", help="which part of the solvers is run here, such as 0/2; no page then"
    )
    parser.add_argument("--no-page", action="store_true", help="keep what was found and write no page")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps; the card takes 20")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pages", action="store_true", help="run nothing; write the results from what is there")
    asked = parser.parse_args()
    workspace, shard = _shop(asked.work), Shard.parse(asked.shard)
    if not asked.pages:
        _run(workspace, asked, shard)
    records = _records(workspace)
    if asked.pages or not (asked.no_page or shard.of > 1):
        _write(records, _refused(asked.work))
    rows = [[r.recipe, r.suite, r.seconds, len(r.results), r.judge] for r in records]
    save(asked.json, show("Evaluated", ["recipe", "suite", "seconds", "numbers", "judge"], rows))


def _shop(work: Path) -> Workspace:
    workspace = overpaint.open(work)
    if not workspace.bases():
        # Another process may have been faster.
        with suppress(AlreadyExists):
            workspace.add_base(BASE, "emoji")
    for name in TWELVE:
        kind = "style" if name in STYLES else "object"
        workspace.registry.ensure_concept(Concept(name, kind, anchor=STYLES.get(name, "")))
    return workspace


def wanted(solver: str, count: int, suites: Sequence[str]) -> list[str]:
    """The suites, of those asked for, that a solver's recipe of `count` concepts goes through."""
    if count == len(TWELVE):
        # Twelve are beyond what SepME can hold on Stable Diffusion; for the others, six say enough.
        return [suite for suite in suites if suite == "scenes" and solver in TWELVE_TOO]
    own = (*SUITES, *(("scale",) if solver == SCALED[0] else ()))
    return [suite for suite in suites if suite in own]


def _run(workspace: Workspace, asked: Namespace, shard: Shard) -> None:
    """Solve and evaluate; what a solver or a suite refuses is kept with its reason and does not stop the rest."""
    for solver in shard.part(asked.only.split(",")):
        for names in (SIX, TWELVE):
            recipe = f"{solver}-{len(names)}"
            suites = wanted(solver, len(names), asked.suites.split(","))
            reasons = []
            try:
                if suites:
                    _lay(workspace, recipe, solver, names, asked.device)
            except OverpaintError as error:
                reasons, suites = [str(error)], []
            for suite in suites:
                try:
                    request = EvaluationRequest(suite, FEWER.get(suite, {}), steps=asked.steps, device=asked.device)
                    _evaluate(workspace, recipe, request)
                except OverpaintError as error:
                    reasons.append(f"{suite}: {error}")
            _keep_reasons(asked.work, recipe, reasons)


def _keep_reasons(work: Path, recipe: str, reasons: Sequence[str]) -> None:
    """In a file for each recipe, so that a page can be written without running anything."""
    for reason in reasons:
        click.echo(f"{recipe}: {reason}", err=True)
    place = work / "refused" / f"{recipe}.txt"
    if reasons:
        write(place, "; ".join(reasons).encode())
    else:
        place.unlink(missing_ok=True)


def _refused(work: Path) -> dict[str, str]:
    return {place.stem: place.read_text("utf-8") for place in sorted((work / "refused").glob("*.txt"))}


def _lay(workspace: Workspace, recipe: str, solver: str, names: tuple[str, ...], device: str) -> None:
    """A recipe with one patch of the solver for each concept; those that lie there are not solved again."""
    laid = workspace.create_recipe(recipe, base=BASE, exist_ok=True)
    there = {record.concept for record, _ in laid.patches()}
    for name in names:
        if name not in there:
            click.echo(f"{recipe}: solving {name}", err=True)
            concept = next(concept for concept in workspace.concepts() if concept.name == name)
            laid.add(_solved(workspace, concept, solver, device), why="the published comparison")


def _solved(workspace: Workspace, concept: Concept, solver: str, device: str) -> str:
    """The patch of a concept with today's settings, as it is or solved now."""
    settings = tuned(solver)
    same = settings_of(configure(solver_class(solver), settings))
    for record in workspace.patches(concept=concept.name, solver=solver):
        if record.settings == same:
            return record.id
    return workspace.solve(concept, base=BASE, solver=solver, settings=settings, device=device).id


def _evaluate(workspace: Workspace, recipe: str, request: EvaluationRequest) -> None:
    """Run a suite unless the recipe, as it is, has its numbers."""
    if any(record.suite == request.suite for record in workspace.recipe(recipe).evaluations()):
        return
    click.echo(f"{recipe}: {request.suite}", err=True)
    evaluate(workspace, recipe, request, who=current_user(), progress=_progress)
    click.echo("", err=True)


def _progress(done: int, of: int, text: str) -> None:
    click.echo(f"\r  {done}/{of} {text}    ", nl=False, err=True)


def _records(workspace: Workspace) -> list[EvaluationRecord]:
    """Of every recipe, solver by solver as the package lists them."""
    order = [f"{solver}-{len(names)}" for names in (SIX, TWELVE) for solver in SOLVERS]
    names = sorted((record.name for record in workspace.recipes()), key=lambda name: (_place(order, name), name))
    return [record for name in names for record in workspace.recipe(name).evaluations()]


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _write(records: Sequence[EvaluationRecord], refused: Mapping[str, str]) -> None:
    """One JSON file for each recipe and suite instead of those that were there, and the page over all of them."""
    kept = set()
    for record in records:
        said: dict[str, Any] = {**asdict(record), "at": record.at.isoformat(timespec="seconds")}
        del said["who"]
        file = RESULTS / f"{record.recipe}-{record.suite}.json"
        write(file, (json.dumps(said, indent=1, ensure_ascii=False) + "\n").encode())
        kept.add(file)
    for old in set(RESULTS.glob("*.json")) - kept:
        old.unlink()
    write(PAGE, results_page(records, refused).encode())


if __name__ == "__main__":
    main()
