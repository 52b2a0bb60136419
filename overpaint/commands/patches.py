"""`overpaint patch`: patches, and what lies on a recipe."""

from __future__ import annotations

from typing import Any

import click

from overpaint.commands.common import json_option, recipe_option, show_table, workshop


@click.group()
def patch() -> None:
    """Patches, and what lies on a recipe."""


@patch.command("list")
@click.option("--concept", "concept_name", help="Only patches of this concept.")
@json_option
@click.pass_context
def patch_list(ctx: click.Context, concept_name: str | None, as_json: bool) -> None:
    """List patches."""
    shop = workshop(ctx)
    found = shop.patches(concept=concept_name) if concept_name else shop.patches()
    rows = [[p.id if as_json else p.id[:12], p.concept, p.base, p.solver, p.kind, p.nbytes] for p in found]
    show_table("Patches", ["patch", "concept", "base", "solver", "kind", "bytes"], rows, as_json)


@patch.command("show")
@click.argument("patch_key", metavar="PATCH")
@json_option
@click.pass_context
def patch_show(ctx: click.Context, patch_key: str, as_json: bool) -> None:
    """Show one patch with its provenance, after checking its bytes."""
    shop = workshop(ctx)
    record, found = shop.registry.patch(patch_key), shop.patch(patch_key)
    rows: list[list[Any]] = [
        ["patch", record.id],
        ["concept", record.concept],
        ["base", record.base],
        ["base fingerprint", found.manifest["subject"]["fingerprint"]],
        ["tensors it changes", found.manifest["subject"]["count"]],
        ["solver", record.solver],
        *([f"setting {name}", value] for name, value in record.settings.items()),
        ["seed", record.seed],
        ["kind", record.kind],
        *([f"array {name}", f"{a['dtype']} {a['shape']}"] for name, a in sorted(found.manifest["arrays"].items())[:8]),
        ["bytes", record.nbytes],
        ["seconds", round(record.seconds, 3)],
        ["solved", record.solved_at.isoformat(timespec="seconds")],
    ]
    show_table("Patch", ["what", "value"], rows, as_json)


@patch.command("add")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@recipe_option
@click.option("--strength", default=1.0, show_default=True)
@click.option("--why", default="", help="Why; kept in the recipe's history.")
@click.pass_context
def patch_add(ctx: click.Context, patches: tuple[str, ...], recipe: str, strength: float, why: str) -> None:
    """Lay patches on a recipe: by id, the beginning of an id, or concept (its newest patch)."""
    shop = workshop(ctx)
    base_name = shop.registry.patch(patches[0]).base
    for key in patches:
        line = shop.recipe(recipe, base=base_name).add(key, strength, why=why)
        click.echo(
            f"{line.action} {line.concept} ({line.patch[:12]}): weights {line.digest_before} -> {line.digest_after}"
        )


@patch.command("remove")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@recipe_option
@click.option("--why", default="", help="Why; kept in the recipe's history.")
@click.pass_context
def patch_remove(ctx: click.Context, patches: tuple[str, ...], recipe: str, why: str) -> None:
    """Lift patches off a recipe; the concepts come back."""
    shop = workshop(ctx)
    for key in patches:
        line = shop.known_recipe(recipe).remove(key, why=why)
        click.echo(
            f"{line.action} {line.concept} ({line.patch[:12]}): weights {line.digest_before} -> {line.digest_after}"
        )
        if line.digest_after == shop.registry.base(shop.known_recipe(recipe).record.base).fingerprint:
            click.echo("the recipe is empty: these are the base's weights, bit for bit")
