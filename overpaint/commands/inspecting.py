"""`overpaint inspect`: what is in a checkpoint, a base or a patch file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from overpaint.commands.common import json_option, show_table


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE-OR-FOLDER")
@json_option
@click.pass_context
def inspect(ctx: click.Context, path: Path, as_json: bool) -> None:
    """Say what is erased in a checkpoint and check every digest; also describes bases and patch files.

    The exit code is 0 only when Overpaint built it and everything recorded is true.
    """
    from overpaint.patches.inspect import inspect as look

    found = look(path)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1))
    else:
        show_table(f"{path}: {found.what}", ["what", "value"], [[k, _plain(v)] for k, v in found.facts.items()], False)
        rows = [[_plain(p.get("concept", "")), p["strength"], p.get("solver", ""), p["id"]] for p in found.patches]
        if rows:
            show_table("Erased in it", ["concept", "strength", "solver", "patch"], rows, False)
        for problem in found.problems:
            click.echo(_plain(problem))
        if found.sound:
            click.echo("every digest matches")
    ctx.exit(0 if found.sound else 1)


def _plain(value: Any) -> str:
    """A value from a file somebody else wrote: what a terminal would obey is shown instead."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
