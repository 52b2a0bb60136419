"""`overpaint search` and `overpaint tag`: patches and recipes by what is written anywhere, and by words tied to them."""

from __future__ import annotations

from typing import Any

import click

from overpaint.commands.common import (
    BASE,
    PATCH,
    RECIPE,
    SOLVER,
    Terminal,
    digests_option,
    json_option,
    limit_option,
    offset_option,
    open_workspace,
    short,
    show_table,
)
from overpaint.commands.sharing import at_registry, plain_http_option, show_listed
from overpaint.core.concepts import KINDS


@click.command()
@click.argument("words", nargs=-1, metavar="[TEXT]...")
@click.option("--kind", type=click.Choice(KINDS), help="Only patches of concepts of this kind.")
@click.option("--solver", type=SOLVER, help="Only patches that this solver made.")
@click.option("--tag", help="Only what carries this tag.")
@click.option("--base", type=BASE, help="Only what is for this base.")
@limit_option
@offset_option
@click.option("--remote", metavar="SOURCE", help="Look in a shared folder, URL or registry, and not in this registry.")
@plain_http_option
@digests_option
@json_option
@click.pass_context
def search(
    ctx: click.Context,
    words: tuple[str, ...],
    kind: str | None,
    solver: str | None,
    tag: str | None,
    base: str | None,
    limit: int,
    offset: int,
    remote: str | None,
    plain_http: bool,
    digests: bool,
    as_json: bool,
) -> None:
    """Find patches and recipes by words.

    Every word of TEXT is looked for in concepts, synonyms, anchors, kinds, solvers, bases, tags, names of recipes and the
    reasons in their history, also inside longer words. The newest come first, as many of each as --limit says. With
    --remote oci://HOST/NAME, all patches are found that the registry has for the bases here, or for --base.

    \b
    Example:
      overpaint search pistol --solver separable
    """
    if remote is not None:
        if kind or tag:
            raise click.UsageError("--kind and --tag are kept here and not shared; leave them out with --remote")
        with Terminal() as terminal:
            workspace = open_workspace(ctx, terminal=terminal)
            listed = workspace.browse(at_registry(remote, plain_http), base=base, referring=True, warn=terminal.note)
        matching = [each for each in listed if each.mentions(" ".join(words)) and solver in (None, each.solver)]
        show_listed(matching[offset:][: limit or None], digests, as_json)
        return
    result = open_workspace(ctx).registry.search(
        " ".join(words), kind=kind, solver=solver, tag=tag, base=base, limit=limit or None, offset=offset
    )
    rows: list[list[Any]] = [
        *(["recipe", r.name, None, None, r.base, ", ".join(tag for tag, _ in r.tags)] for r in result.recipes),
        *(["patch", p.concept, p.id, p.solver, p.base, ", ".join(p.tags)] for p in result.patches),
    ]
    show_table("Found", ["what", "name", "patch", "solver", "base", "tags"], rows, as_json, digests=digests)
    if limit and limit in (len(result.patches), len(result.recipes)):
        Terminal().note("there may be more; see it with --offset, or all with --limit 0")


patches_option = click.option(
    "--patch", "patches", multiple=True, metavar="PATCH", type=PATCH, help="A patch; may be repeated."
)
recipes_option = click.option(
    "--recipe", "recipes", multiple=True, metavar="NAME", type=RECIPE, help="A recipe; may be repeated."
)


@click.group()
def tag() -> None:
    """Tags on patches and recipes.

    NAME@TAG is a recipe as it was when it was tagged.
    """


@tag.command("add")
@click.argument("tag_name", metavar="TAG")
@patches_option
@recipes_option
@click.pass_context
def tag_add(ctx: click.Context, tag_name: str, patches: tuple[str, ...], recipes: tuple[str, ...]) -> None:
    """Tag patches and recipes.

    On a recipe the tag marks the present revision.

    \b
    Example:
      overpaint tag add audited-2026-11 --recipe safe
    """
    from overpaint.workspace.recipe import current_user

    for added in open_workspace(ctx).registry.tag(tag_name, patches=patches, recipes=recipes, who=current_user()):
        revision = "" if added.revision is None else f" at revision {added.revision}"
        click.echo(f"{added.tag} is on {added.on} {short(added.name)}{revision}")


@tag.command("remove")
@click.argument("tag_name", metavar="TAG")
@patches_option
@recipes_option
@click.pass_context
def tag_remove(ctx: click.Context, tag_name: str, patches: tuple[str, ...], recipes: tuple[str, ...]) -> None:
    """Remove a tag from patches and recipes.

    \b
    Example:
      overpaint tag remove audited-2026-11 --recipe safe
    """
    open_workspace(ctx).registry.untag(tag_name, patches=patches, recipes=recipes)


@tag.command("list")
@click.argument("tag_name", metavar="TAG", required=False)
@digests_option
@json_option
@click.pass_context
def tag_list(ctx: click.Context, tag_name: str | None, digests: bool, as_json: bool) -> None:
    """List tags, or all that carries one.

    \b
    Example:
      overpaint tag list
      overpaint tag list audited-2026-11
    """
    rows = [[t.tag, t.on, t.name, t.revision, t.who, t.at] for t in open_workspace(ctx).registry.tags(tag_name)]
    show_table("Tags", ["tag", "on", "name", "revision", "who", "when"], rows, as_json, digests=digests)
