"""`overpaint solvers`: the methods there are, and what can be set on each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from overpaint.commands.common import Talk, json_option, show_table


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
    from overpaint.solvers import solvers as all_solvers
    from overpaint.solvers.listing import BrokenSolver

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
    from overpaint.solvers.settings import range_of, settable

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
