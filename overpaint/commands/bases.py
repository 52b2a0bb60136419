"""`overpaint base`: base models."""

from __future__ import annotations

from typing import Any

import click

from overpaint.commands.common import json_option, show_table, workshop


@click.group()
def base() -> None:
    """Base models."""


@base.command("add")
@click.argument("name")
@click.argument("source", required=False)
@click.pass_context
def base_add(ctx: click.Context, name: str, source: str | None) -> None:
    """Remember a base under NAME.

    SOURCE is a diffusers folder, a single file (.safetensors, or .ckpt, of which only tensors are read), a model on the
    Hub as ORG/MODEL or ORG/MODEL@REVISION (remembered with its commit), or `emoji` for the embedded base. It defaults to
    NAME.
    """
    record = workshop(ctx, create=True).add_base(name, source or name)
    click.echo(f"base {record.name}: {record.layout} from {record.source}, fingerprint {record.fingerprint}")


@base.command("list")
@json_option
@click.pass_context
def base_list(ctx: click.Context, as_json: bool) -> None:
    """List all bases."""
    rows = [[b.name, b.layout, str(b.source), b.fingerprint] for b in workshop(ctx).bases()]
    show_table("Bases", ["name", "layout", "source", "fingerprint"], rows, as_json)


@base.command("show")
@click.argument("name")
@json_option
@click.pass_context
def base_show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show one base: what it holds and which projections read the prompt."""
    shop = workshop(ctx)
    record, opened = shop.registry.base(name), shop.base(name)
    rows: list[list[Any]] = [
        ["name", record.name],
        ["source", str(record.source)],
        ["kept at", str(opened.path)],
        ["layout", record.layout],
        ["fingerprint", record.fingerprint],
        ["tensors", len(opened.names)],
        ["projections that read the prompt", len(opened.readers())],
        ["added", record.added_at.isoformat(timespec="seconds")],
    ]
    show_table("Base", ["what", "value"], rows, as_json)
