"""`overpaint search`: patches and recipes by what is written anywhere."""

from __future__ import annotations

from typing import Any

import click

from overpaint.commands.common import Talk, json_option, limit_option, offset_option, show_table, workshop
from overpaint.concepts import KINDS


@click.command()
@click.argument("words", nargs=-1, metavar="[TEXT]...")
@click.option("--kind", type=click.Choice(KINDS), help="Only patches of concepts of this kind.")
@click.option("--solver", help="Only patches that this solver made.")
@click.option("--tag", help="Only what carries this tag.")
@click.option("--base", help="Only what is for this base.")
@limit_option
@offset_option
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
    as_json: bool,
) -> None:
    """Find patches and recipes that mention every word of TEXT.

    Words are looked for in concepts, synonyms, anchors, kinds, solvers, bases, tags, names of recipes and the reasons in
    their history, also inside longer words. The newest come first, as many of each as --limit says.
    """
    found = workshop(ctx).registry.search(
        " ".join(words), kind=kind, solver=solver, tag=tag, base=base, limit=limit or None, offset=offset
    )
    rows: list[list[Any]] = [
        *(["recipe", r.name, None, None, r.base, ", ".join(tag for tag, _ in r.tags)] for r in found.recipes),
        *(
            ["patch", p.concept, p.id if as_json else p.id[:12], p.solver, p.base, ", ".join(p.tags)]
            for p in found.patches
        ),
    ]
    show_table("Found", ["what", "name", "patch", "solver", "base", "tags"], rows, as_json)
    if limit and limit in (len(found.patches), len(found.recipes)):
        Talk().say("there may be more; see it with --offset, or all with --limit 0")
