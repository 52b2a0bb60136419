"""`overpaint solve`: compute and store patches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overpaint.commands.common import Talk, device_option, interruptible, json_option, open_workspace, show_table

if TYPE_CHECKING:
    from overpaint.workspace.planning import SolvePlan
    from overpaint.workspace.solving import SolveOutcome


# `overpaint solvers`: the methods there are, and what can be set on each.


@click.command()
@click.argument("name", required=False)
@json_option
def solvers(name: str | None, as_json: bool) -> None:
    """List all solvers, or show the settings and presets of one.

    Use a setting with `overpaint solve --set NAME=VALUE`, a preset with `--set preset=NAME`.
    """
    if name is None:
        _show_all(as_json)
    else:
        _show_one(name, as_json)


def _show_all(as_json: bool) -> None:
    from overpaint.solvers import BrokenSolver
    from overpaint.solvers import solvers as all_solvers

    found, refused = all_solvers()
    rows = []
    for solver in found.values():
        try:
            rows.append([solver.name, solver.about, solver.package])
        except BrokenSolver as error:
            refused.append(str(error))
    show_table("Solvers", ["name", "what it does", "package"], rows, as_json)
    for sentence in refused:
        Talk().say(f"left out: {sentence}")


def _show_one(name: str, as_json: bool) -> None:
    from overpaint.solvers import solver_class
    from overpaint.solvers.problem import range_of, settable

    solver = solver_class(name)
    presets: Mapping[str, Mapping[str, Any]] = solver.PRESETS
    rows = [
        [
            setting,
            spec.default,
            *(values.get(setting, "") for values in presets.values()),
            range_of(spec),
            spec.metadata["about"],
        ]
        for setting, spec in settable(solver).items()
    ]
    columns = ["setting", "default", *(f"preset {preset}" for preset in presets), "range", "what it is"]
    show_table(f"{name}: {(solver.__doc__ or '').strip().splitlines()[0]}", columns, rows, as_json)


@click.command()
@click.argument("concepts", nargs=-1, metavar="[CONCEPT...]")
@click.option(
    "--from", "file", type=click.Path(path_type=Path), metavar="FILE", help="A YAML or JSON list of concepts."
)
@click.option("--base", "base_name", required=True, help="Name of the base.")
@click.option("--solver", help="How; default: separable, or what the file says.")
@click.option("--set", "settings", multiple=True, metavar="K=V", help="A setting of the solver; may be repeated.")
@click.option("--seed", type=int, help="Default: 0, or what the file says.")
@click.option("--compress", metavar="RANK|ENERGY", help="Keep so many directions of each tensor (4) or so much (0.99).")
@click.option("--update", is_flag=True, help="Where a file describes a known concept otherwise, take the file's word.")
@click.option("--again", is_flag=True, help="Also solve what was solved before with equal inputs.")
@click.option("--dry-run", is_flag=True, help="Only show what would be solved.")
@device_option
@json_option
@click.pass_context
def solve(
    ctx: click.Context,
    /,
    concepts: tuple[str, ...],
    file: Path | None,
    base_name: str,
    update: bool,
    again: bool,
    dry_run: bool,
    device: str,
    as_json: bool,
    **how: Any,
) -> None:
    """Compute and store the patch of each concept, named or listed in a file. A name the registry does not know becomes an
    object.

    What was solved before with equal inputs is not solved again, so a run that was interrupted goes on where it was.
    """
    if bool(concepts) == (file is not None):
        raise click.UsageError("name the concepts, or a file that lists them with --from")
    how["settings"] = dict(_pair(text) for text in how["settings"])
    talk = Talk()
    outcomes: list[SolveOutcome] = []
    plan: SolvePlan | None = None
    with interruptible(talk, lambda: _kept(plan, outcomes)):
        workspace = open_workspace(ctx)
        plan = workspace.plan(concepts, file=file, base=base_name, update=update, force=again, **how)
        if dry_run:
            _show_plan(plan, as_json)
            return
        workspace.carry_out(plan, device=device, progress=talk.progress, on_result=outcomes.append)
    talk.clear()
    _show(outcomes, as_json)


def _show(outcomes: list[SolveOutcome], as_json: bool) -> None:
    rows = [
        [o.record.concept, o.record.id, o.record.kind, o.record.nbytes, round(o.seconds, 3), _when(o)]
        for o in outcomes
        if o.record is not None
    ]
    if rows or as_json:
        show_table("Solved", ["concept", "patch", "kind", "bytes", "seconds", "solved"], rows, as_json)
    before = sum(outcome.before for outcome in outcomes)
    if before:
        Talk().say(f"{before} of {len(outcomes)} were solved before with equal inputs; --again solves them once more")
    failed: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.error:
            failed.setdefault(outcome.error, []).append(outcome.task.order.concept.name)
    if failed:
        raise click.ClickException("\n".join(_failure(names, error) for error, names in failed.items()))


def _when(outcome: SolveOutcome) -> str:
    return "before" if outcome.before else "now"


def _failure(names: list[str], error: str) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"not solved: {', '.join(names[:5])}{more}: {error}"


SHOWN = 200
"""Rows of a plan for people: drawing a table of ten thousand takes longer than planning them. --json has all."""


def _show_plan(plan: SolvePlan, as_json: bool) -> None:
    """One row for each patch: what its concept is to the registry, how it would be solved, and its id if it was."""
    unknown = {concept.name: "new" for concept in plan.new} | {concept.name: "changed" for concept in plan.changed}
    rows = []
    for task in plan.tasks if as_json else plan.tasks[:SHOWN]:
        order, done = task.order, task.done.id if task.done else None
        settings = ", ".join(f"{name}={value}" for name, value in order.settings.items())
        settings += "".join(f"{', ' if settings else ''}compressed to {keep}" for keep in order.keeps)
        name = order.concept.name
        shown = done if as_json or done is None else done[:12]
        rows.append([name, unknown.get(name, "known"), order.solver, settings, order.seed, shown])
    columns = ["concept", "in the registry", "solver", "settings", "seed", "solved before"]
    show_table(f"Would solve on {plan.base.name}", columns, rows, as_json)
    if len(rows) < len(plan.tasks):
        Talk().say(f"and {len(plan.tasks) - len(rows)} more; --json shows all")
    Talk().say(
        f"{len(plan.open)} of {len(plan.tasks)} to solve, with {len(plan.around.universe)} concepts in the universe"
    )


def _kept(plan: SolvePlan | None, outcomes: list[SolveOutcome]) -> str:
    now = sum(outcome.record is not None and not outcome.before for outcome in outcomes)
    if plan is None or not now:
        return "nothing was stored"
    return f"{now} of {len(plan.open)} are solved and stored; run the same command again for the rest"


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"--set takes NAME=VALUE; got {text!r}")
    return name.strip(), value
