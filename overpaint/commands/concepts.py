"""`overpaint concept`: what can be erased."""

from __future__ import annotations

from typing import Any

import click

from overpaint.commands.common import (
    CONCEPT,
    Terminal,
    digests_option,
    json_option,
    limit_option,
    note_if_more,
    offset_option,
    open_workspace,
    show_table,
)
from overpaint.core.concepts import KINDS


@click.group()
def concept() -> None:
    """Concepts that can be erased."""


@concept.command("add")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), default="object", show_default=True)
@click.option("--synonym", "synonyms", multiple=True, help="Another word for the same thing; may be repeated.")
@click.option("--anchor", default="", help="What it should become; empty: nothing.")
@click.option("--prompt", "prompts", multiple=True, help="A sentence that names it, or has {} there; may be repeated.")
@click.pass_context
def concept_add(
    ctx: click.Context, name: str, kind: str, synonyms: tuple[str, ...], anchor: str, prompts: tuple[str, ...]
) -> None:
    """Describe a concept.

    \b
    Example:
      overpaint concept add cat --synonym kitty --synonym feline
      overpaint concept add "van gogh" --kind style
    """
    workspace = open_workspace(ctx, create=True)
    added = workspace.add_concept(name, kind=kind, synonyms=synonyms, anchor=anchor, prompts=prompts)
    click.echo(f"concept {added.name} ({added.kind})")


@concept.command("edit")
@click.argument("name", type=CONCEPT)
@click.option("--kind", type=click.Choice(KINDS))
@click.option("--synonym", "synonyms", multiple=True, help='All its synonyms, anew; may be repeated; "" for none.')
@click.option("--anchor", help="What it should become; empty: nothing.")
@click.option("--prompt", "prompts", multiple=True, help='All its prompts, anew; may be repeated; "" for none.')
@click.pass_context
def concept_edit(
    ctx: click.Context,
    name: str,
    kind: str | None,
    synonyms: tuple[str, ...],
    anchor: str | None,
    prompts: tuple[str, ...],
) -> None:
    """Change how a concept is described.

    What is not given stays. Patches that are stored stay too, as they were solved; what is solved from now on is solved for the
    new description.

    \b
    Example:
      overpaint concept edit cat --synonym kitty --synonym feline --anchor dog
    """
    if kind is None and anchor is None and not synonyms and not prompts:
        raise click.UsageError("say what changes: --kind, --synonym, --anchor or --prompt")
    workspace = open_workspace(ctx)
    words, sentences = (list(filter(None, given)) if given else None for given in (synonyms, prompts))
    edited = workspace.edit_concept(name, kind=kind, synonyms=words, anchor=anchor, prompts=sentences)
    click.echo(f"concept {edited.name} ({edited.kind})")
    if count := workspace.registry.count_patches(concept=edited.name):
        Terminal().note(
            f"{count} patches are as they were solved; `overpaint solve` solves one for the new description"
        )


@concept.command("remove")
@click.argument("name", type=CONCEPT)
@click.pass_context
def concept_remove(ctx: click.Context, name: str) -> None:
    """Remove a concept that has no patch.

    What is solved from now on does not preserve it. Refused while there are patches for it.

    \b
    Example:
      overpaint concept remove cta
    """
    open_workspace(ctx).remove_concept(name)
    click.echo(f"removed concept {name}")


@concept.command("list")
@limit_option
@offset_option
@json_option
@click.pass_context
def concept_list(ctx: click.Context, limit: int, offset: int, as_json: bool) -> None:
    """List concepts, oldest first.

    \b
    Example:
      overpaint concept list
    """
    registry = open_workspace(ctx).registry
    concepts = registry.concepts(limit=limit or None, offset=offset)
    rows = [[c.name, c.kind, ", ".join(c.synonyms), c.anchor] for c in concepts]
    show_table("Concepts", ["name", "kind", "synonyms", "anchor"], rows, as_json)
    note_if_more(len(concepts), offset, registry.count_concepts(), "concepts")


@concept.command("show")
@click.argument("name", type=CONCEPT)
@digests_option
@json_option
@click.pass_context
def concept_show(ctx: click.Context, name: str, digests: bool, as_json: bool) -> None:
    """Show one concept and its patches.

    \b
    Example:
      overpaint concept show cat
    """
    workspace = open_workspace(ctx)
    known = workspace.registry.concept(name)
    rows: list[list[Any]] = [
        ["name", known.name],
        ["kind", known.kind],
        ["synonyms", ", ".join(known.synonyms)],
        ["anchor", known.anchor],
        *(["prompt", prompt] for prompt in known.prompts),
        *([f"patch ({p.solver} on {p.base})", p.id] for p in workspace.patches(concept=name)),
    ]
    show_table("Concept", ["what", "value"], rows, as_json, digests=digests)
