"""`overpaint recipe reseparate`: patches of one universe again, after concepts joined."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from overpaint.commands.common import (
    Talk,
    device_option,
    interruptible,
    json_option,
    open_workspace,
    show_change,
    show_table,
    why_option,
)
from overpaint.commands.evaluating import show_evaluations

if TYPE_CHECKING:
    from overpaint.registry.records import HistoryRecord, RecipeEntry


# `overpaint recipe`: a base plus a set of patches, with a history.


@click.group()
def recipe() -> None:
    """Recipes: a base plus a set of patches, with a history.

    Where a command reads a recipe, NAME@3 means it as it was at revision 3, and NAME@TAG as it was when tagged.
    """


@recipe.command("list")
@click.option("--deleted", is_flag=True, help="Those that were deleted.")
@json_option
@click.pass_context
def recipe_list(ctx: click.Context, deleted: bool, as_json: bool) -> None:
    """List recipes."""
    rows = [
        [r.name, r.base, len(r.laid), r.revision, ", ".join(f"{tag}@{number}" for tag, number in r.tags)]
        + ([r.deleted_at] if deleted else [])
        for r in open_workspace(ctx).registry.recipes(deleted=deleted)
    ]
    columns = ["recipe", "base", "patches", "revision", "tags", *(["deleted"] if deleted else [])]
    show_table("Deleted recipes" if deleted else "Recipes", columns, rows, as_json)


@recipe.command("show")
@click.argument("name", default="default")
@json_option
@click.pass_context
def recipe_show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show what lies on a recipe's base, and the digest of the weights."""
    workspace = open_workspace(ctx)
    found = workspace.recipe(name)
    days = {laid.patch: _day(laid) for laid in found.record.laid}
    rows = [[p.concept, p.id if as_json else p.id[:12], p.solver, s, days[p.id], p.nbytes] for p, s in found.patches()]
    columns = ["concept", "patch", "solver", "strength", "until", "bytes"]
    show_table(f"Recipe {name} on {found.record.base}", columns, rows, as_json)
    click.echo(f"weights {found.record.digest or found.digest()}", err=as_json)
    if mixed := found.mixture():
        Talk().say(mixed)
    if not as_json:
        show_evaluations(found.evaluations())


@recipe.command("create")
@click.argument("name")
@click.option("--base", "base_name", required=True, help="Name of the base.")
@click.pass_context
def recipe_create(ctx: click.Context, name: str, base_name: str) -> None:
    """Make an empty recipe."""
    record = open_workspace(ctx).registry.create_recipe(name, base_name)
    click.echo(f"recipe {record.name} on {record.base}: weights {record.digest}")


@recipe.command("copy")
@click.argument("source")
@click.argument("name")
@why_option
@click.pass_context
def recipe_copy(ctx: click.Context, source: str, name: str, why: str) -> None:
    """Make recipe NAME with what lies on SOURCE, or lay on it at SOURCE@REVISION."""
    record = open_workspace(ctx).recipe(source).copy(name, why=why).record
    click.echo(f"recipe {record.name} on {record.base}, {len(record.laid)} patches: weights {record.digest}")


@recipe.command("delete")
@click.argument("name")
@why_option
@click.pass_context
def recipe_delete(ctx: click.Context, name: str, why: str) -> None:
    """Take a recipe off the lists. Its name is free again; its history stays (`recipe log NAME --deleted`)."""
    open_workspace(ctx).recipe(name).delete(why=why)
    click.echo(f"deleted {name}; `overpaint recipe undelete` brings it back")


@recipe.command("undelete")
@click.argument("name")
@why_option
@click.pass_context
def recipe_undelete(ctx: click.Context, name: str, why: str) -> None:
    """Bring back the recipe NAME that was deleted last."""
    record = open_workspace(ctx).undelete_recipe(name, why=why).record
    click.echo(f"recipe {record.name} on {record.base}, {len(record.laid)} patches: weights {record.digest}")


@recipe.command("checkout")
@click.argument("revision", metavar="NAME@REVISION")
@why_option
@click.pass_context
def recipe_checkout(ctx: click.Context, revision: str, why: str) -> None:
    """Lay on a recipe exactly what lay there at an earlier revision, as a new revision."""
    workspace = open_workspace(ctx)
    then = workspace.registry.recipe(revision)
    if revision == then.name:
        raise click.UsageError(f"say which revision of {then.name!r}, such as {then.name}@{max(then.revision - 1, 0)}")
    lines = workspace.recipe(then.name).checkout(then.revision, why=why)
    for line in lines:
        day = f" until {line.until_after}" if line.until_after else ""
        how = "lifted off" if line.strength_after is None else f"strength {line.strength_after:g}{day}"
        click.echo(f"{line.concept} ({(line.patch or '')[:12]}): {how}")
    after = lines[-1].digest_after
    click.echo(f"weights {lines[-1].digest_before} -> {after}")
    if after == then.digest:
        click.echo(f"these are the weights of revision {then.revision}, bit for bit")
    elif then.digest is not None:
        Talk().say(
            f"revision {then.revision} has {then.digest} on record: it was composed by other software or hardware"
        )


@recipe.command("diff")
@click.argument("before")
@click.argument("after")
@json_option
@click.pass_context
def recipe_diff(ctx: click.Context, before: str, after: str, as_json: bool) -> None:
    """Show every patch that does not lie alike on two recipes, or on two revisions (NAME@REVISION)."""
    rows = [
        [
            d.concept,
            d.patch if as_json else d.patch[:12],
            *(cell for laid in (d.before, d.after) for cell in _both(laid)),
        ]
        for d in open_workspace(ctx).registry.diff(before, after)
    ]
    columns = ["concept", "patch", "strength before", "until before", "strength after", "until after"]
    show_table(f"From {before} to {after}", columns, rows, as_json)


@recipe.command("log")
@click.argument("name", default="default")
@click.option("--deleted", is_flag=True, help="Of the recipes that were deleted under this name.")
@json_option
@click.pass_context
def recipe_log(ctx: click.Context, name: str, deleted: bool, as_json: bool) -> None:
    """Who changed a recipe, when and why."""
    lines = open_workspace(ctx).registry.log(name, deleted=deleted)
    columns = ["revision", "when", "who", "did", "concept", "strength", "until", "why", "weights"]
    if as_json:
        columns += ["patch", "source", "strength before", "until before", "weights before"]
    show_table(f"History of {name}", columns, [_line(line, as_json) for line in lines], as_json)


@recipe.command("due")
@click.argument("name", required=False)
@click.option("--on", type=click.DateTime(["%Y-%m-%d"]), metavar="DATE", help="YYYY-MM-DD; default: today, in UTC.")
@json_option
@click.pass_context
def recipe_due(ctx: click.Context, name: str | None, on: datetime | None, as_json: bool) -> None:
    """List the patches that have lapsed, on all recipes or one. They lie there until somebody removes them."""
    found = open_workspace(ctx).due(on.date() if on else None, recipe=name)
    rows = [[d.recipe, d.concept, d.patch if as_json else d.patch[:12], str(d.until)] for d in found]
    show_table("Lapsed", ["recipe", "concept", "patch", "until"], rows, as_json)


def _line(line: HistoryRecord, as_json: bool) -> list[Any]:
    did = line.action if line.source is None or as_json else f"{line.action} of {line.source}"
    after = line.digest_after if as_json else (line.digest_after or "")[:12]
    row = [line.revision, line.at, line.who, did, line.concept, line.strength_after]
    row += [_text(line.until_after), line.why, after]
    if as_json:
        row += [line.patch, line.source, line.strength_before, _text(line.until_before), line.digest_before]
    return row


def _both(laid: RecipeEntry | None) -> list[Any]:
    return [None, None] if laid is None else [laid.strength, _day(laid)]


def _day(laid: RecipeEntry) -> str | None:
    return _text(laid.until)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


@click.command("reseparate")
@click.argument("name", default="default")
@why_option
@device_option
@click.pass_context
def recipe_reseparate(ctx: click.Context, name: str, why: str, device: str) -> None:
    """Solve the closed-form patches of a recipe again for all concepts known now, and exchange them in one revision."""
    talk = Talk()
    with interruptible(talk, lambda: f"the recipe {name!r} is as it was; run the same command again"):
        done = open_workspace(ctx).recipe(name).reseparate(device=device, why=why, progress=talk.progress)
    talk.clear()
    for line in done.lines:
        show_change(line)
    if done.lines:
        count = len(done.lines) // 2
        click.echo(f"{count} patch{'' if count == 1 else 'es'} re-separated for {done.concepts} concepts")
    else:
        click.echo(f"nothing to do: what can be re-separated was solved for the {done.concepts} concepts known now")
    if done.left:
        names = ", ".join(f"{record.concept} ({record.solver})" for record in done.left)
        talk.say(f"left as they are, because their solvers need time: {names}; solve them again if they disturb others")
