"""`overpaint recipe`: a base plus a set of patches, with a history."""

from __future__ import annotations

import click

from overpaint.commands.common import json_option, show_table, workshop


@click.group()
def recipe() -> None:
    """Recipes: a base plus a set of patches, with a history."""


@recipe.command("list")
@json_option
@click.pass_context
def recipe_list(ctx: click.Context, as_json: bool) -> None:
    """List recipes."""
    rows = [[r.name, r.base, len(r.patches)] for r in workshop(ctx).recipes()]
    show_table("Recipes", ["recipe", "base", "patches"], rows, as_json)


@recipe.command("show")
@click.argument("name", default="default")
@json_option
@click.pass_context
def recipe_show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show what lies on a recipe's base, and the digest of the weights."""
    found = workshop(ctx).known_recipe(name)
    rows = [[p.concept, p.id if as_json else p.id[:12], p.solver, s, p.nbytes] for p, s in found.patches()]
    show_table(
        f"Recipe {name} on {found.record.base}", ["concept", "patch", "solver", "strength", "bytes"], rows, as_json
    )
    click.echo(f"weights {found.digest()}", err=as_json)


@recipe.command("log")
@click.argument("name", default="default")
@json_option
@click.pass_context
def recipe_log(ctx: click.Context, name: str, as_json: bool) -> None:
    """Who changed a recipe, when and why."""
    rows = [
        [
            h.revision,
            h.at.isoformat(timespec="seconds"),
            h.who,
            h.action,
            h.concept,
            h.strength_after,
            h.why,
            h.digest_after,
        ]
        for h in workshop(ctx).known_recipe(name).log()
    ]
    columns = ["revision", "when", "who", "did", "concept", "strength", "why", "weights"]
    show_table(f"History of {name}", columns, rows, as_json)
