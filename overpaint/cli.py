"""The command line: sentences. Each command parses, makes one call, prints. The only reader of the environment.

Results go to standard output, notices and progress to standard error. Heavy imports happen inside commands, so that
`--help` and the lists answer at once. The sentences themselves are in `overpaint/commands/`, arranged by what a user does.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import click

from overpaint import core
from overpaint.commands.beginning import base, concept, demo, init
from overpaint.commands.checkpoints import build, generate, inspect
from overpaint.commands.common import default_registry
from overpaint.commands.evaluating import certify, crosstalk, evaluate, report, verify_certificate
from overpaint.commands.patches import patch
from overpaint.commands.recipes import recipe, undo
from overpaint.commands.searching import search, tag
from overpaint.commands.serving import serve, token, ui
from overpaint.commands.sharing import export_, import_, key, pull, push
from overpaint.commands.solving import solve, solvers
from overpaint.commands.upkeep import db, gc, verify
from overpaint.core.errors import OverpaintError
from overpaint.core.names import printed

SECTIONS = {
    "Begin": [init, base, concept, demo],
    "Erase and restore": [solve, solvers, patch, recipe, undo],
    "Use": [generate, ui, build, inspect],
    "Serve": [serve, token],
    "Measure": [evaluate, report, crosstalk],
    "Find": [search, tag],
    "Certify": [certify, verify_certificate],
    "Share": [push, pull, export_, import_, key],
    "Keep in order": [verify, gc, db],
}


class _Commands(click.Group):
    """Lists commands by section, and turns the package's own errors into one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A file's name may be no text, and a terminal may lack a letter: neither is a reason to stop when all is done.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except OverpaintError as error:
            raise click.ClickException(printed(str(error))) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(command.name or "") for commands in SECTIONS.values() for command in commands)
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                limit = formatter.width - 6 - width
                rows = [(f"{command.name:<{width}}", command.get_short_help_str(limit)) for command in commands]
                formatter.write_dl(rows)


def _show_version(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(f"overpaint, version {core.__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
@click.option(
    "--registry",
    envvar="OVERPAINT_REGISTRY",
    show_envvar=True,
    metavar="DIR-or-URL",
    help="Default: the user's data directory.",
)
@click.pass_context
def main(ctx: click.Context, registry: str | None) -> None:
    """Erase concepts from text-to-image models with small, exact, removable patches."""
    ctx.obj = registry or default_registry()


for _commands in SECTIONS.values():
    for _command in _commands:
        main.add_command(_command)


if __name__ == "__main__":
    main()
