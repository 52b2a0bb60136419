"""`overpaint crosstalk`: what each patch does to the other concepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from overpaint.commands.common import Talk, device_option, json_option, show_table, workshop


@click.command()
@click.option("--recipe", help="The patches of this recipe.")
@click.option("--base", "base_name", help="Without a recipe: the newest patch of each concept on this base.")
@click.option("--all", "everything", is_flag=True, help="Also show what moves the registry's other concepts.")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="A heat map, as a new PNG file.")
@click.option("--above", default=0.0, show_default=True, help="Show only pairs above this.")
@device_option
@json_option
@click.pass_context
def crosstalk(
    ctx: click.Context,
    recipe: str | None,
    base_name: str | None,
    everything: bool,
    out: Path | None,
    above: float,
    device: str,
    as_json: bool,
) -> None:
    """Show how much each patch moves every other concept, relative to its own (0 is none, 1 is as much)."""
    shop = workshop(ctx)
    found = shop.crosstalk(recipe, base=base_name, everything=everything, device=device)
    if out:
        from overpaint.evaluation.figures import heat_map

        heat_map(
            out,
            found.ratios,
            [concept for _, concept in found.patches],
            found.concepts,
            title="Cross-talk, relative to the patch's own concept",
            row_label="patch",
            column_label="concept",
        )
        Talk().say(f"wrote {out}")
    method = {concept: how for (_, concept), how in zip(found.patches, found.methods, strict=True)}
    rows: list[list[Any]] = [
        [p.emitter, p.receiver, round(p.ratio, 4), method[p.emitter]] for p in found.pairs() if p.ratio >= above
    ]
    show_table("Cross-talk", ["patch", "concept", "relative effect", "how"], rows, as_json)
