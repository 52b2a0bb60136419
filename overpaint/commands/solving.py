"""`overpaint solve`: compute and store patches."""

from __future__ import annotations

import click

from overpaint.commands.common import Talk, device_option, json_option, show_table, workshop


@click.command()
@click.argument("concepts", nargs=-1, required=True, metavar="CONCEPT...")
@click.option("--base", "base_name", required=True, help="Name of the base.")
@click.option("--solver", default="separable", show_default=True)
@click.option("--set", "settings", multiple=True, metavar="K=V", help="A setting of the solver; may be repeated.")
@click.option("--seed", default=0, show_default=True)
@device_option
@json_option
@click.pass_context
def solve(
    ctx: click.Context,
    concepts: tuple[str, ...],
    base_name: str,
    solver: str,
    settings: tuple[str, ...],
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Compute and store the patch of each concept. A name the registry does not know becomes an object."""
    shop, talk, rows = workshop(ctx), Talk(), []
    chosen = dict(_pair(text) for text in settings)
    shop.learn(concepts)
    for name in concepts:
        talk.progress(0, 1, f"solving {name}")
        found = shop.solve(
            name, base=base_name, solver=solver, settings=chosen, seed=seed, device=device, report=talk.progress
        )
        talk.clear()
        rows.append([name, found.id, found.record.kind, found.nbytes, round(found.seconds, 3)])
    show_table("Solved", ["concept", "patch", "kind", "bytes", "seconds"], rows, as_json)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"--set takes NAME=VALUE; got {text!r}")
    return name.strip(), value
