"""`overpaint evaluate`, `report`, `crosstalk`: does it erase, what else did it hurt, does it come back exactly. `certify` signs
what was measured, and `verify-certificate` checks what somebody signed."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overpaint.commands.common import (
    BASE,
    RECIPE,
    ExpiryDay,
    LocalPath,
    Terminal,
    device_option,
    json_option,
    on_option,
    open_workspace,
    settings_of,
    short,
    show_table,
)
from overpaint.evaluation.suites import ERASED_BAR, KEPT_BAR

if TYPE_CHECKING:
    from overpaint.registry.records import EvaluationRecord


COLUMNS = ["about", "metric", "value", "low", "high", "n"]


@click.command()
@click.argument("name", metavar="RECIPE|PATCH", required=False, type=RECIPE)
@click.option("--suite", default="quick", show_default=True, help="One of --list.")
@click.option("--list", "listing", is_flag=True, help="Show the suites and what they ask.")
@click.option("--set", "settings", multiple=True, metavar="K=V", help="A setting of the suite; may be repeated.")
@click.option("--judge", default="", help="cnn, clip[:FOLDER-or-ID], classifier:FOLDER-or-ID, hook:MODULE:FUNCTION.")
@click.option(
    "--prompts",
    type=LocalPath(dir_okay=False),
    help="A CSV file with the columns prompt and concept (and seed), asked instead of the usual ones.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="All seeds follow from it.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1, 1000))
@click.option("--guidance", type=float, help="Guidance scale; default: the base's own.")
@click.option("--batch", default=50, show_default=True, type=click.IntRange(1), help="Pictures drawn at once.")
@device_option
@on_option
@json_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    name: str | None,
    suite: str,
    listing: bool,
    settings: tuple[str, ...],
    judge: str,
    prompts: Path | None,
    seed: int,
    steps: int,
    guidance: float | None,
    batch: int,
    device: str,
    on: str,
    as_json: bool,
) -> None:
    """Judge a recipe, or one patch, by pictures.

    The numbers are kept in the registry. Intervals are 95% bootstrap intervals over prompts. A run that was interrupted
    goes on where it stopped when it is run again.

    \b
    Example:
      overpaint evaluate safe
      overpaint evaluate safe --suite generality --judge clip
    """
    from overpaint.evaluation.suites import SUITES

    if listing:
        show_table("Suites", ["suite", "asks"], [[each, about] for each, (_, about) in SUITES.items()], as_json)
        return
    if name is None:
        raise click.UsageError("name a recipe or a patch to evaluate, or --list the suites")
    from overpaint.workspace import evaluating
    from overpaint.workspace.recipe import current_user

    request = evaluating.EvaluationRequest(
        suite=suite,
        settings=settings_of(settings),
        judge=judge,
        prompts=prompts,
        seed=seed,
        steps=steps,
        guidance=guidance,
        batch=batch,
        device=device,
        on=on,
    )
    with Terminal() as terminal:
        workspace = open_workspace(ctx, terminal=terminal)
        done = evaluating.evaluate(workspace, name, request, who=current_user(), progress=terminal.progress)
    for place in done.redrawn:
        terminal.note(f"a damaged picture in the cache was drawn again: {place}")
    show_table(title_of(done.record), COLUMNS, result_rows(done.record, as_json), as_json)


@click.command()
@click.argument("recipe", metavar="RECIPE", type=RECIPE)
@click.option("-o", "--out", type=LocalPath(dir_okay=False), required=True, metavar="FILE.html")
@device_option
@click.pass_context
def report(ctx: click.Context, recipe: str, out: Path, device: str) -> None:
    """Write what was measured of a recipe as a page.

    The numbers and figures are written in files beside it.

    \b
    Example:
      overpaint report safe -o safe.html
    """
    with Terminal() as terminal:
        wanted = open_workspace(ctx, terminal=terminal).recipe(recipe)
        done = wanted.report(out, device=device, progress=terminal.progress)
    for notice in done.notices:
        terminal.note(notice)
    for place in done.files:
        click.echo(str(place))


def title_of(record: EvaluationRecord) -> str:
    """One line that says what was evaluated, how and when."""
    what = f"recipe {record.recipe}@{record.revision}" if record.recipe else f"patch {short(record.patch)}"
    when = record.at.isoformat(timespec="seconds")
    return f"{record.suite} of {what} by {record.judge}, seed {record.seed}, {record.seconds:.0f} s, {when}"


def result_rows(record: EvaluationRecord, exact: bool) -> list[list[Any]]:
    """The results as rows under `COLUMNS`, rounded to four digits and named in plain words; exact: as they are stored."""
    from overpaint.evaluation.metrics import plain_words

    def shown(value: float | None) -> float | None:
        return value if exact or value is None else float(f"{value:.4g}")

    named: Callable[[str], str] = str if exact else plain_words
    return [
        [named(r.subject), named(r.metric), shown(r.value), shown(r.low), shown(r.high), r.n] for r in record.results
    ]


def show_evaluations(records: list[EvaluationRecord]) -> None:
    """A table for each of the latest runs, under what `patch show` and `recipe show` print."""
    for record in records:
        show_table(title_of(record), COLUMNS, result_rows(record, False), False)


@click.command()
@click.option("--recipe", type=RECIPE, help="The patches of this recipe.")
@click.option("--base", "base_name", type=BASE, help="Without a recipe: the newest patch of each concept on this base.")
@click.option("--all", "everything", is_flag=True, help="Also show what moves the registry's other concepts.")
@click.option("-o", "--out", type=LocalPath(dir_okay=False), help="A heat map, as a new PNG file.")
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
    """Show how much patches move other concepts.

    The effect is relative to that on the patch's own concept: 0 is none, 1 is as much.

    \b
    Example:
      overpaint crosstalk --recipe safe --all --above 0.1
    """
    with Terminal() as terminal:
        workspace = open_workspace(ctx, terminal=terminal)
        measured = workspace.crosstalk(recipe, base=base_name, everything=everything, device=device)
    if out:
        from overpaint.evaluation.report_page import heat_map

        heat_map(out, measured.heat_map("Cross-talk, relative to the patch's own concept"))
        terminal.note(f"wrote {out}")
    method = {concept: how for (_, concept), how in zip(measured.patches, measured.methods, strict=True)}
    rows: list[list[Any]] = [
        [p.emitter, p.receiver, round(p.ratio, 4), method[p.emitter]] for p in measured.pairs() if p.ratio >= above
    ]
    show_table("Cross-talk", ["patch", "concept", "relative effect", "how"], rows, as_json)


MARKS = {"holds": "yes", "fails": "NO", "not checked": "not checked"}


@click.command(short_help="Sign what a recipe or checkpoint hides, and how it was tested.")
@click.argument("subject", metavar="RECIPE|CHECKPOINT")
@click.option("-o", "--out", type=LocalPath(dir_okay=False), required=True, metavar="FILE")
@click.option("--key", type=LocalPath(), required=True, metavar="KEY", help="The private key to sign with.")
@click.option(
    "--expires",
    type=ExpiryDay(),
    metavar="YYYY-MM-DD",
    help="When it expires; default: with the first patch that does.",
)
@click.option("--who", help="Who certifies; default: your user name.")
@click.option(
    "--erased-bar", default=ERASED_BAR, show_default=True, help="At most this share may be left of what is hidden."
)
@click.option(
    "--preserved-bar", default=KEPT_BAR, show_default=True, help="At least this share must be left of the rest."
)
@json_option
@click.pass_context
def certify(
    ctx: click.Context,
    subject: str,
    out: Path,
    key: Path,
    expires: date | None,
    who: str | None,
    erased_bar: float,
    preserved_bar: float,
    as_json: bool,
) -> None:
    """Certify a recipe, or a checkpoint built from one: which bytes, tested how, by whom, until when.

    Every suite that `overpaint evaluate` ran on exactly these weights is stated, attacks as counter-evidence. FILE.cdx.json, a
    CycloneDX bill of materials, is written beside FILE. A patch hides a concept; a certificate says how well, and never that
    it is deleted.

    Example: overpaint certify safe -o safe.cert --key me.key
    """
    from overpaint.certificates.statement import Thresholds
    from overpaint.workspace.certifying import certify as write
    from overpaint.workspace.recipe import current_user

    done = write(
        open_workspace(ctx),
        subject,
        out,
        key=key,
        who=who or current_user(),
        expires=expires,
        thresholds=Thresholds(erased_bar, preserved_bar),
    )
    if as_json:
        click.echo(json.dumps({"certificate": str(done.file), "bill": str(done.bill), "tests": done.result}, indent=1))
        return
    show_table(
        "What was promised and measured", ["threshold", "holds"], [list(row) for row in done.result.items()], False
    )
    click.echo(f"{done.file}\n{done.bill}")


@click.command("verify-certificate", short_help="Check a certificate: signature, expiry, weights, files.")
@click.argument("file", type=LocalPath(), metavar="FILE")
@click.option("--trust", multiple=True, type=LocalPath(), metavar="KEY.pub", help="A key you trust.")
@click.option("--base", type=LocalPath(), metavar="PATH", help="The base; default: the registry's.")
@click.option("--checkpoint", type=LocalPath(exists=True), metavar="PATH", help="The checkpoint.")
@click.option("--from", "source", metavar="FILE|FOLDER|URL", help="Where to get patches that the registry lacks.")
@click.option("--rerun", is_flag=True, help="Draw and judge the suites' pictures again, and compare the numbers.")
@json_option
@click.pass_context
def verify_certificate(
    ctx: click.Context,
    file: Path,
    trust: tuple[Path, ...],
    base: Path | None,
    checkpoint: Path | None,
    source: str | None,
    rerun: bool,
    as_json: bool,
) -> None:
    """Check a certificate against whatever is at hand; what was not checked is said.

    With the base and the patches every digest is composed again. The exit code is 0 only when nothing failed.

    Example: overpaint verify-certificate safe.cert --trust alice.key.pub --checkpoint safe/
    """
    from overpaint.workspace.certifying import verify

    workspace = open_workspace(ctx, create=True)
    findings = verify(workspace, file, trust=trust, base=base, checkpoint=checkpoint, source=source, rerun=rerun)
    if as_json:
        click.echo(json.dumps(findings.as_json(), indent=1, ensure_ascii=False))
    else:
        rows = [[check.field, MARKS[check.outcome], check.detail] for check in findings.checks]
        show_table(
            f"{file}: {', '.join(findings.facts['concepts']) or 'nothing'} hidden",
            ["what", "holds", "why"],
            rows,
            False,
        )
        click.echo("nothing failed" if findings.good else "this certificate does not hold")
    ctx.exit(0 if findings.good else 1)
