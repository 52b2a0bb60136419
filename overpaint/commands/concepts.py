"""`overpaint concept`: what can be erased."""

from __future__ import annotations

from typing import Any

import click

from overpaint.commands.common import json_option, limit_option, offset_option, open_workspace, say_if_more, show_table
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
    """Remember a concept."""
    workspace = open_workspace(ctx, create=True)
    added = workspace.add_concept(name, kind=kind, synonyms=synonyms, anchor=anchor, prompts=prompts)
    click.echo(f"concept {added.name} ({added.kind})")


@concept.command("list")
@limit_option
@offset_option
@json_option
@click.pass_context
def concept_list(ctx: click.Context, limit: int, offset: int, as_json: bool) -> None:
    """List concepts, in the order they came."""
    registry = open_workspace(ctx).registry
    found = registry.concepts(limit=limit or None, offset=offset)
    rows = [[c.name, c.kind, ", ".join(c.synonyms), c.anchor] for c in found]
    show_table("Concepts", ["name", "kind", "synonyms", "anchor"], rows, as_json)
    say_if_more(len(found), offset, registry.count_concepts(), "concepts")


@concept.command("show")
@click.argument("name")
@json_option
@click.pass_context
def concept_show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show one concept and its patches."""
    workspace = open_workspace(ctx)
    found = workspace.registry.concept(name)
    rows: list[list[Any]] = [
        ["name", found.name],
        ["kind", found.kind],
        ["synonyms", ", ".join(found.synonyms)],
        ["anchor", found.anchor],
        *(["prompt", prompt] for prompt in found.prompts),
        *([f"patch ({p.solver} on {p.base})", p.id] for p in workspace.patches(concept=name)),
    ]
    show_table("Concept", ["what", "value"], rows, as_json)
