"""`overpaint patch compress`: a smaller patch beside one that is there."""

from __future__ import annotations

from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Literal

import click

from overpaint.commands.common import (
    Talk,
    interruptible,
    json_option,
    limit_option,
    offset_option,
    open_workspace,
    recipe_option,
    say_if_more,
    show_change,
    show_table,
    why_option,
)
from overpaint.commands.evaluating import show_evaluations

if TYPE_CHECKING:
    from overpaint.registry.records import RecipeEntry


# `overpaint patch`: patches, and what lies on a recipe.


@click.group()
def patch() -> None:
    """Patches, and what lies on a recipe."""


@patch.command("list")
@click.option("--concept", help="Only patches of this concept.")
@click.option("--base", help="Only patches for this base.")
@click.option("--solver", help="Only patches that this solver made.")
@click.option("--tag", help="Only patches with this tag.")
@limit_option
@offset_option
@json_option
@click.pass_context
def patch_list(ctx: click.Context, /, limit: int, offset: int, as_json: bool, **where: str | None) -> None:
    """List patches, the newest first."""
    registry = open_workspace(ctx).registry
    found = registry.patches(**where, limit=limit or None, offset=offset, newest_first=True)
    rows = [
        [p.id if as_json else p.id[:12], p.concept, p.base, p.solver, p.kind, p.nbytes, ", ".join(p.tags)]
        for p in found
    ]
    show_table("Patches", ["patch", "concept", "base", "solver", "kind", "bytes", "tags"], rows, as_json)
    say_if_more(len(found), offset, registry.count_patches(**where), "patches")


@patch.command("show")
@click.argument("patch_key", metavar="PATCH")
@json_option
@click.pass_context
def patch_show(ctx: click.Context, patch_key: str, as_json: bool) -> None:
    """Show one patch with its provenance, after checking its bytes."""
    from overpaint.workspace.planning import manifest_of

    registry = open_workspace(ctx).registry
    record = registry.patch(patch_key)
    registry.blob(record)
    manifest = manifest_of(registry, record)
    rows: list[list[Any]] = [
        ["patch", record.id],
        ["concept", record.concept],
        ["base", record.base],
        ["base fingerprint", manifest["subject"]["fingerprint"]],
        ["tensors it changes", manifest["subject"]["count"]],
        *(["door it leaves open", text_input] for text_input in manifest["subject"].get("open_doors", [])),
        ["solver", record.solver],
        *([f"setting {name}", value] for name, value in record.settings.items()),
        ["seed", record.seed],
        *(["compressed from", _compression(step)] for step in manifest["solver"].get("compressed", [])),
        ["kind", record.kind],
        *([f"array {name}", f"{a['dtype']} {a['shape']}"] for name, a in sorted(manifest["arrays"].items())[:8]),
        ["bytes", record.nbytes],
        ["seconds", round(record.seconds, 3)],
        ["solved", record.solved_at.isoformat(timespec="seconds")],
        ["tags", ", ".join(record.tags)],
        *([f"on recipe {name}", _lying(laid)] for name, laid in registry.recipes_with(record.id)),
    ]
    latest = registry.evaluations(patch=record.id, latest=True)
    if as_json:
        rows += [[f"{each.suite}: {r.subject}: {r.metric}", r.value] for each in latest for r in each.results]
    show_table("Patch", ["what", "value"], rows, as_json)
    if not as_json:
        show_evaluations(latest)


def _compression(step: dict[str, Any]) -> str:
    kept = f"rank {step['rank']}" if "rank" in step else f"energy {step.get('energy')}"
    return f"{step.get('from')}, {kept}, relative error at most {step.get('error')} ({step.get('tensor')})"


def _lying(laid: RecipeEntry) -> str:
    return f"strength {laid.strength:g}" + (f" until {laid.until}" if laid.until else "")


def _day(ctx: click.Context, option: click.Parameter, text: str | None) -> date | str | None:
    """The day that an option names."""
    if text is None or text == "never":
        return text
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise click.BadParameter(f"a day is written YYYY-MM-DD, such as 2027-01-31, or never; got {text!r}") from None


@patch.command("add")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@recipe_option
@click.option("--strength", default=1.0, show_default=True)
@click.option("--until", metavar="DATE", callback=_day, help="YYYY-MM-DD: see `recipe due` then; or never.")
@why_option
@click.pass_context
def patch_add(
    ctx: click.Context,
    patches: tuple[str, ...],
    recipe: str,
    strength: float,
    until: date | Literal["never"] | None,
    why: str,
) -> None:
    """Add patches to a recipe: by id, the beginning of an id, or concept (its newest patch for the recipe's base).

    All are added, in one revision, or none. A patch that is there already gets the new strength, or the new day with
    --until.
    """
    workspace = open_workspace(ctx)
    registry = workspace.registry
    base = registry.recipe(recipe).base if registry.has_recipe(recipe) else registry.patch(patches[0]).base
    # Before a recipe is made, so that a patch that is not there leaves none behind.
    ids = [registry.patch(key, base=base).id for key in patches]
    changed = workspace.create_recipe(recipe, base=base, exist_ok=True)
    for line in changed.add_all(ids, strength, why=why, until=until):
        show_change(line)
        for pair in changed.disturbances(line.patch or ""):
            click.echo(
                f"warning: the patch for {pair.emitter} moves {pair.receiver} {pair.ratio:.0%} as much as {pair.emitter}; "
                "solve them in one registry, so that each preserves the other",
                err=True,
            )
    if mixed := changed.mixture():
        click.echo(f"warning: {mixed}", err=True)


@patch.command("remove")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@recipe_option
@why_option
@click.pass_context
def patch_remove(ctx: click.Context, patches: tuple[str, ...], recipe: str, why: str) -> None:
    """Remove patches from a recipe, all or none; the concepts come back."""
    workspace = open_workspace(ctx)
    lines = workspace.recipe(recipe).remove_all(patches, why=why)
    for line in lines:
        show_change(line)
    if lines[-1].digest_after == workspace.registry.base(workspace.registry.recipe(recipe).base).fingerprint:
        click.echo("the recipe is empty: these are the base's weights, bit for bit")
    elif lines[-1].digest_after is None:
        click.echo("the bytes of a patch that stays are lost, so the digest of the weights is not known", err=True)


@click.command("compress")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@click.option("--to", "keep", required=True, metavar="RANK|ENERGY", help="At most 4 directions, or 0.99 of the energy.")
@json_option
@click.pass_context
def patch_compress(ctx: click.Context, patches: tuple[str, ...], keep: str, as_json: bool) -> None:
    """Store a smaller patch beside each PATCH: of every tensor's change, the part that --to says.

    The error is relative to the change of a tensor (Frobenius norm); the table has the largest, --json has all.
    """
    talk = Talk()
    rows: list[list[Any]] = []
    with interruptible(talk, lambda: f"{len(rows)} of {len(patches)} are compressed and stored"):
        workspace = open_workspace(ctx)
        for step, key in enumerate(patches, 1):
            talk.progress(step, len(patches), f"compressing {key}")
            record, found = workspace.compress(key, keep)
            tensor, error = max(found.errors.items(), key=lambda item: item[1])
            source = found.source.id if as_json else found.source.id[:12]
            row = [record.concept, record.id, source, record.kind, found.source.nbytes, record.nbytes, error, tensor]
            rows.append([*row, found.errors] if as_json else [*row[:6], f"{error:.2%}", tensor])
    talk.clear()
    columns = ["concept", "patch", "from", "kind", "bytes before", "bytes", "largest error", "tensor"]
    show_table("Compressed", [*columns, *(["errors"] if as_json else [])], rows, as_json)
