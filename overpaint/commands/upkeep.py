"""The upkeep of a registry: `verify`, `gc`, and `db` for its database."""

from __future__ import annotations

from pathlib import Path

import click

from overpaint.commands.common import (
    LocalPath,
    Terminal,
    digests_option,
    interruptible,
    json_option,
    open_workspace,
    show_table,
)

resume_option = click.option("--resume", is_flag=True, help="Go on where one that was stopped left off.")


@click.command()
@resume_option
@digests_option
@json_option
@click.pass_context
def verify(ctx: click.Context, resume: bool, digests: bool, as_json: bool) -> None:
    """Check everything in the registry by its digests.

    Damaged blobs are moved to quarantine. The exit code is 1 if anything is wrong.

    \b
    Example:
      overpaint verify
    """
    with Terminal() as terminal, interruptible(terminal, lambda: "`overpaint verify --resume` goes on from here"):
        verified = open_workspace(ctx, terminal=terminal).verify(progress=terminal.progress, resume=resume)
    rows = [[p.part, p.patch, p.concept, p.tensor, p.found] for p in verified.problems]
    if rows or as_json:
        columns = ["part", "patch", "concept", "tensor", "problem"]
        show_table("Problems", columns, rows, as_json, digests=digests)
    terminal.note(
        f"{verified.patches} patches, {verified.blobs} blobs, {verified.nbytes} bytes: "
        + (f"{len(rows)} problems" if rows else "all as it was")
    )
    ctx.exit(1 if rows else 0)


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
@resume_option
@digests_option
@json_option
@click.pass_context
def gc(ctx: click.Context, dry_run: bool, grace: float, resume: bool, digests: bool, as_json: bool) -> None:
    """Remove blobs that no patch needs.

    Writers that were killed leave them. Quarantine is left alone.

    \b
    Example:
      overpaint gc --dry-run
    """
    from overpaint.registry.upkeep import DAY, collect, plan_collection

    with Terminal() as terminal, interruptible(terminal, lambda: "`overpaint gc --resume` goes on from here"):
        registry = open_workspace(ctx, terminal=terminal).registry
        planned = plan_collection(registry, grace=grace * DAY, resume=resume, progress=terminal.progress)
        terminal.clear()
        rows = [[blob.digest, blob.nbytes] for blob in planned.unneeded]
        rows += [[file.name, file.nbytes] for file in planned.leftovers]
        if rows or as_json:
            show_table("Not needed", ["blob", "bytes"], rows, as_json, digests=digests)
        terminal.note(f"{planned.needed} blobs are needed; {planned.young} are not, but younger than {grace:g} days")
        if dry_run:
            terminal.note(f"{len(rows)} would be removed, {planned.nbytes} bytes")
            return
        done = collect(registry, planned, progress=terminal.progress)
        terminal.note(f"{done.removed} removed, {done.nbytes} bytes; {done.spared} were put again meanwhile and stay")


@click.group()
def db() -> None:
    """The registry's database."""


@db.command("upgrade")
@click.pass_context
def db_upgrade(ctx: click.Context) -> None:
    """Bring an older registry to this program's schema.

    A copy of the database is kept beside it.

    \b
    Example:
      overpaint db upgrade
    """
    from overpaint.registry.registry import Registry

    click.echo(f"upgraded from revision {Registry.upgrade(ctx.obj)}")


@db.command("backup")
@click.argument("file", type=LocalPath())
@click.pass_context
def db_backup(ctx: click.Context, file: Path) -> None:
    """Copy the database to a new FILE, also while in use.

    The blobs beside it never change; copy them as files.

    \b
    Example:
      overpaint db backup before-the-upgrade.db
    """
    from overpaint.registry.schema import backup

    click.echo(f"backed up {backup(ctx.obj, file)} bytes to {file}")


@db.command("restore")
@click.argument("file", type=LocalPath())
@click.pass_context
def db_restore(ctx: click.Context, file: Path) -> None:
    """Put a backup in the place of the database.

    The database that was there is kept beside it.

    \b
    Example:
      overpaint db restore before-the-upgrade.db
    """
    from overpaint.registry.models import HEAD
    from overpaint.registry.schema import restore

    done = restore(ctx.obj, file)
    click.echo(f"restored {file}" + (f"; what was there is {done.kept}" if done.kept else ""))
    if done.revision != HEAD:
        Terminal().note(
            f"the backup has schema {done.revision} and this program needs {HEAD}; run `overpaint db upgrade`"
        )
    else:
        Terminal().note("run `overpaint verify` to see whether all blobs that it names are there")


@db.command("reindex")
@click.pass_context
def db_reindex(ctx: click.Context) -> None:
    """Bring what searches read up to date.

    `overpaint verify` says when that is needed. A text that was lost is found first from then on.

    \b
    Example:
      overpaint db reindex
    """
    written = open_workspace(ctx).registry.reindex()
    click.echo(
        f"{written} search texts were out of date and are mended" if written else "all search texts are up to date"
    )
