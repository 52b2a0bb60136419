"""`overpaint base keep` and `overpaint base prepare`: what solves preserve when nobody lists it."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import click

from overpaint.commands.common import Talk, device_option, json_option, open_workspace, show_table

# `overpaint base`: base models.


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
    record = open_workspace(ctx, create=True).add_base(name, source or name)
    click.echo(f"base {record.name}: {record.layout} from {record.source}, fingerprint {record.fingerprint}")


@base.command("list")
@json_option
@click.pass_context
def base_list(ctx: click.Context, as_json: bool) -> None:
    """List all bases."""
    rows = [[b.name, b.layout, str(b.source), b.fingerprint] for b in open_workspace(ctx).bases()]
    show_table("Bases", ["name", "layout", "source", "fingerprint"], rows, as_json)


@base.command("show")
@click.argument("name")
@json_option
@click.pass_context
def base_show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show one base: what it holds and which projections read the prompt."""
    workspace = open_workspace(ctx)
    record, opened = workspace.registry.base(name), workspace.base(name)
    rows: list[list[Any]] = [
        ["name", record.name],
        ["source", str(record.source)],
        ["kept at", str(opened.path)],
        ["layout", record.layout],
        ["fingerprint", record.fingerprint],
        ["tensors", len(opened.names)],
        ["projections that read the prompt", len(opened.projections())],
        ["added", record.added_at.isoformat(timespec="seconds")],
    ]
    show_table("Base", ["what", "value"], rows, as_json)


@click.command("keep")
@click.argument("name")
@click.option(
    "--prompts", type=click.File(encoding="utf-8"), help="Keep these, one on each line; - reads standard input."
)
@click.option("--remove", multiple=True, metavar="PROMPT", help="No longer keep this; may be repeated.")
@click.option("--remove-all", is_flag=True, help="No longer keep any.")
@json_option
@click.pass_context
def base_keep(
    ctx: click.Context, name: str, prompts: IO[str] | None, remove: tuple[str, ...], remove_all: bool, as_json: bool
) -> None:
    """Prompts that a base must go on understanding as it does, watermark prompts for example; shows them.

    Whatever is solved from now on preserves them; patches that are there already stay as they are.
    """
    workspace, talk = open_workspace(ctx), Talk()
    if remove or remove_all:
        talk.say(f"{workspace.registry.forget_prompts(name, None if remove_all else remove)} no longer kept")
    if prompts is not None:
        wanted = [line.strip() for line in _lines(prompts) if line.strip()]
        talk.say(f"{workspace.preserve(name, wanted)} of {len(wanted)} are new")
    rows = [
        [kept.prompt, kept.who, kept.at.isoformat(timespec="seconds")] for kept in workspace.registry.kept_prompts(name)
    ]
    show_table("Prompts to keep", ["prompt", "who", "since"], rows, as_json)


def _lines(prompts: IO[str]) -> list[str]:
    try:
        return prompts.read().splitlines()
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{Path(prompts.name).name} is not UTF-8 text ({error}); save it as UTF-8") from error


@click.command("prepare")
@click.argument("name")
@click.option(
    "--vocabulary",
    default=0,
    show_default=True,
    type=click.IntRange(0, 10**6),
    metavar="N",
    help="Hear so many words of the vocabulary; 0: all. Solve with --set vocabulary=N then.",
)
@device_option
@click.pass_context
def base_prepare(ctx: click.Context, name: str, vocabulary: int, device: str) -> None:
    """Hear the vocabulary of a base now rather than in the first solve; goes on where an interrupted call stopped.

    On a large text encoder that takes minutes on a GPU and hours without; it is kept in the registry.
    """
    talk = Talk()

    def report(step: int, of: int, text: str) -> None:
        talk.progress(step, of, text)
        if "damaged" in text:
            talk.say(f"warning: {text}")

    open_workspace(ctx).prepare(name, vocabulary=vocabulary, device=device, progress=report)
    talk.say(f"{name} is ready to be solved on")
