"""`overpaint tag`: words tied to patches and recipes."""

from __future__ import annotations

import click

from overpaint.commands.common import json_option, show_table, workshop

patches_option = click.option("--patch", "patches", multiple=True, metavar="PATCH", help="A patch; may be repeated.")
recipes_option = click.option("--recipe", "recipes", multiple=True, metavar="NAME", help="A recipe; may be repeated.")


@click.group()
def tag() -> None:
    """Tags on patches and recipes. NAME@TAG is a recipe as it was when it was tagged."""


@tag.command("add")
@click.argument("tag_name", metavar="TAG")
@patches_option
@recipes_option
@click.pass_context
def tag_add(ctx: click.Context, tag_name: str, patches: tuple[str, ...], recipes: tuple[str, ...]) -> None:
    """Tie a tag to patches and recipes; on a recipe it marks the present revision."""
    for added in workshop(ctx).tag(tag_name, patches=patches, recipes=recipes):
        revision = "" if added.revision is None else f" at revision {added.revision}"
        click.echo(f"{added.tag} is on {added.on} {added.name}{revision}")


@tag.command("remove")
@click.argument("tag_name", metavar="TAG")
@patches_option
@recipes_option
@click.pass_context
def tag_remove(ctx: click.Context, tag_name: str, patches: tuple[str, ...], recipes: tuple[str, ...]) -> None:
    """Untie a tag from patches and recipes."""
    workshop(ctx).untag(tag_name, patches=patches, recipes=recipes)


@tag.command("list")
@click.argument("tag_name", metavar="TAG", required=False)
@json_option
@click.pass_context
def tag_list(ctx: click.Context, tag_name: str | None, as_json: bool) -> None:
    """List what carries which tag, or all that carries one."""
    rows = [
        [
            t.tag,
            t.on,
            t.name if as_json or t.on == "recipe" else t.name[:12],
            t.revision,
            t.who,
            t.at.isoformat("T", "seconds"),
        ]
        for t in workshop(ctx).registry.tags(tag_name)
    ]
    show_table("Tags", ["tag", "on", "name", "revision", "who", "when"], rows, as_json)
