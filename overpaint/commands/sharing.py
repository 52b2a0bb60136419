"""What leaves a registry and comes in: `export`, `import`, `push`, `pull`, `key`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overpaint.commands.common import (
    PATCH,
    RECIPE,
    LocalPath,
    Terminal,
    digests_option,
    json_option,
    open_workspace,
    show_table,
)

if TYPE_CHECKING:
    from overpaint.registry.sharing.ingest import Listed, Received
    from overpaint.registry.sharing.sending import Sent


Command = TypeVar("Command", bound=Callable[..., Any])

patches_argument = click.argument("patches", nargs=-1, metavar="[PATCH]...", type=PATCH)
recipes_option = click.option(
    "--recipe", "recipes", multiple=True, type=RECIPE, help="A recipe with its history; may be repeated."
)
sign_option = click.option("--sign", "key", type=LocalPath(), metavar="KEY", help="Sign with this key.")


older_option = click.option(
    "--accept-older", is_flag=True, help="Go on although the place showed a newer list of a trusted key before."
)

plain_http_option = click.option(
    "--plain-http", is_flag=True, help="Ask an OCI registry without TLS; one on this machine is asked so anyway."
)


def at_registry(location: str, plain_http: bool) -> str:
    """The location, or the one that stands for a registry without TLS."""
    rest = re.sub("^oci://", "", location, flags=re.IGNORECASE)
    if plain_http and rest == location:
        raise click.UsageError("--plain-http is for an OCI registry, oci://HOST/NAME")
    return f"oci+http://{rest}" if plain_http else location


def receiving_options(command: Command) -> Command:
    """What `pull` and `import` share."""
    for option in (
        json_option,
        digests_option,
        click.option("--as", "name", help="Another name for the recipe that is taken."),
        click.option(
            "--trust",
            multiple=True,
            metavar="KEYS",
            help="Take only what one of these public keys has signed: .pub files, or folders of them.",
        ),
        click.option("--no-verify", is_flag=True, help="Check no signatures, and do not remark on it."),
        recipes_option,
    ):
        command = option(command)
    return command


@click.command("export")
@patches_argument
@recipes_option
@click.option("-o", "--out", type=LocalPath(dir_okay=False), required=True, metavar="FILE")
@sign_option
@click.pass_context
def export_(
    ctx: click.Context, patches: tuple[str, ...], recipes: tuple[str, ...], out: Path, key: Path | None
) -> None:
    """Write patches or recipes to one file to share.

    With everything they need, to a new FILE; without a name, everything is written.

    \b
    Example:
      overpaint export --recipe safe -o safe.overpaint
    """
    sent = open_workspace(ctx).export(out, patches=patches, recipes=recipes, sign=key)
    click.echo(f"exported {_counted(sent)} to {out}: {sent.nbytes} bytes")


@click.command("import")
@click.argument("file", type=LocalPath())
@patches_argument
@receiving_options
@click.pass_context
def import_(
    ctx: click.Context,
    file: Path,
    patches: tuple[str, ...],
    recipes: tuple[str, ...],
    trust: tuple[str, ...],
    no_verify: bool,
    name: str | None,
    digests: bool,
    as_json: bool,
) -> None:
    """Take patches and recipes from a shared file.

    FILE was written by `overpaint export`, or is a bare patch file. Name patches or recipes to take only those.

    \b
    Example:
      overpaint import safe.overpaint --as "their safe"
    """
    with Terminal() as terminal:
        done = open_workspace(ctx, terminal=terminal).import_file(
            file,
            patches=patches,
            recipes=recipes,
            trust=_trusted(trust, no_verify),
            name=name,
            warn=terminal.note,
            progress=terminal.progress,
        )
    _show_received(done, digests, as_json, no_verify)


@click.command()
@click.argument("destination", metavar="DEST")
@patches_argument
@recipes_option
@sign_option
@click.option(
    "--check", is_flag=True, help="Read again also the large blobs that a URL has already; mend what is damaged."
)
@older_option
@click.option("--license", default="", metavar="ID", help="For the card of a repository on the Hub, such as mit.")
@click.option("--overwrite", is_flag=True, help="Move a registry's tag also where it holds something else.")
@plain_http_option
@click.pass_context
def push(
    ctx: click.Context,
    destination: str,
    patches: tuple[str, ...],
    recipes: tuple[str, ...],
    key: Path | None,
    check: bool,
    accept_older: bool,
    license: str,
    overwrite: bool,
    plain_http: bool,
) -> None:
    """Send patches or recipes to a folder, URL or registry.

    DEST is a folder, a URL such as s3://bucket/path, a repository of an OCI registry, oci://HOST/NAME[:TAG], or one on the
    Hugging Face Hub, hf://USER/REPO. Without a name, everything is sent.

    \b
    Example:
      overpaint push s3://bucket/patches --recipe safe --sign my.key
    """
    with Terminal() as terminal:
        workspace = open_workspace(ctx, terminal=terminal)
        sent = workspace.push(
            at_registry(destination, plain_http),
            patches=patches,
            recipes=recipes,
            sign=key,
            check=check,
            overwrite=overwrite,
            license=license,
            warn=terminal.note,
            accept_older=accept_older,
            progress=terminal.progress,
        )
    for name in sent.newer:
        terminal.note(f"the recipe {name!r} is newer there, and was left as it is; pull it")
    click.echo(f"pushed {_counted(sent)} to {sent.where}: {sent.written} blobs were missing there, {sent.nbytes} bytes")


@click.command()
@click.argument("source")
@patches_argument
@receiving_options
@older_option
@plain_http_option
@click.option(
    "--list", "list_only", is_flag=True, help="Only show what is there, signed by whom, and what is new here."
)
@click.option("--dry-run", is_flag=True, help="Check all that a pull checks before it takes anything, and stop there.")
@click.pass_context
def pull(
    ctx: click.Context,
    source: str,
    patches: tuple[str, ...],
    recipes: tuple[str, ...],
    trust: tuple[str, ...],
    no_verify: bool,
    accept_older: bool,
    plain_http: bool,
    list_only: bool,
    dry_run: bool,
    name: str | None,
    digests: bool,
    as_json: bool,
) -> None:
    """Take patches and recipes from a folder, URL or registry.

    SOURCE is a folder, a URL or a repository (oci://HOST/NAME, with :TAG or @DIGEST; hf://USER/REPO, with @REVISION) that was
    pushed to. Name patches or recipes to take only those.

    \b
    Example:
      overpaint pull s3://bucket/patches --trust alice.key.pub
    """
    with Terminal() as terminal:
        workspace, source = open_workspace(ctx, terminal=terminal), at_registry(source, plain_http)
        if list_only or dry_run:
            listed = workspace.browse(
                source,
                patches=patches,
                recipes=recipes,
                name=name,
                trust=_trusted(trust, no_verify),
                accept_older=accept_older,
                strict=dry_run,
                warn=terminal.note,
            )
            show_listed(listed, digests, as_json)
            return
        done = workspace.pull(
            source,
            patches=patches,
            recipes=recipes,
            trust=_trusted(trust, no_verify),
            name=name,
            accept_older=accept_older,
            warn=terminal.note,
            progress=terminal.progress,
        )
    _show_received(done, digests, as_json, no_verify)


@click.group()
def key() -> None:
    """Key pairs, to sign and to check signatures."""


@key.command("new")
@click.argument("file", type=LocalPath())
@click.option("--for-checkpoints", is_flag=True, help="A P-256 key for `build --sign`, which model_signing verifies.")
def key_new(file: Path, for_checkpoints: bool) -> None:
    """Make a key pair, to sign what you share.

    The private key is in the new FILE, the public one in FILE.pub.

    \b
    Example:
      overpaint key new my.key
    """
    from overpaint.registry.sharing.signing import key_id, new_key

    public = new_key(file, for_checkpoints=for_checkpoints)
    click.echo(f"key {key_id(public)}: keep {file} to yourself, give {file}.pub to those who shall trust you")


def _counted(sent: Sent) -> str:
    return f"{len(sent.patches)} patches, {len(sent.recipes)} recipes"


def _trusted(keys: tuple[str, ...], no_verify: bool) -> tuple[str, ...] | None:
    if keys and no_verify:
        raise click.UsageError("--trust and --no-verify contradict each other; give one of them")
    return keys or None


def _show_received(done: Received, digests: bool, as_json: bool, no_verify: bool) -> None:
    rows = [["patch", id, "new"] for id in done.new]
    rows += [["patch", id, "known"] for id in done.known]
    rows += [["recipe", name, outcome] for name, outcome in done.recipes]
    show_table("Taken", ["what", "name", "state"], rows, as_json, digests=digests)
    terminal = Terminal()
    if not done.verified and not no_verify:
        terminal.note("not verified: no signature was asked for (--trust KEYS asks for one, --no-verify for none)")
    if not as_json:
        terminal.note(
            f"{len(done.new)} of {len(done.new) + len(done.known)} patches were new; {done.nbytes} bytes were read"
        )


def show_listed(listed: Sequence[Listed], digests: bool, as_json: bool) -> None:
    """What a shared place has, and in one sentence what a pull of it would do."""
    from overpaint.registry.sharing.ingest import would_change

    rows = [
        [e.what, e.name, e.id, e.base, e.solver, e.kind, e.nbytes, ", ".join(e.signed_by) or None, e.state]
        for e in listed
    ]
    columns = ["what", "name", "id", "base", "solver", "kind", "bytes", "signed by", "state"]
    show_table("There", columns, rows, as_json, digests=digests)
    if not as_json:
        Terminal().note(would_change(listed))
