"""`overpaint patch`: stored patches, which of them a recipe holds, and other tools' files.

A patch has no name of its own: it is called by its concept or its id; tags are the words that can be changed.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from overpaint.commands.common import (
    BASE,
    CONCEPT,
    PATCH,
    SOLVER,
    ExpiryDay,
    LocalPath,
    Renamed,
    Strength,
    Terminal,
    decoupling,
    device_option,
    digests_option,
    exactly_option,
    interruptible,
    json_option,
    limit_option,
    note_if_more,
    offset_option,
    open_workspace,
    recipe_option,
    short,
    show_change,
    show_json,
    show_table,
    universe_option,
    why_option,
)
from overpaint.commands.evaluating import show_evaluations
from overpaint.registry.records import RecipeEntry

if TYPE_CHECKING:
    from overpaint.patches.formats.exporting import Exported
    from overpaint.patches.formats.importing import Meaning


@click.group()
def patch() -> None:
    """Patches, and which of them a recipe holds."""


@patch.command("list")
@click.option("--concept", type=CONCEPT, help="Only patches of this concept.")
@click.option("--base", type=BASE, help="Only patches for this base.")
@click.option("--solver", type=SOLVER, help="Only patches that this solver made.")
@click.option("--tag", help="Only patches with this tag.")
@limit_option
@offset_option
@digests_option
@json_option
@click.pass_context
def patch_list(
    ctx: click.Context,
    concept: str | None,
    base: str | None,
    solver: str | None,
    tag: str | None,
    limit: int,
    offset: int,
    digests: bool,
    as_json: bool,
) -> None:
    """List patches, newest first.

    \b
    Example:
      overpaint patch list --base sd15 --limit 20
    """
    registry = open_workspace(ctx).registry
    patches = registry.patches(
        concept=concept, base=base, solver=solver, tag=tag, limit=limit or None, offset=offset, newest_first=True
    )
    rows = [[p.id, p.concept, p.base, p.solver, p.kind, p.nbytes, ", ".join(p.tags)] for p in patches]
    columns = ["patch", "concept", "base", "solver", "kind", "bytes", "tags"]
    show_table("Patches", columns, rows, as_json, digests=digests)
    total = registry.count_patches(concept=concept, base=base, solver=solver, tag=tag)
    note_if_more(len(patches), offset, total, "patches")


@patch.command("show")
@click.argument("patch_key", metavar="PATCH", type=PATCH)
@digests_option
@json_option
@click.pass_context
def patch_show(ctx: click.Context, patch_key: str, digests: bool, as_json: bool) -> None:
    """Show one patch and where it comes from.

    Its bytes are checked first.

    \b
    Example:
      overpaint patch show cat
    """
    from overpaint.workspace.planning import manifest_of

    registry = open_workspace(ctx).registry
    record = registry.patch(patch_key)
    registry.blob(record)
    manifest = manifest_of(registry, record)
    subject, solver, arrays = manifest["subject"], manifest["solver"], sorted(manifest["arrays"].items())
    rows: list[list[Any]] = [
        ["patch", record.id],
        ["concept", record.concept],
        ["base", record.base],
        ["base fingerprint", subject["fingerprint"]],
        ["tensors it changes", subject["count"]],
        *(["text input it leaves open", text_input] for text_input in subject.get("open_doors", [])),
        ["solver", record.solver],
        *([f"setting {name}", value] for name, value in record.settings.items()),
        ["seed", record.seed],
        *([["decoupled from", _decoupling(solver["decoupled"])]] if "decoupled" in solver else []),
        *(["compressed from", _compression(step)] for step in solver.get("compressed", [])),
        ["kind", record.kind],
        *([f"array {name}", f"{array['dtype']} {array['shape']}"] for name, array in arrays[:8]),
        ["bytes", record.nbytes],
        ["seconds", round(record.seconds, 3)],
        ["solved", record.solved_at.isoformat(timespec="seconds")],
        ["tags", ", ".join(record.tags)],
        *([f"on recipe {name}", _entry(entry)] for name, entry in registry.recipes_with(record.id)),
    ]
    latest = registry.evaluations(patch=record.id, latest=True)
    if as_json:
        rows += [[f"{each.suite}: {r.subject}: {r.metric}", r.value] for each in latest for r in each.results]
    show_table("Patch", ["what", "value"], rows, as_json, digests=digests)
    if not as_json:
        show_evaluations(latest)


def _compression(step: dict[str, Any]) -> str:
    size = f"rank {step['rank']}" if "rank" in step else f"energy {step.get('energy')}"
    return f"{step.get('from')}, {size}, relative error at most {step.get('error')} ({step.get('tensor')})"


def _decoupling(step: dict[str, Any]) -> str:
    others = len(step.get("universe", []))
    return f"{step.get('from')}, {step.get('rule')}, from {others} other concepts; {step.get('residual')} of its change left"


def _entry(entry: RecipeEntry) -> str:
    return f"strength {entry.strength:g}" + (f", expires {entry.until}" if entry.until else "")


@patch.command("add")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...", type=PATCH)
@recipe_option
@click.option("--strength", type=Strength(), default=1.0, show_default=True)
@click.option(
    "--expires",
    cls=Renamed,
    old=["--until"],
    metavar="DATE",
    type=ExpiryDay(never=True),
    help="YYYY-MM-DD, the day from which it has expired: `recipe expired` lists it then; or never.",
)
@why_option
@digests_option
@click.pass_context
def patch_add(
    ctx: click.Context,
    patches: tuple[str, ...],
    recipe: str,
    strength: float,
    expires: date | Literal["never"] | None,
    why: str,
    digests: bool,
) -> None:
    """Add patches to a recipe, which is made if it is new.

    A patch is named by its id, the beginning of one, or its concept: the newest patch of it for the recipe's base. All are
    added in one revision, or none. A patch that is there already gets the new strength, and the new day with --expires.

    \b
    Example:
      overpaint patch add cat ink --recipe safe --why "request 12"
      overpaint patch add ink --recipe safe --expires 2027-01-31
    """
    with Terminal() as terminal:
        workspace = open_workspace(ctx, terminal=terminal)
        registry = workspace.registry
        base = registry.recipe(recipe).base if registry.has_recipe(recipe) else registry.patch(patches[0]).base
        # Before a recipe is made, so that what cannot be added leaves none behind.
        ids = [registry.patch(key, base=base).id for key in patches]
        if not registry.has_recipe(recipe):
            day = None if expires == "never" else expires
            registry.check_entries(recipe, base, [RecipeEntry(id, strength, day) for id in ids])
        wanted = workspace.create_recipe(recipe, base=base, exist_ok=True)
        lines = wanted.add_all(ids, strength, why=why, until=expires)
        terminal.clear()
        for line in lines:
            show_change(line, digests)
        strong = [pair for line in lines for pair in wanted.disturbances(line.patch or "")]
        for pair in {(pair.emitter, pair.receiver): pair for pair in strong}.values():
            terminal.note(
                f"warning: the patch for {pair.emitter} moves {pair.receiver} {pair.ratio:.0%} as much as "
                f"{pair.emitter}; solve them in one registry, so that each preserves the other"
            )
        if mixed := wanted.mixture():
            terminal.note(f"warning: {mixed}")


@patch.command("remove")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...", type=PATCH)
@recipe_option
@why_option
@digests_option
@click.pass_context
def patch_remove(ctx: click.Context, patches: tuple[str, ...], recipe: str, why: str, digests: bool) -> None:
    """Remove patches from a recipe; the concepts come back.

    All are removed in one revision, or none. The weights are composed again from the base.

    \b
    Example:
      overpaint patch remove ink --recipe safe --why "licence signed"
    """
    with Terminal() as terminal:
        workspace = open_workspace(ctx, terminal=terminal)
        lines = workspace.recipe(recipe).remove_all(patches, why=why)
    for line in lines:
        show_change(line, digests)
    if lines[-1].digest_after == workspace.registry.base(workspace.registry.recipe(recipe).base).fingerprint:
        click.echo("the recipe is empty: these are the base's weights, bit for bit")
    elif lines[-1].digest_after is None:
        terminal.note(
            "the bytes of a patch that is still in the recipe are lost, so its weights cannot be composed now; "
            "`overpaint verify` names it"
        )


@patch.command("forget")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...", type=PATCH)
@click.option("--dry-run", is_flag=True, help="Only say what would be forgotten.")
@digests_option
@json_option
@click.pass_context
def patch_forget(ctx: click.Context, patches: tuple[str, ...], dry_run: bool, digests: bool, as_json: bool) -> None:
    """Take patches out of the registry, with their tags and evaluations.

    All are forgotten, or none. Refused for a patch that is in the history of a recipe: every revision can be restored. The bytes
    go with `overpaint gc`, once they are older than its grace period.

    \b
    Example:
      overpaint patch forget 3f9a12bc4d5e --dry-run
    """
    workspace = open_workspace(ctx)
    ids = dict.fromkeys(workspace.registry.patch(key).id for key in patches)
    records = [workspace.remove_patch(id, dry_run=True) for id in ids]
    if not dry_run:
        records = [workspace.remove_patch(id) for id in ids]
    rows = [[record.concept, record.id, record.base, record.solver, record.nbytes] for record in records]
    title = "Would be forgotten" if dry_run else "Forgotten"
    show_table(title, ["concept", "patch", "base", "solver", "bytes"], rows, as_json, digests=digests)


@patch.command("decouple")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...", type=PATCH)
@exactly_option
@universe_option
@device_option
@digests_option
@json_option
@click.pass_context
def patch_decouple(
    ctx: click.Context,
    patches: tuple[str, ...],
    exactly: bool,
    universe: tuple[str, ...],
    device: str,
    digests: bool,
    as_json: bool,
) -> None:
    """Store a patch that leaves other concepts alone.

    It is stored beside each PATCH, with what that does to its own concept and to no other concept of the registry. Whatever
    solved them, such patches can be summed: of its change to keys, values and the text encoder, each keeps what it does to its
    own concept; the other concepts, the vocabulary and the preserved prompts stay where they are, in the least-squares sense in
    which `separable` holds them. What does not act through the text is left out. The table says what share of its own change is
    missing afterwards, and how far the concept that it moves most goes, relative to its own.

    \b
    Example:
      overpaint patch decouple cat
    """
    rows: list[list[Any]] = []
    with (
        Terminal() as terminal,
        interruptible(terminal, lambda: f"{len(rows)} of {len(patches)} are decoupled and stored"),
    ):
        workspace = open_workspace(ctx, terminal=terminal)
        rule = decoupling(True, exactly)
        for step, key in enumerate(patches, 1):
            terminal.progress(step, len(patches), f"decoupling {key}")
            record, found = workspace.decouple(key, rule, universe=universe, device=device)
            said = found.diagnostics
            shares = [said["residual"], said["others moved"]]
            spelt = shares if as_json else [f"{share:.1%}" for share in shares]
            rows.append(
                [record.concept, record.id, found.source.id, record.kind, record.nbytes, *spelt, said["left_out"]]
            )
    columns = ["concept", "patch", "from", "kind", "bytes", "change missing", "others moved", "tensors left out"]
    show_table("Decoupled", columns, rows, as_json, digests=digests)


@patch.command("compress")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...", type=PATCH)
@click.option("--to", "size", required=True, metavar="RANK|ENERGY", help="At most 4 directions, or 0.99 of the energy.")
@digests_option
@json_option
@click.pass_context
def patch_compress(ctx: click.Context, patches: tuple[str, ...], size: str, digests: bool, as_json: bool) -> None:
    """Store a smaller patch beside each PATCH.

    Of every tensor's change, the part that --to names is kept. The error is relative to the change of a tensor (Frobenius
    norm); the table has the largest, --json has all.

    \b
    Example:
      overpaint patch compress cat --to 0.99
    """
    rows: list[list[Any]] = []
    with (
        Terminal() as terminal,
        interruptible(terminal, lambda: f"{len(rows)} of {len(patches)} are compressed and stored"),
    ):
        workspace = open_workspace(ctx, terminal=terminal)
        for step, key in enumerate(patches, 1):
            terminal.progress(step, len(patches), f"compressing {key}")
            record, smaller = workspace.compress(key, size)
            tensor, error = max(smaller.errors.items(), key=lambda item: item[1])
            sizes = [smaller.source.nbytes, record.nbytes]
            row = [record.concept, record.id, smaller.source.id, record.kind, *sizes]
            rows.append([*row, error, tensor, smaller.errors] if as_json else [*row, f"{error:.2%}", tensor])
    columns = ["concept", "patch", "from", "kind", "bytes before", "bytes", "largest error", "tensor"]
    show_table("Compressed", [*columns, *(["errors"] if as_json else [])], rows, as_json, digests=digests)


FORMATS = ("kohya", "diffusers", "comfy-diff", "full")
READERS = ("a1111", "kohya", "comfyui", "diffusers")
DTYPES = ("float32", "float16", "bfloat16")
MEANINGS = ("change", "weights")


def export_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What both exports to other tools share."""
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
        click.option("-o", "--out", type=LocalPath(dir_okay=False), required=True, metavar="FILE"),
    ):
        command = option(command)
    return command


@patch.command("import")
@click.argument("file", type=LocalPath())
@click.option("--base", "base_name", required=True, type=BASE, help="Name of the base that the file is for.")
@click.option(
    "--concept",
    required=True,
    type=CONCEPT,
    help="What it erases; a name the registry does not know becomes an object.",
)
@click.option("--allow-unmatched", is_flag=True, help="Leave out keys that name nothing in the base.")
@click.option("--meaning", type=click.Choice(MEANINGS), help="What plain tensors are, where that is not clear.")
@click.option(
    "--keep-rounding", is_flag=True, help="Also reproduce where the file is merely rounded more coarsely than the base."
)
@click.option(
    "--tolerance",
    cls=Renamed,
    old=["--within"],
    default=0.0,
    type=click.FloatRange(0, 1),
    metavar="ERROR",
    help="Be content with low rank within this relative error of each change.",
)
@json_option
@click.pass_context
def patch_import(
    ctx: click.Context,
    file: Path,
    base_name: str,
    concept: str,
    allow_unmatched: bool,
    meaning: Meaning | None,
    keep_rounding: bool,
    tolerance: float,
    as_json: bool,
) -> None:
    """Store another tool's erasure as a patch.

    FILE, or a folder, holds a LoRA, differences, or edited weights. What `overpaint export` wrote is taken by `overpaint
    import`.

    \b
    Example:
      overpaint patch import esd.safetensors --base sd15 --concept "van gogh"
    """
    with Terminal() as terminal:
        done = open_workspace(ctx, terminal=terminal).import_patch(
            file,
            base=base_name,
            concept=concept,
            meaning=meaning,
            allow_unmatched=allow_unmatched,
            keep_rounding=keep_rounding,
            tolerance=tolerance,
            progress=terminal.progress,
        )
    imported, record = done.found, done.record
    if as_json:
        facts = {"patch": record.id, "concept": record.concept, "kind": record.kind, "bytes": record.nbytes}
        show_json({**facts, **imported.settings()})
        return
    for sentence in imported.sentences():
        terminal.note(sentence)
    click.echo(f"patch {short(record.id)} for {record.concept}: {record.kind}, {record.nbytes} bytes")


@patch.command("export")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...", type=PATCH)
@click.option("--strength", type=Strength(), default=1.0, show_default=True, help="Of every patch in the file.")
@export_options
@click.pass_context
def patch_export(
    ctx: click.Context,
    patches: tuple[str, ...],
    strength: float,
    out: Path,
    format: str | None,
    for_: str | None,
    dtype: str,
    truncate: int | None,
    as_json: bool,
) -> None:
    """Write patches as a file for other tools.

    To share patches with other registries: `overpaint export`.

    \b
    Example:
      overpaint patch export cat -o cat.safetensors
    """
    with Terminal() as terminal:
        done = open_workspace(ctx, terminal=terminal).export_patches(
            patches,
            out,
            format,
            for_=for_,
            strength=strength,
            dtype=dtype,
            truncate=truncate,
            progress=terminal.progress,
        )
    show_exported(done, as_json)


def show_exported(done: Exported, as_json: bool) -> None:
    """What an export wrote, how exact it is, and for which tools it is whole."""
    if as_json:
        show_json(
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
