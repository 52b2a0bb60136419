"""`patch import`, `patch export` and `recipe export`: files of other tools. A registry's own files are in `sharing`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overpaint.commands.common import Talk, json_option, open_workspace

if TYPE_CHECKING:
    from overpaint.patches.formats.exporting import Exported


Command = TypeVar("Command", bound=Callable[..., Any])
FORMATS = ("kohya", "diffusers", "comfy-diff", "full")
READERS = ("a1111", "kohya", "comfyui", "diffusers")
DTYPES = ("float32", "float16", "bfloat16")
MEANINGS = ("change", "weights")


def export_options(command: Command) -> Command:
    """What both exports share."""
    for option in (
        json_option,
        click.option(
            "--truncate",
            type=click.IntRange(1, 4096),
            metavar="RANK",
            help="Let changes that are not of low rank into a LoRA, cut to this rank; the error of each layer is printed.",
        ),
        click.option(
            "--dtype", default=DTYPES[0], show_default=True, type=click.Choice(DTYPES), help="Of what is stored."
        ),
        click.option(
            "--format",
            "format",
            type=click.Choice(FORMATS),
            help="kohya: LoRA by kohya's names, which most tools read; the default without --for. diffusers: LoRA for diffusers, "
            "PEFT. comfy-diff: also full differences, for ComfyUI, A1111, Forge. full: the edited weights.",
        ),
        click.option(
            "--for",
            "for_",
            type=click.Choice(READERS),
            help="The tool that is to load it: a format is chosen of which it loads everything, or the export is refused.",
        ),
        click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE"),
    ):
        command = option(command)
    return command


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--base", "base_name", required=True, help="Name of the base that the file is for.")
@click.option("--concept", required=True, help="What it erases; a name the registry does not know becomes an object.")
@click.option("--allow-unmatched", is_flag=True, help="Leave out keys that name nothing in the base.")
@click.option("--meaning", type=click.Choice(MEANINGS), help="What plain tensors are, where that cannot be told.")
@click.option(
    "--keep-rounding", is_flag=True, help="Also reproduce where the file is merely rounded more coarsely than the base."
)
@click.option(
    "--within",
    "tolerance",
    default=0.0,
    type=click.FloatRange(0, 1),
    metavar="ERROR",
    help="Be content with low rank within this relative error of each change.",
)
@json_option
@click.pass_context
def patch_import(
    ctx: click.Context, /, file: Path, base_name: str, concept: str, as_json: bool, **options: Any
) -> None:
    """Store another tool's erasure as a patch: LoRA, differences, or edited weights in FILE, or a folder.

    What `overpaint export` wrote is taken by `overpaint import`.
    """
    talk = Talk()
    done = open_workspace(ctx).import_patch(file, base=base_name, concept=concept, progress=talk.progress, **options)
    talk.clear()
    found, record = done.found, done.record
    if as_json:
        _json(
            {
                "patch": record.id,
                "concept": record.concept,
                "kind": record.kind,
                "bytes": record.nbytes,
                **found.settings(),
            }
        )
        return
    for sentence in found.sentences():
        talk.say(sentence)
    click.echo(f"patch {record.id} for {record.concept}: {record.kind}, {record.nbytes} bytes")


@click.command("export")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@click.option("--strength", default=1.0, show_default=True, help="Of every patch in the file.")
@export_options
@click.pass_context
def patch_export(ctx: click.Context, /, patches: tuple[str, ...], as_json: bool, **how: Any) -> None:
    """Write patches as one file that other tools load. (To share patches: `overpaint export`.)"""
    talk = Talk()
    done = open_workspace(ctx).export_patches(patches, progress=talk.progress, **how)
    talk.clear()
    _show(done, as_json)


@click.command("export")
@click.argument("name", metavar="RECIPE")
@export_options
@click.pass_context
def recipe_export(ctx: click.Context, /, name: str, as_json: bool, **how: Any) -> None:
    """Write what lies on a recipe as one file that other tools load. (To share it: `overpaint export --recipe`.)"""
    talk = Talk()
    done = open_workspace(ctx).recipe(name).export(progress=talk.progress, **how)
    talk.clear()
    _show(done, as_json)


def _show(done: Exported, as_json: bool) -> None:
    if as_json:
        _json(
            {
                "file": str(done.path),
                "format": done.format,
                "bytes": done.nbytes,
                "exact": done.is_exact,
                "whole_for": done.whole_for,
                "passed_over": {name: names for name, names in done.skipped.items() if names},
                "differing": done.differing,
                "of": done.of,
                "errors": dict(done.errors),
            }
        )
        return
    if not done.is_exact:
        for name, error in sorted(done.errors.items(), key=lambda item: -item[1]):
            click.echo(f"{error:.2e}  {name}", err=True)
    click.echo(f"exported {len(done.errors)} tensors to {done.path} as {done.format}, {done.nbytes} bytes")
    click.echo(done.sentence())
    click.echo(done.readers_sentence())


def _json(found: dict[str, Any]) -> None:
    import json

    click.echo(json.dumps(found, indent=1, ensure_ascii=False))
