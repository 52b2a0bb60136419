"""What one begins with: `overpaint init`, `base`, `concept`, and the `demo` of all of it.

A base's commands are about its files, too, and about the prompts that it must go on understanding.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import IO, Any

import click

from overpaint.commands.common import (
    BASE,
    CONCEPT,
    LocalPath,
    LocalText,
    Terminal,
    choose_threads,
    device_option,
    digests_option,
    interruptible,
    json_option,
    limit_option,
    note_if_more,
    offset_option,
    on_option,
    open_workspace,
    renamed,
    short,
    show_table,
)
from overpaint.core.concepts import KINDS
from overpaint.solvers import PREPARED


@click.command()
@click.option("--blobs", metavar="URL", help="Keep the bytes of patches there instead of in the registry's folder.")
@click.pass_context
def init(ctx: click.Context, blobs: str | None) -> None:
    """Make a registry.

    \b
    Example:
      overpaint init
      overpaint init --blobs s3://bucket/patches
    """
    folder = open_workspace(ctx, create=True).registry.folder
    if blobs is not None:
        from overpaint.registry.store import place_store

        place_store(folder, blobs)
    click.echo(f"registry at {folder}")


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
@click.option(
    "--solver",
    default=PREPARED[0],
    show_default=True,
    type=click.Choice(PREPARED),
    help="For which solver; all but separable_mlp read what separable does.",
)
@device_option
@on_option
@click.pass_context
def base_prepare(ctx: click.Context, name: str, vocabulary: int, solver: str, device: str, on: str) -> None:
    """Encode the vocabulary of a base before the first solve.

    On a large text encoder that takes minutes on a GPU and hours without; --on ray shares it out. The result is kept in the
    registry; a call that was interrupted goes on where it stopped.

    \b
    Example:
      overpaint base prepare sdxl --device cuda
      overpaint base prepare sdxl --on ray
    """
    with Terminal() as terminal:

        def progress(step: int, of: int, text: str) -> None:
            terminal.progress(step, of, text)
            if "damaged" in text:
                terminal.note(f"warning: {text}")

        workspace = open_workspace(ctx, terminal=terminal)
        workspace.prepare(name, vocabulary=vocabulary, solver=solver, device=device, progress=progress, on=on)
        terminal.note(f"{name} is ready to be solved on")


base.add_command(renamed(base_preserve, "keep"))


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


@click.command()
@click.option(
    "-o",
    "--out",
    type=LocalPath(file_okay=False),
    help="A new folder; default: overpaint-demo, or the first free overpaint-demo-N.",
)
@click.option("--quick", is_flag=True, help="A fifth of the pictures; for a first look.")
def demo(out: Path | None, quick: bool) -> None:
    """Try it all on the embedded base, in some minutes.

    Erases seven concepts, puts two back, builds a checkpoint, judges everything and writes a report. The exit code is 1
    when a check does not hold.

    \b
    Example:
      overpaint demo --quick -o a-first-look
    """
    from overpaint.workspace.demo import run

    folder = out or _free_folder()
    with (
        Terminal() as terminal,
        interruptible(
            terminal, lambda: f"what was written to {folder} is removed again; start again with `overpaint demo`"
        ),
    ):
        findings = run(folder, quick=quick, progress=terminal.progress, on_base=choose_threads)
    columns, rows = findings.concept_table()
    show_table("Judge's accuracy on the concept, held-out prompts", columns, rows, False)
    checks = [[check.what, check.value, check.bar, check.holds] for check in findings.checks]
    show_table("Checks", ["what", "measured", "bar", "holds"], checks, False)
    click.echo(
        f"{findings.prepare_seconds:.1f} s once to encode the vocabulary and the concepts, then the seconds above for each"
    )
    click.echo(f"{findings.seconds:.0f} s. Report: {folder / 'report.html'}; checkpoint: {folder / 'checkpoint'}")
    if not findings.hold:
        sys.exit(1)


def _free_folder() -> Path:
    names = itertools.chain(["overpaint-demo"], (f"overpaint-demo-{n}" for n in itertools.count(2)))
    return next(Path(name) for name in names if not Path(name).exists())
