"""The command line: sentences. Each command parses, makes one call, prints. The only reader of the environment.

Results go to standard output, talk to standard error. Heavy imports happen inside commands, so that `--help` and the
lists answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overpaint import __version__
from overpaint.concepts import KINDS
from overpaint.errors import OverpaintError

if TYPE_CHECKING:
    from overpaint.workshop import Workshop


class _Commands(click.Group):
    """Turns the package's own errors into one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OverpaintError as error:
            raise click.ClickException(str(error)) from error


class Talk:
    """What a command says on the way: text and progress on standard error."""

    def __init__(self) -> None:
        self._length = 0

    def say(self, text: str) -> None:
        self.clear()
        click.echo(text, err=True)

    def progress(self, step: int, of: int, text: str) -> None:
        """One line that is rewritten in a terminal; nothing where standard error is a file."""
        if sys.stderr.isatty():
            line = f"  {step}/{of} {text}"
            click.echo(f"\r{line:<{self._length}}", nl=False, err=True)
            self._length = len(line)

    def clear(self) -> None:
        if self._length:
            click.echo("\r" + " " * self._length + "\r", nl=False, err=True)
            self._length = 0


def show_table(title: str, columns: list[str], rows: list[list[Any]], as_json: bool) -> None:
    """A table for people, or the same rows as JSON objects."""
    if as_json:
        import json

        click.echo(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    Console(markup=False, highlight=False).print(table)


def workshop(ctx: click.Context, *, create: bool = False) -> Workshop:
    """The registry this call is about."""
    from overpaint.workshop import Workshop

    return Workshop.open(ctx.obj, create=create)


def default_registry() -> str:
    """The user's data directory."""
    from platformdirs import user_data_dir

    return user_data_dir("overpaint")


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
recipe_option = click.option("--recipe", default="default", show_default=True, help="Name of the recipe.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option(
    "--registry", envvar="OVERPAINT_REGISTRY", metavar="DIR-or-URL", help="Default: the user's data directory."
)
@click.pass_context
def main(ctx: click.Context, registry: str | None) -> None:
    """Erase concepts from text-to-image models with small, exact, removable patches."""
    ctx.obj = registry or default_registry()


@main.command()
@click.pass_context
def init(ctx: click.Context) -> None:
    """Make a registry."""
    click.echo(f"registry at {workshop(ctx, create=True).registry.folder}")


# Bases


@main.group()
def base() -> None:
    """Base models."""


@base.command("add")
@click.argument("name")
@click.argument("source", required=False)
@click.pass_context
def base_add(ctx: click.Context, name: str, source: str | None) -> None:
    """Remember a base: a diffusers folder, or `emoji` for the embedded one (SOURCE defaults to NAME)."""
    record = workshop(ctx, create=True).add_base(name, source or name)
    click.echo(f"base {record.name}: {record.layout}, fingerprint {record.fingerprint}")


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
        ["source", str(opened.path)],
        ["layout", record.layout],
        ["fingerprint", record.fingerprint],
        ["tensors", len(opened.names)],
        ["projections that read the prompt", len(opened.readers())],
        ["added", record.added_at.isoformat(timespec="seconds")],
    ]
    show_table("Base", ["what", "value"], rows, as_json)


# Concepts


@main.group()
def concept() -> None:
    """Concepts that can be erased."""


@concept.command("add")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), default="object", show_default=True)
@click.option("--synonym", "synonyms", multiple=True, help="Another word for the same thing; may be repeated.")
@click.option("--anchor", default="", help="What it should become; empty: nothing.")
@click.pass_context
def concept_add(ctx: click.Context, name: str, kind: str, synonyms: tuple[str, ...], anchor: str) -> None:
    """Remember a concept."""
    added = workshop(ctx, create=True).add_concept(name, kind=kind, synonyms=synonyms, anchor=anchor)
    click.echo(f"concept {added.name} ({added.kind})")


@concept.command("list")
@json_option
@click.pass_context
def concept_list(ctx: click.Context, as_json: bool) -> None:
    """List all concepts."""
    rows = [[c.name, c.kind, ", ".join(c.synonyms), c.anchor] for c in workshop(ctx).concepts()]
    show_table("Concepts", ["name", "kind", "synonyms", "anchor"], rows, as_json)


@concept.command("show")
@click.argument("name")
@json_option
@click.pass_context
def concept_show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show one concept and its patches."""
    shop = workshop(ctx)
    found = shop.registry.concept(name)
    rows: list[list[Any]] = [
        ["name", found.name],
        ["kind", found.kind],
        ["synonyms", ", ".join(found.synonyms)],
        ["anchor", found.anchor],
        *([f"patch ({p.solver} on {p.base})", p.id] for p in shop.patches(concept=name)),
    ]
    show_table("Concept", ["what", "value"], rows, as_json)


# Solving


@main.command()
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


# Patches


@main.group()
def patch() -> None:
    """Patches, and what lies on a recipe."""


@patch.command("list")
@click.option("--concept", "concept_name", help="Only patches of this concept.")
@json_option
@click.pass_context
def patch_list(ctx: click.Context, concept_name: str | None, as_json: bool) -> None:
    """List patches."""
    shop = workshop(ctx)
    found = shop.patches(concept=concept_name) if concept_name else shop.patches()
    rows = [[p.id if as_json else p.id[:12], p.concept, p.base, p.solver, p.kind, p.nbytes] for p in found]
    show_table("Patches", ["patch", "concept", "base", "solver", "kind", "bytes"], rows, as_json)


@patch.command("show")
@click.argument("patch_key", metavar="PATCH")
@json_option
@click.pass_context
def patch_show(ctx: click.Context, patch_key: str, as_json: bool) -> None:
    """Show one patch with its provenance, after checking its bytes."""
    shop = workshop(ctx)
    record, found = shop.registry.patch(patch_key), shop.patch(patch_key)
    rows: list[list[Any]] = [
        ["patch", record.id],
        ["concept", record.concept],
        ["base", record.base],
        ["base fingerprint", found.manifest["subject"]["fingerprint"]],
        ["tensors it changes", found.manifest["subject"]["count"]],
        ["solver", record.solver],
        *([f"setting {name}", value] for name, value in record.settings.items()),
        ["seed", record.seed],
        ["kind", record.kind],
        *([f"array {name}", f"{a['dtype']} {a['shape']}"] for name, a in sorted(found.manifest["arrays"].items())[:8]),
        ["bytes", record.nbytes],
        ["seconds", round(record.seconds, 3)],
        ["solved", record.solved_at.isoformat(timespec="seconds")],
    ]
    show_table("Patch", ["what", "value"], rows, as_json)


@patch.command("add")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@recipe_option
@click.option("--strength", default=1.0, show_default=True)
@click.option("--why", default="", help="Why; kept in the recipe's history.")
@click.pass_context
def patch_add(ctx: click.Context, patches: tuple[str, ...], recipe: str, strength: float, why: str) -> None:
    """Lay patches on a recipe: by id, the beginning of an id, or concept (its newest patch)."""
    shop = workshop(ctx)
    base_name = shop.registry.patch(patches[0]).base
    for key in patches:
        line = shop.recipe(recipe, base=base_name).add(key, strength, why=why)
        click.echo(
            f"{line.action} {line.concept} ({line.patch[:12]}): weights {line.digest_before} -> {line.digest_after}"
        )


@patch.command("remove")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@recipe_option
@click.option("--why", default="", help="Why; kept in the recipe's history.")
@click.pass_context
def patch_remove(ctx: click.Context, patches: tuple[str, ...], recipe: str, why: str) -> None:
    """Lift patches off a recipe; the concepts come back."""
    shop = workshop(ctx)
    for key in patches:
        line = shop.known_recipe(recipe).remove(key, why=why)
        click.echo(
            f"{line.action} {line.concept} ({line.patch[:12]}): weights {line.digest_before} -> {line.digest_after}"
        )
        if line.digest_after == shop.registry.base(shop.known_recipe(recipe).record.base).fingerprint:
            click.echo("the recipe is empty: these are the base's weights, bit for bit")


# Recipes


@main.group()
def recipe() -> None:
    """Recipes: a base plus a set of patches, with a history."""


@recipe.command("list")
@json_option
@click.pass_context
def recipe_list(ctx: click.Context, as_json: bool) -> None:
    """List recipes."""
    rows = [[r.name, r.base, len(r.patches)] for r in workshop(ctx).recipes()]
    show_table("Recipes", ["recipe", "base", "patches"], rows, as_json)


@recipe.command("show")
@click.argument("name", default="default")
@json_option
@click.pass_context
def recipe_show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show what lies on a recipe's base, and the digest of the weights."""
    found = workshop(ctx).known_recipe(name)
    rows = [[p.concept, p.id if as_json else p.id[:12], p.solver, s, p.nbytes] for p, s in found.patches()]
    show_table(
        f"Recipe {name} on {found.record.base}", ["concept", "patch", "solver", "strength", "bytes"], rows, as_json
    )
    click.echo(f"weights {found.digest()}", err=as_json)


@recipe.command("log")
@click.argument("name", default="default")
@json_option
@click.pass_context
def recipe_log(ctx: click.Context, name: str, as_json: bool) -> None:
    """Who changed a recipe, when and why."""
    rows = [
        [
            h.revision,
            h.at.isoformat(timespec="seconds"),
            h.who,
            h.action,
            h.concept,
            h.strength_after,
            h.why,
            h.digest_after,
        ]
        for h in workshop(ctx).known_recipe(name).log()
    ]
    columns = ["revision", "when", "who", "did", "concept", "strength", "why", "weights"]
    show_table(f"History of {name}", columns, rows, as_json)


# The database


@main.group()
def db() -> None:
    """The registry's database."""


@db.command("upgrade")
@click.pass_context
def db_upgrade(ctx: click.Context) -> None:
    """Bring an older registry to this program's schema; a copy of the database is kept beside it."""
    from overpaint.registry.registry import Registry

    click.echo(f"upgraded from revision {Registry.upgrade(ctx.obj)}")


# Using


@main.command()
@click.argument("name", metavar="RECIPE")
@click.argument("out", type=click.Path(path_type=Path))
@click.pass_context
def build(ctx: click.Context, name: str, out: Path) -> None:
    """Bake a recipe into a new diffusers folder OUT."""
    built = workshop(ctx).build(name, out, notice=Talk().say)
    click.echo(f"built {built.folder}: weights {built.digest}")


@main.command()
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
    from overpaint.drawing import draw

    draw(workshop(ctx), recipe, prompt, out, compare=compare, **options)
    click.echo(str(out))


@main.command()
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("overpaint-demo"), show_default=True
)
@click.option("--quick", is_flag=True, help="A fifth of the pictures; for a first look.")
def demo(out: Path, quick: bool) -> None:
    """Erase seven concepts from the embedded base, put two back, build a checkpoint, judge it all."""
    from overpaint.demo import run

    if not run(out, quick=quick):
        sys.exit(1)


if __name__ == "__main__":
    main()
