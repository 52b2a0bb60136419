"""What recipes become: `build` a checkpoint, `generate` pictures, `inspect` a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overpaint.commands.common import (
    BASE,
    RECIPE,
    LocalPath,
    Terminal,
    device_option,
    digests_option,
    json_option,
    open_workspace,
    recipe_option,
    short,
    show_json,
    show_table,
)
from overpaint.core.atomic import require_parent

if TYPE_CHECKING:
    from overpaint.workspace.workspace import Workspace


@click.command()
@click.argument("name", metavar="RECIPE", type=RECIPE)
@click.argument("out", type=LocalPath())
@click.option(
    "--format",
    "form",
    type=click.Choice(["single-file", "diffusers"]),
    help="Default: a single file where OUT ends in .safetensors, else that of the base.",
)
@click.option(
    "--original",
    type=LocalPath(),
    metavar="FILE",
    help="The base's denoiser as another program has it (safetensors, GGUF): OUT is a copy with the recipe baked in.",
)
@click.option("--sign", type=LocalPath(), metavar="KEY", help="Sign all files: model.sig, as OpenSSF has it.")
@digests_option
@click.pass_context
def build(
    ctx: click.Context, name: str, out: Path, form: Any, original: Path | None, sign: Path | None, digests: bool
) -> None:
    """Build a recipe into a new checkpoint.

    OUT is a diffusers folder, or a single file whose name ends in .safetensors.

    \b
    Examples:
      overpaint build safe safe.safetensors
      overpaint build safe flux1-safe.gguf --original flux1-dev-Q8_0.gguf
    """
    notices: list[str] = []
    with Terminal() as terminal:
        workspace = open_workspace(ctx, terminal=terminal)
        built = workspace.recipe(name).build(out, format=form, original=original, warn=notices.append)
    for notice in notices:
        terminal.note(notice)
    click.echo(f"built {built.path}: weights {built.digest if digests else short(built.digest)}")
    if sign is not None:
        from overpaint.workspace.certifying import sign_checkpoint

        click.echo(f"signed: {sign_checkpoint(built.path, sign)}")


@click.command()
@click.argument("prompt")
@recipe_option
@click.option("-o", "--out", type=LocalPath(dir_okay=False), required=True, metavar="FILE")
@click.option("--compare", is_flag=True, help="Show the base beside the recipe, same seeds, in one labelled picture.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first picture.")
@click.option("--count", default=4, show_default=True, help="How many pictures.", type=click.IntRange(1, 64))
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1, 1000))
@click.option("--guidance", type=float, help="Guidance scale; default: the base's own.")
@device_option
@click.pass_context
def generate(
    ctx: click.Context,
    prompt: str,
    recipe: str,
    out: Path,
    compare: bool,
    seed: int,
    count: int,
    steps: int,
    guidance: float | None,
    device: str,
) -> None:
    """Draw a prompt with a recipe applied.

    \b
    Example:
      overpaint generate "a picture of a cat" --recipe safe --compare -o cat.png
    """
    with Terminal() as terminal:
        wanted = open_workspace(ctx, terminal=terminal).recipe(recipe)
        require_parent(out)
        from overpaint.workspace.evaluating import draw

        draw(
            wanted.base,
            wanted.terms(),
            prompt,
            out,
            label=recipe,
            compare=compare,
            seed=seed,
            count=count,
            steps=steps,
            guidance=guidance,
            device=device,
            progress=terminal.progress,
        )
    click.echo(str(out))


@click.command()
@click.argument("path", type=LocalPath(), metavar="FILE-OR-FOLDER")
@click.option("--explain", is_flag=True, help="Fit the registry's patches to what any checkpoint changes.")
@click.option("--base", type=BASE, metavar="NAME", help="With --explain: the base that it was made from.")
@digests_option
@json_option
@click.pass_context
def inspect(ctx: click.Context, path: Path, explain: bool, base: str | None, digests: bool, as_json: bool) -> None:
    """Show what is erased in a checkpoint.

    Checks every digest; also describes bases and patch files. The exit code is 0 only when Overpaint built it and
    everything recorded is true. With --explain it is about any checkpoint: which of the registry's patches are in it, at
    which strengths, and how much of its difference from the base they leave unexplained.

    \b
    Example:
      overpaint inspect safe.safetensors
      overpaint inspect model.safetensors --explain --base sd15
    """
    if explain:
        _show_explanation(open_workspace(ctx), path, base, digests, as_json)
        return
    from overpaint.patches.inspect import inspect as look

    inspected = look(path)
    if as_json:
        show_json(inspected.as_json())
    else:
        facts = [[name, _plain(value)] for name, value in inspected.facts.items()]
        show_table(f"{path}: {inspected.what}", ["what", "value"], facts, False, digests=digests)
        rows = [[_plain(p.get("concept", "")), p["strength"], p.get("solver", ""), p["id"]] for p in inspected.patches]
        if rows:
            show_table("Erased in it", ["concept", "strength", "solver", "patch"], rows, False, digests=digests)
        for problem in inspected.problems:
            click.echo(_plain(problem))
        if inspected.sound:
            click.echo("every digest matches")
    ctx.exit(0 if inspected.sound else 1)


def _show_explanation(workspace: Workspace, path: Path, base: str | None, digests: bool, as_json: bool) -> None:
    from overpaint.bases.base import Base
    from overpaint.patches.inspect import explain

    name = workspace.base_name(base)
    patches = [workspace.patch(record.id) for record in workspace.registry.patches(base=name)]
    explained = explain(Base.open(path), workspace.base(name), patches)
    if as_json:
        show_json(explained.as_json())
        return
    rows = [[_plain(patch.concept.name), f"{strength:.2f}", patch.id] for patch, strength in explained.present]
    show_table(f"{path}: patches of {name} in it", ["concept", "strength", "patch"], rows, False, digests=digests)
    click.echo(
        f"{explained.changed} tensors differ from the base; {explained.residual:.1%} of the change is explained by no patch"
        + (f", among it {len(explained.unexplained)} tensors that none reaches" if explained.unexplained else "")
    )
    if explained.uncovered:
        click.echo(f"text inputs that nothing in it changes: {', '.join(explained.uncovered)}")


def _plain(value: Any) -> str:
    """A value from a file somebody else wrote: what a terminal would obey is shown instead."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
