"""`overpaint solve`: compute and store patches. `overpaint solvers`: the methods, and what can be set on each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overpaint.commands.common import (
    BASE,
    CONCEPT,
    SOLVER,
    LocalPath,
    Renamed,
    Terminal,
    decouple_options,
    decoupling,
    device_option,
    digests_option,
    interruptible,
    json_option,
    on_option,
    open_workspace,
    settings_of,
    show_table,
    universe_option,
)

if TYPE_CHECKING:
    from overpaint.workspace.planning import SolvePlan
    from overpaint.workspace.solving import SolveOutcome


@click.command()
@click.argument("name", required=False, type=SOLVER)
@json_option
def solvers(name: str | None, as_json: bool) -> None:
    """List solvers, or show the settings of one.

    Use a setting with `overpaint solve --set NAME=VALUE`, a preset with `--set preset=NAME`.

    \b
    Example:
      overpaint solvers
      overpaint solvers esd
    """
    if name is None:
        _show_all(as_json)
    else:
        _show_one(name, as_json)


def _show_all(as_json: bool) -> None:
    from overpaint.solvers import BrokenSolver
    from overpaint.solvers import solvers as all_solvers

    listed, refused = all_solvers()
    rows = []
    for solver in listed.values():
        try:
            rows.append([solver.name, solver.about, solver.package])
        except BrokenSolver as error:
            refused.append(str(error))
    show_table("Solvers", ["name", "what it does", "package"], rows, as_json)
    for sentence in refused:
        Terminal().note(f"left out: {sentence}")


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
@click.argument("concepts", nargs=-1, metavar="[CONCEPT]...", type=CONCEPT)
@click.option("--from", "file", type=LocalPath(), metavar="FILE", help="A YAML or JSON list of concepts.")
@click.option("--base", "base_name", required=True, type=BASE, help="Name of the base.")
@click.option("--solver", type=SOLVER, help="How; default: separable, or what the file says.")
@click.option("--set", "settings", multiple=True, metavar="K=V", help="A setting of the solver; may be repeated.")
@click.option("--seed", type=int, help="Default: 0, or what the file says.")
@click.option("--compress", metavar="RANK|ENERGY", help="Keep so many directions of each tensor (4) or so much (0.99).")
@decouple_options
@universe_option
@click.option("--harden", type=int, metavar="N", help="Rounds against what still calls a concept up (separable).")
@click.option("--update", is_flag=True, help="Describe known concepts as the file does.")
@click.option(
    "--force", cls=Renamed, old=["--again"], is_flag=True, help="Also solve what was solved before with equal inputs."
)
@click.option("--dry-run", is_flag=True, help="Only show what would be solved.")
@device_option
@on_option
@digests_option
@json_option
@click.pass_context
def solve(
    ctx: click.Context,
    concepts: tuple[str, ...],
    file: Path | None,
    base_name: str,
    solver: str | None,
    settings: tuple[str, ...],
    seed: int | None,
    compress: str | None,
    decouple: bool,
    exactly: bool,
    universe: tuple[str, ...],
    harden: int | None,
    update: bool,
    force: bool,
    dry_run: bool,
    device: str,
    on: str,
    digests: bool,
    as_json: bool,
) -> None:
    """Compute and store the patch of each concept.

    With --decouple, what a solver's change does to any other concept of the registry is taken out of it, so that patches that
    were trained apart can be summed; see `patch decouple`.

    Concepts are named, or listed in a file with --from. A name the registry does not know becomes an object. What was
    solved before with equal inputs is not solved again, so a run that was interrupted goes on where it stopped.

    \b
    Example:
      overpaint solve cat ink --base emoji
      overpaint solve --from concepts.yaml --base sd15 --solver uce
    """
    if bool(concepts) == (file is not None):
        raise click.UsageError("name the concepts, or a file that lists them with --from")
    chosen = settings_of(settings) | ({} if harden is None else {"harden": str(harden)})
    outcomes: list[SolveOutcome] = []
    plan: SolvePlan | None = None
    with Terminal() as terminal, interruptible(terminal, lambda: _stored(plan, outcomes)):
        workspace = open_workspace(ctx, terminal=terminal)
        plan = workspace.plan(
            concepts,
            file=file,
            base=base_name,
            solver=solver,
            seed=seed,
            compress=compress,
            decoupled=decoupling(decouple, exactly),
            universe=universe,
            update=update,
            force=force,
            settings=chosen,
        )
        if not dry_run:
            workspace.carry_out(plan, device=device, on=on, progress=terminal.progress, on_result=outcomes.append)
    if dry_run:
        _show_plan(plan, digests, as_json)
    else:
        _show(outcomes, digests, as_json)


def _show(outcomes: list[SolveOutcome], digests: bool, as_json: bool) -> None:
    rows = [
        [
            o.record.concept,
            o.record.id,
            o.record.kind,
            o.record.nbytes,
            round(o.seconds, 3),
            "before" if o.before else "now",
        ]
        for o in outcomes
        if o.record is not None
    ]
    if rows or as_json:
        columns = ["concept", "patch", "kind", "bytes", "seconds", "solved"]
        show_table("Solved", columns, rows, as_json, digests=digests)
    if before := sum(outcome.before for outcome in outcomes):
        Terminal().note(f"{before} of {len(outcomes)} were solved before with equal inputs; --force solves them again")
    for note in dict.fromkeys(outcome.diagnostics["note"] for outcome in outcomes if "note" in outcome.diagnostics):
        Terminal().note(note)
    failed: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.error:
            failed.setdefault(outcome.error, []).append(outcome.task.request.concept.name)
    if failed:
        raise click.ClickException("\n".join(_failure(names, error) for error, names in failed.items()))


def _failure(names: list[str], error: str) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"not solved: {', '.join(names[:5])}{more}: {error}"


SHOWN = 200
"""Rows of a plan for people: drawing a table of ten thousand takes longer than planning them. --json has all."""


def _show_plan(plan: SolvePlan, digests: bool, as_json: bool) -> None:
    """One row for each patch: what its concept is to the registry, how it would be solved, and its id if it was."""
    unknown = {concept.name: "new" for concept in plan.new} | {concept.name: "changed" for concept in plan.changed}
    rows = []
    for task in plan.tasks if as_json else plan.tasks[:SHOWN]:
        request = task.request
        settings = [f"{name}={value}" for name, value in request.settings.items()]
        settings += [f"decoupled ({request.decoupled})"] if request.decoupled else []
        settings += [f"compressed to {size}" for size in request.truncations]
        name = request.concept.name
        done = task.done.id if task.done else None
        rows.append([name, unknown.get(name, "known"), request.solver, ", ".join(settings), request.seed, done])
    columns = ["concept", "in the registry", "solver", "settings", "seed", "solved before"]
    show_table(f"Would solve on {plan.base.name}", columns, rows, as_json, digests=digests)
    if len(rows) < len(plan.tasks):
        Terminal().note(f"and {len(plan.tasks) - len(rows)} more; --json shows all")
    Terminal().note(
        f"{len(plan.open)} of {len(plan.tasks)} to solve, with {len(plan.context.universe)} concepts in the universe"
    )


def _stored(plan: SolvePlan | None, outcomes: list[SolveOutcome]) -> str:
    now = sum(outcome.record is not None and not outcome.before for outcome in outcomes)
    if plan is None or not now:
        return "nothing was stored"
    return f"{now} of {len(plan.open)} are solved and stored; run the same command again for the rest"
