"""Sharing: `export` and `import` one file, `push` and `pull` a folder or a URL, and `key` pairs to sign with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overpaint.commands.common import Talk, json_option, open_workspace, show_table

if TYPE_CHECKING:
    from overpaint.registry.sharing.ingest import Received
    from overpaint.registry.sharing.sending import Sent


Command = TypeVar("Command", bound=Callable[..., Any])

patches_argument = click.argument("patches", nargs=-1, metavar="[PATCH]...")
recipes_option = click.option("--recipe", "recipes", multiple=True, help="A recipe with its history; may be repeated.")
sign_option = click.option("--sign", "key", type=click.Path(path_type=Path), metavar="KEY", help="Sign with this key.")


older_option = click.option(
    "--accept-older", is_flag=True, help="Go on although the place showed a newer list of a trusted key before."
)


def receiving_options(command: Command) -> Command:
    """What `pull` and `import` share."""
    for option in (
        json_option,
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
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE")
@sign_option
@click.pass_context
def export_(
    ctx: click.Context, patches: tuple[str, ...], recipes: tuple[str, ...], out: Path, key: Path | None
) -> None:
    """Write patches or recipes to one new FILE with everything they need; without a name, everything."""
    sent = open_workspace(ctx).export(out, patches=patches, recipes=recipes, sign=key)
    click.echo(f"exported {_counted(sent)} to {out}: {sent.nbytes} bytes")


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@patches_argument
@receiving_options
@click.pass_context
def import_(
    ctx: click.Context,
    /,
    file: Path,
    patches: tuple[str, ...],
    trust: tuple[str, ...],
    no_verify: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Take what a FILE of `overpaint export`, or a bare patch file, has; or only some of it."""
    talk = Talk()
    done = open_workspace(ctx).import_file(
        file, patches=patches, trust=_trusted(trust, no_verify), warn=talk.say, progress=talk.progress, **asked
    )
    talk.clear()
    _show(done, as_json, no_verify)


@click.command()
@click.argument("destination", metavar="DEST")
@patches_argument
@recipes_option
@sign_option
@click.option(
    "--check", is_flag=True, help="Read again also the large blobs that a URL has already; mend what is damaged."
)
@older_option
@click.pass_context
def push(
    ctx: click.Context,
    destination: str,
    patches: tuple[str, ...],
    recipes: tuple[str, ...],
    key: Path | None,
    check: bool,
    accept_older: bool,
) -> None:
    """Send patches or recipes to DEST, a folder or a URL such as s3://bucket/path; without a name, everything."""
    talk = Talk()
    sent = open_workspace(ctx).push(
        destination,
        patches=patches,
        recipes=recipes,
        sign=key,
        check=check,
        accept_older=accept_older,
        progress=talk.progress,
    )
    talk.clear()
    for name in sent.newer:
        talk.say(f"the recipe {name!r} is newer there, and was left as it is; pull it")
    click.echo(f"pushed {_counted(sent)} to {sent.where}: {sent.written} blobs were missing there, {sent.nbytes} bytes")


@click.command()
@click.argument("source")
@patches_argument
@receiving_options
@older_option
@click.pass_context
def pull(
    ctx: click.Context,
    /,
    source: str,
    patches: tuple[str, ...],
    trust: tuple[str, ...],
    no_verify: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Take patches and recipes from SOURCE, a folder or a URL that was pushed to; or only some of them."""
    talk = Talk()
    done = open_workspace(ctx).pull(
        source, patches=patches, trust=_trusted(trust, no_verify), warn=talk.say, progress=talk.progress, **asked
    )
    talk.clear()
    _show(done, as_json, no_verify)


@click.group()
def key() -> None:
    """Key pairs, to sign what one shares and to know whose patches one takes."""


@key.command("new")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--for-checkpoints", is_flag=True, help="A P-256 key for `build --sign`, which model_signing verifies.")
def key_new(file: Path, for_checkpoints: bool) -> None:
    """Make a key pair: the private key in the new FILE, the public one in FILE.pub."""
    from overpaint.registry.sharing.signing import key_id, new_key

    public = new_key(file, for_checkpoints=for_checkpoints)
    click.echo(f"key {key_id(public)}: keep {file} to yourself, give {file}.pub to those who shall trust you")


def _counted(sent: Sent) -> str:
    return f"{len(sent.patches)} patches, {len(sent.recipes)} recipes"


def _trusted(keys: tuple[str, ...], no_verify: bool) -> tuple[str, ...] | None:
    if keys and no_verify:
        raise click.UsageError("--trust and --no-verify contradict each other; give one of them")
    return keys or None


def _show(done: Received, as_json: bool, no_verify: bool) -> None:
    rows = [["patch", id if as_json else id[:12], "new"] for id in done.new]
    rows += [["patch", id if as_json else id[:12], "known"] for id in done.known]
    rows += [["recipe", name, outcome] for name, outcome in done.recipes]
    show_table("Taken", ["what", "name", "state"], rows, as_json)
    if not done.verified and not no_verify:
        Talk().say("not verified: no signature was asked for (--trust KEYS asks for one, --no-verify for none)")
    if not as_json:
        Talk().say(
            f"{len(done.new)} of {len(done.new) + len(done.known)} patches were new; {done.nbytes} bytes were read"
        )
