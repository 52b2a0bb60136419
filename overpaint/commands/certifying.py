"""`overpaint certify` and `verify-certificate`: a signed statement of what is hidden and how that was tested."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import click

from overpaint.commands.common import ExpiryDay, LocalPath, json_option, open_workspace, show_table
from overpaint.evaluation.suites import ERASED_BAR, KEPT_BAR

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
