"""`overpaint patch compress`: a smaller patch beside one that is there."""

from __future__ import annotations

from typing import Any

import click

from overpaint.commands.common import Talk, json_option, show_table, workshop
from overpaint.commands.interrupting import interruptible


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
        shop = workshop(ctx)
        for step, key in enumerate(patches, 1):
            talk.progress(step, len(patches), f"compressing {key}")
            record, found = shop.compress(key, keep)
            tensor, error = max(found.errors.items(), key=lambda item: item[1])
            source = found.source.id if as_json else found.source.id[:12]
            row = [record.concept, record.id, source, record.kind, found.source.nbytes, record.nbytes, error, tensor]
            rows.append([*row, found.errors] if as_json else [*row[:6], f"{error:.2%}", tensor])
    talk.clear()
    columns = ["concept", "patch", "from", "kind", "bytes before", "bytes", "largest error", "tensor"]
    show_table("Compressed", [*columns, *(["errors"] if as_json else [])], rows, as_json)
