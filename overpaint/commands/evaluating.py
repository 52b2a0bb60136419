"""`overpaint crosstalk`: what each patch does to the other concepts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overpaint.commands.common import Talk, device_option, json_option, open_workspace, show_table

if TYPE_CHECKING:
    from overpaint.registry.registry import EvaluationRecord


# `overpaint evaluate`: does it erase, what else did it hurt, did it come back exactly.


COLUMNS = ["about", "metric", "value", "low", "high", "n"]


@click.command()
@click.argument("name", metavar="RECIPE|PATCH", required=False)
@click.option("--suite", default="quick", show_default=True, help="One of --list.")
@click.option("--list", "listing", is_flag=True, help="Show the suites and what they ask.")
@click.option("--set", "settings", multiple=True, metavar="K=V", help="A setting of the suite; may be repeated.")
@click.option("--judge", default="", help="cnn, clip[:FOLDER-or-ID], classifier:FOLDER-or-ID, hook:MODULE:FUNCTION.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A CSV file with the columns prompt and concept (and seed), asked instead of the usual ones.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="All seeds follow from it.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1, 1000))
@click.option("--guidance", type=float, help="Guidance scale; default: what the base likes.")
@click.option("--batch", default=50, show_default=True, type=click.IntRange(1), help="Pictures drawn at once.")
@device_option
@json_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    name: str | None,
    suite: str,
    listing: bool,
    settings: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Judge a recipe, or a patch alone, by pictures; the numbers are kept beside it.

    Intervals are 95% bootstrap intervals over prompts. An interrupted run goes on where it was when it is run again.
    """
    from overpaint.evaluation.suites import SUITES

    if listing:
        show_table("Suites", ["suite", "asks"], [[each, about] for each, (_, about) in SUITES.items()], as_json)
        return
    if name is None:
        raise click.UsageError("name a recipe or a patch to evaluate, or --list the suites")
    from overpaint.workspace import evaluating
    from overpaint.workspace.recipe import current_user

    talk = Talk()
    chosen = dict(_pair(text) for text in settings)
    request = evaluating.EvaluationRequest(suite=suite, settings=chosen, **options)
    done = evaluating.evaluate(open_workspace(ctx), name, request, who=current_user(), progress=talk.progress)
    talk.clear()
    for place in done.redrawn:
        talk.say(f"a damaged picture in the cache was drawn again: {place}")
    show_table(title_of(done.record), COLUMNS, result_rows(done.record, as_json), as_json)


@click.command()
@click.argument("recipe", metavar="RECIPE")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE.html")
@device_option
@click.pass_context
def report(ctx: click.Context, recipe: str, out: Path, device: str) -> None:
    """Write all that was measured of a recipe as one page, with its numbers and figures in files beside it."""
    talk = Talk()
    done = open_workspace(ctx).recipe(recipe).report(out, device=device, progress=talk.progress)
    talk.clear()
    for notice in done.notices:
        talk.say(notice)
    for place in done.files:
        click.echo(str(place))


def title_of(record: EvaluationRecord) -> str:
    """One line that says what was evaluated, how and when."""
    what = f"recipe {record.recipe}@{record.revision}" if record.recipe else f"patch {(record.patch or '')[:12]}"
    when = record.at.isoformat(timespec="seconds")
    return f"{record.suite} of {what} by {record.judge}, seed {record.seed}, {record.seconds:.0f} s, {when}"


def result_rows(record: EvaluationRecord, exact: bool) -> list[list[Any]]:
    """The results as rows under `COLUMNS`; rounded to four digits unless exact."""

    def shown(value: float | None) -> float | None:
        return value if exact or value is None else float(f"{value:.4g}")

    return [[r.subject, r.metric, shown(r.value), shown(r.low), shown(r.high), r.n] for r in record.results]


def show_evaluations(records: list[EvaluationRecord]) -> None:
    """A table for each of the latest runs, under what `patch show` and `recipe show` say."""
    for record in records:
        show_table(title_of(record), COLUMNS, result_rows(record, False), False)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"--set takes NAME=VALUE; got {text!r}")
    return name.strip(), value


@click.command()
@click.option("--recipe", help="The patches of this recipe.")
@click.option("--base", "base_name", help="Without a recipe: the newest patch of each concept on this base.")
@click.option("--all", "everything", is_flag=True, help="Also show what moves the registry's other concepts.")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="A heat map, as a new PNG file.")
@click.option("--above", default=0.0, show_default=True, help="Show only pairs above this.")
@device_option
@json_option
@click.pass_context
def crosstalk(
    ctx: click.Context,
    recipe: str | None,
    base_name: str | None,
    everything: bool,
    out: Path | None,
    above: float,
    device: str,
    as_json: bool,
) -> None:
    """Show how much each patch moves every other concept, relative to its own (0 is none, 1 is as much)."""
    workspace = open_workspace(ctx)
    found = workspace.crosstalk(recipe, base=base_name, everything=everything, device=device)
    if out:
        from overpaint.evaluation.figures import heat_map

        heat_map(
            out,
            found.ratios,
            [concept for _, concept in found.patches],
            found.concepts,
            title="Cross-talk, relative to the patch's own concept",
            row_label="patch",
            column_label="concept",
        )
        Talk().say(f"wrote {out}")
    method = {concept: how for (_, concept), how in zip(found.patches, found.methods, strict=True)}
    rows: list[list[Any]] = [
        [p.emitter, p.receiver, round(p.ratio, 4), method[p.emitter]] for p in found.pairs() if p.ratio >= above
    ]
    show_table("Cross-talk", ["patch", "concept", "relative effect", "how"], rows, as_json)
