"""`overpaint recipe`: a base plus a set of patches, with a history; and `overpaint undo`."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overpaint.commands.common import (
    BASE,
    RECIPE,
    ExpiryDay,
    LocalPath,
    Terminal,
    device_option,
    digests_option,
    interruptible,
    json_option,
    limit_option,
    offset_option,
    open_workspace,
    renamed,
    short,
    show_change,
    show_json,
    show_table,
    why_option,
)
from overpaint.commands.evaluating import show_evaluations
from overpaint.commands.patches import export_options, show_exported
from overpaint.core.atomic import atomic_output

if TYPE_CHECKING:
    from overpaint.registry.records import HistoryRecord, RecipeEntry, RecipeRecord
    from overpaint.workspace.recipe_file import RecipePlan


@click.group()
def recipe() -> None:
    """Recipes: a base plus a set of patches, with a history.

    Where a command reads a recipe, NAME@3 means it as it was at revision 3, and NAME@TAG as it was when tagged.
    """


@recipe.command("list")
@click.option("--deleted", is_flag=True, help="Those that were deleted.")
@limit_option
@offset_option
@json_option
@click.pass_context
def recipe_list(ctx: click.Context, deleted: bool, limit: int, offset: int, as_json: bool) -> None:
    """List recipes.

    Those that were made first come first.

    \b
    Example:
      overpaint recipe list
    """
    records = open_workspace(ctx).registry.recipes(deleted=deleted, limit=limit or None, offset=offset)
    rows = [
        [r.name, r.base, len(r.entries), r.revision, ", ".join(f"{tag}@{number}" for tag, number in r.tags)]
        + ([r.deleted_at] if deleted else [])
        for r in records
    ]
    columns = ["recipe", "base", "patches", "revision", "tags", *(["deleted"] if deleted else [])]
    show_table("Deleted recipes" if deleted else "Recipes", columns, rows, as_json)
    if limit and len(records) == limit:
        Terminal().note("there may be more; see it with --offset, or all with --limit 0")


@recipe.command("show")
@click.argument("name", default="default", type=RECIPE)
@digests_option
@json_option
@click.pass_context
def recipe_show(ctx: click.Context, name: str, digests: bool, as_json: bool) -> None:
    """Show the patches of a recipe, its base and revision.

    \b
    Example:
      overpaint recipe show safe
      overpaint recipe show safe@3
    """
    with Terminal() as terminal:
        workspace = open_workspace(ctx, terminal=terminal)
        wanted = workspace.recipe(name)
        record = wanted.record
        digest = record.digest or wanted.digest()
    expiry = {entry.patch: _day(entry) for entry in record.entries}
    rows = [[p.concept, p.id, p.solver, strength, expiry[p.id], p.nbytes] for p, strength in wanted.patches()]
    columns = ["concept", "patch", "solver", "strength", "until", "bytes"]
    if as_json:
        show_json(
            {
                "recipe": record.name,
                "base": record.base,
                "revision": record.revision,
                "digest": digest,
                "tags": dict(record.tags),
                "patches": [dict(zip(columns, row, strict=True)) for row in rows],
            }
        )
        return
    tags = "".join(f", {tag} is revision {number}" for tag, number in record.tags)
    title = f"Recipe {record.name} on {record.base}, revision {record.revision}{tags}"
    show_table(title, columns, rows, False, digests=digests)
    click.echo(f"weights {digest if digests else short(digest)}")
    if mixed := wanted.mixture():
        terminal.note(mixed)
    show_evaluations(wanted.evaluations())


@recipe.command("create")
@click.argument("name")
@click.option("--base", "base_name", required=True, type=BASE, help="Name of the base.")
@digests_option
@click.pass_context
def recipe_create(ctx: click.Context, name: str, base_name: str, digests: bool) -> None:
    """Make an empty recipe.

    \b
    Example:
      overpaint recipe create safe --base sd15
    """
    _show_made(open_workspace(ctx).create_recipe(name, base=base_name).record, digests)


@recipe.command("copy")
@click.argument("source", type=RECIPE)
@click.argument("name")
@why_option
@digests_option
@click.pass_context
def recipe_copy(ctx: click.Context, source: str, name: str, why: str, digests: bool) -> None:
    """Make recipe NAME with the patches of SOURCE.

    SOURCE@REVISION takes those of an earlier revision.

    \b
    Example:
      overpaint recipe copy safe@3 trial
    """
    _show_made(open_workspace(ctx).recipe(source).copy(name, why=why).record, digests)


@recipe.command("delete")
@click.argument("name", type=RECIPE)
@why_option
@click.pass_context
def recipe_delete(ctx: click.Context, name: str, why: str) -> None:
    """Take a recipe off the lists; `undelete` undoes it.

    Its name is free again; its history stays (`recipe log NAME --deleted`).

    \b
    Example:
      overpaint recipe delete trial --why "not needed any more"
    """
    open_workspace(ctx).recipe(name).delete(why=why)
    click.echo(f"deleted {name}; `overpaint recipe undelete` brings it back")


@recipe.command("undelete")
@click.argument("name")
@why_option
@digests_option
@click.pass_context
def recipe_undelete(ctx: click.Context, name: str, why: str, digests: bool) -> None:
    """Bring back the recipe that was deleted last as NAME.

    \b
    Example:
      overpaint recipe undelete trial
    """
    _show_made(open_workspace(ctx).undelete_recipe(name, why=why).record, digests)


def _show_made(record: RecipeRecord, digests: bool) -> None:
    count = (
        "no patches" if not record.entries else f"{len(record.entries)} patch{'es' if len(record.entries) > 1 else ''}"
    )
    text = f"recipe {record.name} on {record.base}, {count}: weights {record.digest or 'unknown'}"
    click.echo(text if digests else short(text))


@recipe.command("checkout")
@click.argument("revision", metavar="NAME@REVISION", type=RECIPE)
@why_option
@digests_option
@click.pass_context
def recipe_checkout(ctx: click.Context, revision: str, why: str, digests: bool) -> None:
    """Bring a recipe back to an earlier revision.

    The recipe then holds exactly what it held at NAME@REVISION, as a new revision.

    \b
    Example:
      overpaint recipe checkout safe@3 --why "as audited"
    """
    with Terminal() as terminal:
        workspace = open_workspace(ctx, terminal=terminal)
        then = workspace.registry.recipe(revision)
        if revision == then.name:
            example = f"{then.name}@{max(then.revision - 1, 0)}"
            raise click.UsageError(f"say which revision of {then.name!r}, such as {example}")
        lines = workspace.recipe(then.name).checkout(then.revision, why=why)
    _show_return(lines, then, digests)


@click.command()
@click.argument("name", metavar="[RECIPE]", default="default", type=RECIPE)
@why_option
@digests_option
@click.pass_context
def undo(ctx: click.Context, name: str, why: str, digests: bool) -> None:
    """Take back the newest change of a recipe.

    The recipe then holds what it held before, as a new revision; undoing twice brings the change back.

    \b
    Example:
      overpaint undo safe
    """
    with Terminal() as terminal:
        workspace = open_workspace(ctx, terminal=terminal)
        wanted = workspace.recipe(name)
        before = wanted.record
        lines = wanted.undo(why=why)
    _show_return(lines, workspace.registry.recipe(f"{before.name}@{before.revision - 1}"), digests)


def _show_return(lines: list[HistoryRecord], then: RecipeRecord, digests: bool) -> None:
    """What a recipe holds after it was brought back to what it was `then`."""
    for line in lines:
        expiry = f", expires {line.until_after}" if line.until_after else ""
        how = "removed" if line.strength_after is None else f"strength {line.strength_after:g}{expiry}"
        click.echo(short(f"{line.concept} ({line.patch}): {how}"))
    if not lines:
        return
    text = f"weights {lines[-1].digest_before or 'unknown'} -> {lines[-1].digest_after or 'unknown'}"
    click.echo(text if digests else short(text))
    if lines[-1].digest_after == then.digest:
        click.echo(f"these are the weights of revision {then.revision}, bit for bit")
    elif then.digest is not None:
        Terminal().note(
            f"revision {then.revision} was recorded with weights {short(then.digest)}: "
            "it was composed by other software or hardware"
        )


@recipe.command("diff")
@click.argument("before", type=RECIPE)
@click.argument("after", type=RECIPE)
@digests_option
@json_option
@click.pass_context
def recipe_diff(ctx: click.Context, before: str, after: str, digests: bool, as_json: bool) -> None:
    """Compare two recipes or revisions (NAME@REVISION).

    \b
    Example:
      overpaint recipe diff safe@3 safe
    """
    rows = [
        [d.concept, d.patch, *_strength_and_day(d.before), *_strength_and_day(d.after)]
        for d in open_workspace(ctx).registry.diff(before, after)
    ]
    columns = ["concept", "patch", "strength before", "until before", "strength after", "until after"]
    show_table(f"From {before} to {after}", columns, rows, as_json, digests=digests)


@recipe.command("log")
@click.argument("name", default="default", type=RECIPE)
@click.option("--deleted", is_flag=True, help="Of the recipes that were deleted under this name.")
@digests_option
@json_option
@click.pass_context
def recipe_log(ctx: click.Context, name: str, deleted: bool, digests: bool, as_json: bool) -> None:
    """Show who changed a recipe, when and why.

    \b
    Example:
      overpaint recipe log safe
    """
    lines = open_workspace(ctx).registry.log(name, deleted=deleted)
    columns = ["revision", "when", "who", "did", "concept", "strength", "until", "why", "weights"]
    if as_json:
        columns += ["patch", "source", "strength before", "until before", "weights before"]
    rows = [_line(line, as_json) for line in lines]
    show_table(f"History of {name}", columns, rows, as_json, digests=digests, asked=["weights"])


def _line(line: HistoryRecord, as_json: bool) -> list[Any]:
    did = line.action if line.source is None or as_json else f"{line.action} of {line.source}"
    row = [line.revision, line.at, line.who, did, line.concept, line.strength_after]
    row += [_text(line.until_after), line.why, line.digest_after]
    if as_json:
        row += [line.patch, line.source, line.strength_before, _text(line.until_before), line.digest_before]
    return row


@recipe.command("expired")
@click.argument("name", required=False, type=RECIPE)
@click.option("--on", type=ExpiryDay(), metavar="DATE", help="YYYY-MM-DD; default: today, in UTC.")
@click.option("--remove", is_flag=True, help="Remove them, each recipe in one revision.")
@why_option
@digests_option
@json_option
@click.pass_context
def recipe_expired(
    ctx: click.Context, name: str | None, on: date | None, remove: bool, why: str, digests: bool, as_json: bool
) -> None:
    """List the patches whose expiry date has come, or remove them.

    On all recipes, or on one. They stay there until somebody removes them, or `serve --enforce-expiry` does.

    \b
    Example:
      overpaint recipe expired safe
    """
    workspace = open_workspace(ctx)
    expired = workspace.due(on, recipe=name)
    removed = workspace.remove_expired(on, recipe=name, why=why) if remove else []
    rows = [[entry.recipe, entry.concept, entry.patch, str(entry.until)] for entry in expired]
    if removed:
        gone = {(line.recipe, line.patch) for line in removed}
        rows = [row for row in rows if (row[0], row[2]) in gone]
    title = "Removed" if remove else "Expired"
    show_table(title, ["recipe", "concept", "patch", "until"], rows, as_json, digests=digests)


recipe.add_command(renamed(recipe_expired, "due"))


@recipe.command("apply")
@click.argument("file", type=LocalPath())
@click.option("--dry-run", is_flag=True, help="Only show the plan.")
@click.option("--check", is_flag=True, help="Only show the plan; exit with 1 unless there is nothing to do.")
@click.option("--update", is_flag=True, help="Describe known concepts as the file does.")
@why_option
@device_option
@digests_option
@json_option
@click.pass_context
def recipe_apply(
    ctx: click.Context,
    file: Path,
    dry_run: bool,
    check: bool,
    update: bool,
    why: str,
    device: str,
    digests: bool,
    as_json: bool,
) -> None:
    """Make a recipe as a YAML file says.

    Shows the plan, solves the patches that are missing, and changes the recipe in one revision. Applying a file again
    changes nothing.

    \b
    Example:
      overpaint recipe apply safe.yaml --dry-run
    """
    with (
        Terminal() as terminal,
        interruptible(terminal, lambda: "the recipe is as it was; give the same command again"),
    ):
        workspace = open_workspace(ctx, terminal=terminal)
        plan = workspace.plan_recipe(file, update=update, compose=dry_run or check)
        _show_recipe_plan(plan, digests, as_json)
        if not dry_run and not check and not plan.is_done:
            applied = workspace.apply_recipe(plan, why=why, device=device, progress=terminal.progress)
            terminal.clear()
            weights = applied.lines[-1].digest_after if applied.lines else workspace.recipe(plan.recipe).record.digest
            if not as_json:
                shown = weights if digests else short(weights)
                click.echo(f"recipe {plan.recipe}: {len(applied.solved)} solved, weights {shown or 'unknown'}")
    if check and not plan.is_done:
        sys.exit(1)


def _show_recipe_plan(plan: RecipePlan, digests: bool, as_json: bool) -> None:
    """One row for each patch: what is done, and with which patch; none where it is solved first."""
    rows = [
        [
            each.action if each.record or each.action == "remove" else "solve and add",
            each.concept,
            each.record and each.record.id,
            each.asked and each.asked.strength,
            each.asked and _text(each.asked.expires),
        ]
        for each in plan.entries
    ]
    columns = ["action", "concept", "patch", "strength", "until"]
    if as_json:
        listed = [dict(zip(columns, row, strict=True)) for row in rows]
        show_json(
            {"recipe": plan.recipe, "base": plan.base, "new": plan.is_new, "done": plan.is_done, "patches": listed}
        )
        return
    title = f"{'New recipe' if plan.is_new else 'Recipe'} {plan.recipe} on {plan.base}"
    show_table(title, columns, rows, False, digests=digests)
    if plan.is_done:
        click.echo("nothing to do")


def _strength_and_day(entry: RecipeEntry | None) -> list[Any]:
    return [None, None] if entry is None else [entry.strength, _day(entry)]


def _day(entry: RecipeEntry) -> str | None:
    return _text(entry.until)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


@recipe.command("export")
@click.argument("name", metavar="RECIPE", type=RECIPE)
@click.option("--as-file", is_flag=True, help="Write what the recipe says, as YAML for `recipe apply`.")
@export_options
@click.pass_context
def recipe_export(
    ctx: click.Context,
    name: str,
    as_file: bool,
    out: Path,
    format: str | None,
    for_: str | None,
    dtype: str,
    truncate: int | None,
    as_json: bool,
) -> None:
    """Write a recipe as a file for other tools.

    To share it with other registries: `overpaint export --recipe`.

    \b
    Example:
      overpaint recipe export safe --for comfyui -o safe.safetensors
    """
    with Terminal() as terminal:
        wanted = open_workspace(ctx, terminal=terminal).recipe(name)
        if as_file:
            text = wanted.as_file()
            with atomic_output(out) as scratch:
                scratch.write_text(text, "utf-8")
            click.echo(str(out))
            return
        done = wanted.export(out, format, for_=for_, dtype=dtype, truncate=truncate, progress=terminal.progress)
    show_exported(done, as_json)


@recipe.command("reseparate")
@click.argument("name", default="default", type=RECIPE)
@why_option
@device_option
@digests_option
@click.pass_context
def recipe_reseparate(ctx: click.Context, name: str, why: str, device: str, digests: bool) -> None:
    """Solve the patches of a recipe again for all concepts.

    Its closed-form patches are solved for all concepts that are known now, and replaced in one revision.

    \b
    Example:
      overpaint recipe reseparate safe
    """
    with (
        Terminal() as terminal,
        interruptible(terminal, lambda: f"the recipe {name!r} is as it was; run the same command again"),
    ):
        wanted = open_workspace(ctx, terminal=terminal).recipe(name)
        done = wanted.reseparate(device=device, why=why, progress=terminal.progress)
    for line in done.lines:
        show_change(line, digests)
    if done.lines:
        count = len(done.lines) // 2
        click.echo(f"{count} patch{'' if count == 1 else 'es'} re-separated for {done.concepts} concepts")
    else:
        click.echo(f"nothing to do: what can be re-separated was solved for the {done.concepts} concepts known now")
    if done.left:
        names = ", ".join(f"{record.concept} ({record.solver})" for record in done.left)
        terminal.note(f"not solved again, because their solvers need time: {names}; solve them if they disturb others")
