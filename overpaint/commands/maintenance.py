"""The upkeep of a registry: `verify`, `gc`, and backups of its database."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from overpaint.commands.common import Talk, json_option, open_workspace, show_table
from overpaint.commands.using import db


@click.command()
@json_option
@click.pass_context
def verify(ctx: click.Context, as_json: bool) -> None:
    """Read everything again and compare it with its digests; damaged blobs go to quarantine. Exit code 1 if any is."""
    talk = Talk()
    found = open_workspace(ctx).verify(progress=talk.progress)
    talk.clear()
    rows = [
        [p.part, p.patch if as_json else (p.patch or "")[:12], p.concept, p.tensor, p.found] for p in found.problems
    ]
    if rows or as_json:
        show_table("Problems", ["part", "patch", "concept", "tensor", "problem"], rows, as_json)
    talk.say(
        f"{found.patches} patches, {found.blobs} blobs, {found.nbytes} bytes: "
        + (f"{len(rows)} problems" if rows else "all as it was")
    )
    if rows:
        sys.exit(1)


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--grace",
    default=14.0,
    show_default=True,
    type=click.FloatRange(0),
    metavar="DAYS",
    help="Leave alone what was put less than so many days ago.",
)
@json_option
@click.pass_context
def gc(ctx: click.Context, dry_run: bool, grace: float, as_json: bool) -> None:
    """Remove blobs that no patch needs, left by writers that were killed. Quarantine is left alone."""
    from overpaint.registry.gc import DAY, collect, plan

    registry, talk = open_workspace(ctx).registry, Talk()
    planned = plan(registry, grace=grace * DAY)
    rows = [[blob.digest if as_json else blob.digest[:12], blob.nbytes] for blob in planned.unneeded]
    rows += [[file.name, file.nbytes] for file in planned.leftovers]
    if rows or as_json:
        show_table("Not needed", ["blob", "bytes"], rows, as_json)
    talk.say(f"{planned.needed} blobs are needed; {planned.young} are not, but younger than {grace:g} days")
    if dry_run:
        talk.say(f"{len(rows)} would be removed, {planned.nbytes} bytes")
        return
    done = collect(registry, planned, report=talk.progress)
    talk.say(f"{done.removed} removed, {done.nbytes} bytes; {done.spared} were put again meanwhile and stay")


@db.command("backup")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_context
def db_backup(ctx: click.Context, file: Path) -> None:
    """Copy the database, which may be in use, to the new FILE. The blobs beside it never change; copy them as files."""
    from overpaint.registry.backup import backup

    click.echo(f"backed up {backup(ctx.obj, file)} bytes to {file}")


@db.command("restore")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_context
def db_restore(ctx: click.Context, file: Path) -> None:
    """Put a backup in the place of the database, which is kept beside it."""
    from overpaint.registry.backup import restore
    from overpaint.registry.models import HEAD

    done = restore(ctx.obj, file)
    click.echo(f"restored {file}" + (f"; what was there is {done.kept}" if done.kept else ""))
    if done.revision != HEAD:
        Talk().say(f"the backup has schema {done.revision} and this program needs {HEAD}; run `overpaint db upgrade`")
    else:
        Talk().say("run `overpaint verify` to see whether all blobs that it names are there")
