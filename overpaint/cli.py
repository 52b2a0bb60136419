"""The command line: sentences. Each command parses, makes one call, prints. The only reader of the environment.

Results go to standard output, talk to standard error. Heavy imports happen inside commands, so that `--help` and the
lists answer at once. The sentences themselves are in `overpaint/commands/`, a file for each noun.
"""

from __future__ import annotations

from typing import Any

import click

from overpaint.commands.bases import base, base_keep, base_prepare
from overpaint.commands.certifying import certify, verify_certificate
from overpaint.commands.common import open_workspace
from overpaint.commands.concepts import concept
from overpaint.commands.evaluating import crosstalk, evaluate, report
from overpaint.commands.interchange import patch_export, patch_import, recipe_export
from overpaint.commands.maintenance import gc, verify
from overpaint.commands.patches import patch, patch_compress
from overpaint.commands.recipes import recipe, recipe_reseparate
from overpaint.commands.searching import search, tag
from overpaint.commands.sharing import export_, import_, key, pull, push
from overpaint.commands.solving import solve, solvers
from overpaint.commands.using import build, db, demo, generate, inspect
from overpaint.core import __version__
from overpaint.core.errors import OverpaintError
from overpaint.core.urls import printed


class _Commands(click.Group):
    """Turns the package's own errors into one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OverpaintError as error:
            raise click.ClickException(printed(str(error))) from error


def default_registry() -> str:
    """The user's data directory."""
    from platformdirs import user_data_dir

    return user_data_dir("overpaint")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option(
    "--registry", envvar="OVERPAINT_REGISTRY", metavar="DIR-or-URL", help="Default: the user's data directory."
)
@click.pass_context
def main(ctx: click.Context, registry: str | None) -> None:
    """Erase concepts from text-to-image models with small, exact, removable patches."""
    ctx.obj = registry or default_registry()


@main.command()
@click.option("--blobs", metavar="URL", help="Keep the bytes of patches there instead of in the registry's folder.")
@click.pass_context
def init(ctx: click.Context, blobs: str | None) -> None:
    """Make a registry."""
    folder = open_workspace(ctx, create=True).registry.folder
    if blobs is not None:
        from overpaint.registry.store import place_store

        place_store(folder, blobs)
    click.echo(f"registry at {folder}")


for _command in (base, concept, solve, patch, recipe, tag, search, build, generate, inspect, crosstalk, demo, db):
    main.add_command(_command)
main.add_command(evaluate)
main.add_command(report)
for _command in (solvers, export_, import_, push, pull, key, certify, verify_certificate, verify, gc):
    main.add_command(_command)
for _command in (patch_import, patch_export, patch_compress):
    patch.add_command(_command)
for _command in (base_keep, base_prepare):
    base.add_command(_command)
for _command in (recipe_export, recipe_reseparate):
    recipe.add_command(_command)


if __name__ == "__main__":
    main()
