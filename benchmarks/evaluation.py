"""The published comparison: the suites on the embedded base, for every solver, as JSON and as `docs/results.md`.

The registry, its patches and all pictures are kept in a folder (`--work`); a run that is interrupted, or asked for more, goes
on where it was. `--only` and `--suites` narrow it down; a solver may have a setting (`separable:harden=2`) and be decoupled
(`esd+decoupled`). Several processes may share a folder: with `--shard 0/2` and `--shard 1/2`, or with `--only` and `--no-page`,
they write no page; `--pages` then writes it from what is there. `--n 100` asks for as many pictures as make 100 in every cell
(50 in a step of the scenes), and with `--budget` nothing is begun after so many seconds. `--on ray` and `--on ray://HOST:PORT`
solve a recipe's concepts and draw the pictures on a Ray cluster.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

import overpaint
from benchmarks.cells import Budget, BudgetSpent, Shard, add_on_option, working_on, write
from benchmarks.protocol import ASKED_BASE, WORDS, chosen
from benchmarks.results_page import results_page
from benchmarks.solvers import Asked
from benchmarks.tables import arguments, save, show
from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, OverpaintError
from overpaint.evaluation.judges import open_judge
from overpaint.evaluation.prompts import EmojiPrompts
from overpaint.evaluation.suites import SUITES as EVERY_SUITE
from overpaint.registry.records import EvaluationRecord
from overpaint.solvers import SOLVERS
from overpaint.solvers.problem import settings_of
from overpaint.workspace.evaluating import EvaluationRequest, evaluate
from overpaint.workspace.recipe import current_user
from overpaint.workspace.report import SCENES
from overpaint.workspace.workspace import Workspace

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
INK, NEON = chosen(("ink", "neon"), WORDS.styles)
TEN = chosen(("cat", "car", "sun", "pistol", "rose", "bomb", "pizza", "robot", "boat", "skull"), WORDS.objects)
SIX, TWELVE = (*TEN[:5], INK), (*TEN[:5], INK, *TEN[5:], NEON)
ALL_STYLES = WORDS.styles[:6]
STYLES = {name: next(s for s in ("flat", *WORDS.styles) if s in WORDS.styles and s != name) for name in (INK, NEON)}
"""Concepts that are styles, with what they should become."""
NAMED_STYLES = tuple(f"{style} style" for style in ALL_STYLES)
RECIPES = {"6": SIX, "12": TWELVE, "styles": ALL_STYLES, "named-styles": NAMED_STYLES}
"""What recipes hold, by the end of their names. Those of all styles are for scenes in which objects stay."""
SCENES_TOO = ("separable", "separable_mlp", "sepme")
"""Solvers whose scenes are also played with twelve concepts, and with all styles."""
IN_FULL = ("separable", "separable_mlp", "sepme", "esd", "ablation")
"""Solvers whose scenes are played with as many pictures as `--n` asks for; of the others, the few of a short run would do."""
AMONG_THEMSELVES = ("sepme",)
"""Solvers that are told of their recipe's concepts alone, as their paper has it, and not of all twelve."""
VARIANTS = ("separable:harden=2",)
"""Solvers that are attacked once more with another setting."""
SUITES = tuple(suite for suite in EVERY_SUITE if suite != "scale")
"""What every solver goes through."""
SCALED = ("separable", "uce", "rece", "nullspace")
"""Solvers of the suite `scale`, which belongs to no recipe in particular and is run with `separable`."""
FEWER: Mapping[str, Mapping[str, str]] = {
    "generality": {"erased": "8", "synonyms": "4", "others": "2"},
    "crosstalk": {"pictures": "4", "unlisted": "2"},
    "grid": {"objects": "10"},
    "scenes": {"pictures": "3", "regular": "2"},
    "scenes_by_name": {"pictures": "3", "regular": "4"},
    "probes": {"pictures": "4", "inversion": "60", "revival": "40"},
    "scale": {"solvers": ",".join(SCALED), "most": "32", "pictures": "40"},
}
"""Settings of suites, so that all solvers fit into two hours; the numbers of pictures stand beside the results."""


def per_cell(n: int) -> dict[str, dict[str, str]]:
    """Settings of suites with which every cell has `n` pictures: of erased and of other concepts; `n / 2` in steps of scenes."""
    objects = sum(name not in STYLES for name in SIX)
    each, others = str(-(-n // objects)), str(-(-n // (len(WORDS.objects) - objects)))
    styles = str(-(-n // (len(WORDS.styles) - 1)))
    more = {
        "quick": {"erased": each, "objects": others, "styles": styles, "together": str(int(each) * len(SIX))},
        "generality": {"erased": each, "synonyms": each, "others": others},
        # A step erases three concepts or more, restores two or more, and three are regular.
        "scenes": {"pictures": str(-(-n // 4)), "regular": "3"},
        # All pictures of a concept share one prompt here: ten regular concepts tell more than more pictures of three.
        "scenes_by_name": {"pictures": str(-(-n // 4)), "regular": "10"},
        "probes": {"pictures": each, "inversion": "60", "revival": "40"},
    }
    return {suite: {**FEWER.get(suite, {}), **more.get(suite, {})} for suite in (*FEWER, *more)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for and write the page."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "evaluation", help="registry and pictures")
    parser.add_argument("--only", default=",".join((*SOLVERS, *VARIANTS)), help="solvers, with commas between")
    parser.add_argument("--suites", default=",".join(SUITES), help="suites, with commas between; scale is one more")
    parser.add_argument(
        "--shard", default="0/1", help="which part of the solvers is run here, such as 0/2; no page then"
    )
    parser.add_argument("--n", type=int, default=0, help="pictures in every cell; 0: as few as two hours allow")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which nothing is begun; 0: no end")
    add_on_option(parser)
    parser.add_argument("--no-page", action="store_true", help="keep what was found and write no page")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps; the card takes 20")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pages", action="store_true", help="run nothing; write the results from what is there")
    asked = parser.parse_args(argv)
    workspace, shard = _shop(asked.work), Shard.parse(asked.shard)
    if not asked.pages:
        with working_on(asked.on):  # kept open: solving and drawing join the cluster, rather than start one each time
            _run(workspace, asked, shard, Budget(asked.budget))
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
            workspace.add_base(ASKED_BASE, ASKED_BASE)
    for name in dict.fromkeys((*TWELVE, *ALL_STYLES, *NAMED_STYLES)):
        kind = "style" if name in (*WORDS.styles, *NAMED_STYLES) else "object"
        workspace.registry.add_concept(Concept(name, kind, anchor=STYLES.get(name, "")), exist_ok=True)
    return workspace


def wanted(solver: str, recipe: str, suites: Sequence[str]) -> list[str]:
    """The suites, of those asked for, that a solver's recipe (one of `RECIPES`) goes through."""
    if recipe == "named-styles":
        # What other solvers are told of has the same styles by their other names.
        return [suite for suite in suites if suite == "scenes_by_name" and solver in AMONG_THEMSELVES]
    if recipe != "6":
        # For the others, six say enough.
        return [suite for suite in suites if suite in SCENES and solver in SCENES_TOO]
    if solver in VARIANTS:
        return [suite for suite in suites if suite in ("quick", "probes")]
    own = (*SUITES, *(("scale",) if solver == SCALED[0] else ()))
    return [suite for suite in suites if suite in own]


def recipe_name(solver: str, kind: str) -> str:
    """What the recipe of a solver is called: `separable-6`, `separable-harden-2-6`."""
    return f"{re.sub('[^a-z0-9_]+', '-', solver)}-{kind}"


def _run(workspace: Workspace, asked: Namespace, shard: Shard, budget: Budget) -> None:
    """Solve and evaluate; what a solver or a suite refuses is kept with its reason and does not stop the rest."""
    settings = per_cell(asked.n) if asked.n else FEWER
    for solver in shard.part(asked.only.split(",")):
        for kind, names in RECIPES.items():
            recipe = recipe_name(solver, kind)
            suites = wanted(solver, kind, asked.suites.split(","))
            suites = [suite for suite in suites if not (suite in SCENES and asked.n and solver not in IN_FULL)]
            reasons = []
            try:
                if suites:
                    _lay(workspace, recipe, solver, names, asked, budget)
            except BudgetSpent:
                raise
            except OverpaintError as error:
                reasons, suites = [str(error)], []
            for suite in suites:
                try:
                    request = EvaluationRequest(
                        suite, settings.get(suite, {}), steps=asked.steps, device=asked.device, on=asked.on
                    )
                    _evaluate(workspace, recipe, request, budget)
                except BudgetSpent:
                    raise
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


def _lay(
    workspace: Workspace, recipe: str, solver: str, names: tuple[str, ...], asked: Namespace, budget: Budget
) -> None:
    """A recipe with one patch of the solver for each concept; those that are there with today's settings are not solved again."""
    laid = workspace.create_recipe(recipe, base=ASKED_BASE, exist_ok=True)
    there = {record.concept: record.id for record, _ in laid.patches()}
    told = names if Asked.parse(solver).name in AMONG_THEMSELVES else TWELVE
    # On a cluster, all at once.
    for some in [names] if asked.on else [(name,) for name in names]:
        if set(some) - there.keys():
            budget.check()
            click.echo(f"{recipe}: solving {', '.join(some)}", err=True)
        for name, patch in zip(some, _solved(workspace, some, solver, asked.device, told, asked.on), strict=True):
            if patch == there.get(name):
                continue
            if name in there:
                click.echo(f"{recipe}: the patch for {name} was solved with other settings and is exchanged", err=True)
                laid.remove(there[name], why="solved again with other settings")
            laid.add(patch, why="the published comparison")


def _solved(
    workspace: Workspace, names: Sequence[str], solver: str, device: str, told: Sequence[str], on: str
) -> list[str]:
    """The patches of concepts with today's settings among the concepts told of, as they are or solved now."""
    asked = Asked.parse(solver)
    outcomes = workspace.solve_many(
        names,
        base=ASKED_BASE,
        solver=asked.name,
        decoupled=asked.decoupled,
        universe=told,
        settings=settings_of(asked.solver),
        device=device,
        on=on,
    )
    for outcome in outcomes:
        if outcome.record is None:
            raise OverpaintError(outcome.error)
    return [outcome.record.id for outcome in outcomes if outcome.record]


def _evaluate(workspace: Workspace, recipe: str, request: EvaluationRequest, budget: Budget) -> None:
    """Run a suite unless the recipe, as it is, has its numbers."""
    if any(record.suite == request.suite for record in workspace.recipe(recipe).evaluations()):
        return
    budget.check()
    click.echo(f"{recipe}: {request.suite}", err=True)
    evaluate(workspace, recipe, request, who=current_user(), progress=_progress)
    click.echo("", err=True)


def _progress(done: int, of: int, text: str) -> None:
    click.echo(f"\r  {done}/{of} {text}    ", nl=False, err=True)


def _records(workspace: Workspace) -> list[EvaluationRecord]:
    """Of every recipe, solver by solver as the package lists them."""
    order = [recipe_name(solver, kind) for kind in RECIPES for solver in (*SOLVERS, *VARIANTS)]
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
    for old in set(RESULTS.glob("*-*.json")) - kept:  # those of a recipe and a suite; others' files lie beside them
        old.unlink()
    judge = open_judge("", Base.open("emoji"), EmojiPrompts(), torch.device("cpu"))
    write(PAGE, results_page(records, refused, judge.name).encode())


if __name__ == "__main__":
    main()
