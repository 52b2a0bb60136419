"""`overpaint inspect`: what is in a checkpoint, a base or a patch file."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overpaint.commands.common import (
    Talk,
    device_option,
    json_option,
    open_workspace,
    recipe_option,
    show_table,
)
from overpaint.core.atomic import require_parent

if TYPE_CHECKING:
    from overpaint.workspace.workspace import Workspace

# Using what is there: `build`, `generate`, `demo`, and the upkeep of the database.


@click.group()
def db() -> None:
    """The registry's database."""


@db.command("upgrade")
@click.pass_context
def db_upgrade(ctx: click.Context) -> None:
    """Bring an older registry to this program's schema; a copy of the database is kept beside it."""
    from overpaint.registry.registry import Registry

    click.echo(f"upgraded from revision {Registry.upgrade(ctx.obj)}")


@click.command()
@click.argument("name", metavar="RECIPE")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["single-file", "diffusers"]), help="Default: that of the base.")
@click.option(
    "--sign", type=click.Path(path_type=Path), metavar="KEY", help="Sign all files: model.sig, as OpenSSF has it."
)
@click.pass_context
def build(ctx: click.Context, name: str, out: Path, form: Any, sign: Path | None) -> None:
    """Bake a recipe into a new checkpoint OUT: a diffusers folder, or a single file whose name ends in .safetensors."""
    built = open_workspace(ctx).recipe(name).build(out, format=form, warn=Talk().say)
    click.echo(f"built {built.folder}: weights {built.digest}")
    if sign is not None:
        from overpaint.workspace.certifying import sign_checkpoint

        click.echo(f"signed: {sign_checkpoint(built.path, sign)}")


@click.command()
@click.argument("prompt")
@recipe_option
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE")
@click.option("--compare", is_flag=True, help="Show the base beside the recipe, same seeds, in one labelled picture.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first picture.")
@click.option("--count", default=4, show_default=True, help="How many pictures.", type=click.IntRange(1, 64))
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1, 1000))
@click.option("--guidance", type=float, help="Guidance scale; default: what the base likes.")
@device_option
@click.pass_context
def generate(ctx: click.Context, /, prompt: str, recipe: str, out: Path, compare: bool, **options: Any) -> None:
    """Draw a prompt with a recipe applied."""
    from overpaint.workspace.evaluating import draw

    wanted, talk = open_workspace(ctx).recipe(recipe), Talk()
    require_parent(out)
    draw(wanted.base, wanted.terms(), prompt, out, label=recipe, compare=compare, progress=talk.progress, **options)
    talk.clear()
    click.echo(str(out))


@click.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="A new folder; default: overpaint-demo, or the first free overpaint-demo-N.",
)
@click.option("--quick", is_flag=True, help="A fifth of the pictures; for a first look.")
def demo(out: Path | None, quick: bool) -> None:
    """Erase seven concepts from the embedded base, put two back, build a checkpoint, judge it all."""
    from overpaint.workspace.demo import run

    if not run(out or _free_folder(), quick=quick):
        sys.exit(1)


def _free_folder() -> Path:
    names = itertools.chain(["overpaint-demo"], (f"overpaint-demo-{n}" for n in itertools.count(2)))
    return next(Path(name) for name in names if not Path(name).exists())


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE-OR-FOLDER")
@click.option("--explain", is_flag=True, help="Fit the registry's patches to what any checkpoint changes.")
@click.option("--base", metavar="NAME", help="With --explain: the base that it was made from.")
@json_option
@click.pass_context
def inspect(ctx: click.Context, path: Path, explain: bool, base: str | None, as_json: bool) -> None:
    """Say what is erased in a checkpoint and check every digest; also describes bases and patch files.

    The exit code is 0 only when Overpaint built it and everything recorded is true. With --explain it is about any
    checkpoint: which of the registry's patches are in it, at which strengths, and how much of its difference from the
    base they leave unexplained.
    """
    if explain:
        _show_explanation(open_workspace(ctx), path, base, as_json)
        return
    from overpaint.patches.inspect import inspect as look

    found = look(path)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1))
    else:
        show_table(f"{path}: {found.what}", ["what", "value"], [[k, _plain(v)] for k, v in found.facts.items()], False)
        rows = [[_plain(p.get("concept", "")), p["strength"], p.get("solver", ""), p["id"]] for p in found.patches]
        if rows:
            show_table("Erased in it", ["concept", "strength", "solver", "patch"], rows, False)
        for problem in found.problems:
            click.echo(_plain(problem))
        if found.sound:
            click.echo("every digest matches")
    ctx.exit(0 if found.sound else 1)


def _show_explanation(workspace: Workspace, path: Path, base: str | None, as_json: bool) -> None:
    from overpaint.bases.base import Base
    from overpaint.patches.explaining import explain

    name = workspace.base_name(base)
    patches = [workspace.patch(record.id) for record in workspace.registry.patches(base=name)]
    found = explain(Base.open(path), workspace.base(name), patches)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1, ensure_ascii=False))
        return
    rows = [[_plain(patch.concept.name), f"{strength:.2f}", patch.id[:12]] for patch, strength in found.present]
    show_table(f"{path}: patches of {name} in it", ["concept", "strength", "patch"], rows, False)
    click.echo(
        f"{found.changed} tensors differ from the base; {found.residual:.1%} of the change is explained by no patch"
        + (f", among it {len(found.unexplained)} tensors that none reaches" if found.unexplained else "")
    )
    if found.uncovered:
        click.echo(f"text inputs that nothing in it changes: {', '.join(found.uncovered)}")


def _plain(value: Any) -> str:
    """A value from a file somebody else wrote: what a terminal would obey is shown instead."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
