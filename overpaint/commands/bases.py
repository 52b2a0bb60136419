"""`overpaint base`: base models, where their files are, and the prompts that they must go on understanding."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import click

from overpaint.commands.common import (
    BASE,
    LocalText,
    Terminal,
    device_option,
    digests_option,
    json_option,
    open_workspace,
    renamed,
    short,
    show_table,
)


@click.group()
def base() -> None:
    """Base models."""


@base.command("add")
@click.argument("name")
@click.argument("source", required=False)
@click.pass_context
def base_add(ctx: click.Context, name: str, source: str | None) -> None:
    """Add a base under NAME.

    SOURCE is a diffusers folder, a single file (.safetensors, or .ckpt, of which only tensors are read), a model on the
    Hub as ORG/MODEL or ORG/MODEL@REVISION (remembered with its commit), or an embedded base: `emoji`, a small Stable Diffusion,
    or `emoji-dit`, a small diffusion transformer. It defaults to NAME. One base may have several names.

    \b
    Example:
      overpaint base add emoji
      overpaint base add sd15 path/to/stable-diffusion-v1-5
    """
    with Terminal() as terminal:
        record = open_workspace(ctx, create=True, terminal=terminal).add_base(name, source or name)
    click.echo(f"base {record.name}: {record.layout} from {record.source}, fingerprint {short(record.fingerprint)}")


@base.command("list")
@digests_option
@json_option
@click.pass_context
def base_list(ctx: click.Context, digests: bool, as_json: bool) -> None:
    """List all bases.

    \b
    Example:
      overpaint base list
    """
    rows = [[b.name, b.layout, str(b.source), b.fingerprint] for b in open_workspace(ctx).bases()]
    columns = ["name", "layout", "source", "fingerprint"]
    show_table("Bases", columns, rows, as_json, digests=digests, asked=["fingerprint"])


@base.command("show")
@click.argument("name", type=BASE)
@digests_option
@json_option
@click.pass_context
def base_show(ctx: click.Context, name: str, digests: bool, as_json: bool) -> None:
    """Show what a base holds and what reads the prompt.

    Other names of the same base are listed too.

    \b
    Example:
      overpaint base show sd15
    """
    with Terminal() as terminal:
        workspace = open_workspace(ctx, terminal=terminal)
        record, opened = workspace.registry.base(name), workspace.base(name)
    others = [b.name for b in workspace.bases() if b.fingerprint == record.fingerprint and b.name != record.name]
    rows: list[list[Any]] = [
        ["name", record.name],
        *(["also called", other] for other in others),
        ["source", str(record.source)],
        ["kept at", str(opened.path)],
        ["layout", record.layout],
        ["fingerprint", record.fingerprint],
        ["tensors", len(opened.names)],
        ["projections that read the prompt", len(opened.projections())],
        ["added", record.added_at.isoformat(timespec="seconds")],
    ]
    show_table("Base", ["what", "value"], rows, as_json, digests=digests)


@base.command("move")
@click.argument("name", type=BASE)
@click.argument("path", metavar="NEWPATH")
@click.pass_context
def base_move(ctx: click.Context, name: str, path: str) -> None:
    """Say where the files of a base are now.

    The base at NEWPATH must be the same, by its fingerprint.

    \b
    Example:
      overpaint base move sd15 /models/stable-diffusion-v1-5
    """
    with Terminal() as terminal:
        record = open_workspace(ctx, terminal=terminal).move_base(name, path)
    click.echo(f"base {record.name} is at {record.source}")


@base.command("remove")
@click.argument("name", type=BASE)
@click.pass_context
def base_remove(ctx: click.Context, name: str) -> None:
    """Remove a name of a base; its files stay.

    Refused while patches or recipes need the base, unless it has another name.

    \b
    Example:
      overpaint base remove old-name
    """
    open_workspace(ctx).remove_base(name)
    click.echo(f"removed base {name}; its files are where they were")


@base.command("preserve")
@click.argument("name", type=BASE)
@click.option("--prompts", type=LocalText(), help="Preserve these, one on each line; - reads standard input.")
@click.option("--remove", multiple=True, metavar="PROMPT", help="No longer preserve this; may be repeated.")
@click.option("--remove-all", is_flag=True, help="No longer preserve any.")
@json_option
@click.pass_context
def base_preserve(
    ctx: click.Context, name: str, prompts: IO[str] | None, remove: tuple[str, ...], remove_all: bool, as_json: bool
) -> None:
    """Set or show the prompts that every solve preserves.

    For what a base must go on understanding as it does, watermark prompts for example. Patches that are solved from now on
    preserve them, where their solver can; patches that are there already stay as they are.

    \b
    Example:
      overpaint base preserve sd15 --prompts watermark.txt
    """
    workspace, terminal = open_workspace(ctx), Terminal()
    if remove or remove_all:
        count = workspace.registry.forget_prompts(name, None if remove_all else remove)
        terminal.note(f"{count} no longer preserved")
    if prompts is not None:
        wanted = [line.strip() for line in _lines(prompts) if line.strip()]
        terminal.note(f"{workspace.preserve(name, wanted)} of {len(wanted)} are new")
    records = workspace.registry.preserved_prompts(name)
    rows = [[record.prompt, record.who, record.at] for record in records]
    show_table("Preserved prompts", ["prompt", "who", "since"], rows, as_json)


def _lines(prompts: IO[str]) -> list[str]:
    try:
        return prompts.read().splitlines()
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{Path(prompts.name).name} is not UTF-8 text ({error}); save it as UTF-8") from error


@base.command("prepare")
@click.argument("name", type=BASE)
@click.option(
    "--vocabulary",
    default=0,
    show_default=True,
    type=click.IntRange(0, 10**6),
    metavar="N",
    help="Encode so many words of the vocabulary; 0: all. Solve with --set vocabulary=N then.",
)
@device_option
@click.pass_context
def base_prepare(ctx: click.Context, name: str, vocabulary: int, device: str) -> None:
    """Encode the vocabulary of a base before the first solve.

    On a large text encoder that takes minutes on a GPU and hours without. The result is kept in the registry; a call that
    was interrupted goes on where it stopped.

    \b
    Example:
      overpaint base prepare sdxl --device cuda
    """
    with Terminal() as terminal:

        def progress(step: int, of: int, text: str) -> None:
            terminal.progress(step, of, text)
            if "damaged" in text:
                terminal.note(f"warning: {text}")

        workspace = open_workspace(ctx, terminal=terminal)
        workspace.prepare(name, vocabulary=vocabulary, device=device, progress=progress)
        terminal.note(f"{name} is ready to be solved on")


base.add_command(renamed(base_preserve, "keep"))
