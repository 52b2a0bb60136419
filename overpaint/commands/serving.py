"""`overpaint serve` and `token`: pictures under any recipe over HTTP, and who may do what there. `overpaint ui`: a page."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import click

from overpaint.commands.common import (
    BASE,
    RECIPE,
    Terminal,
    choose_threads,
    device_option,
    json_option,
    open_workspace,
    show_table,
)
from overpaint.core.errors import OverpaintError

NEEDED = ("fastapi", "prometheus_client", "uvicorn")


@click.command()
@click.option("--base", "base_name", type=BASE, help="Name of the base; may be left out where there is one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Each loads the base.")
@click.option("--no-tokens", is_flag=True, help="Let every program of this machine do everything.")
@click.option("--enforce-expiry", is_flag=True, help="Remove patches from recipes when they expire.")
@click.option(
    "--rate",
    default=600,
    show_default=True,
    type=click.IntRange(0, 10**9),
    help="Pictures per minute and token; 0: any.",
)
@click.option("--queue", default=64, show_default=True, type=click.IntRange(1, 10**6), help="Pictures that may wait.")
@click.option("--max-steps", default=100, show_default=True, type=click.IntRange(1, 1000), help="Of one picture.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the pipeline.",
)
@device_option
@click.pass_context
def serve(
    ctx: click.Context,
    base_name: str | None,
    host: str,
    port: int,
    workers: int,
    no_tokens: bool,
    enforce_expiry: bool,
    rate: int,
    queue: int,
    max_steps: int,
    dtype: Any,
    device: str,
) -> None:
    """Serve pictures of a base under any recipe.

    Speaks OpenAI's API for pictures, with recipes as models; /docs describes everything. A change of a recipe reaches every
    picture that is begun after it.

    \b
    Example:
      overpaint serve --base sd15 --port 8000
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise OverpaintError(f"serving needs {', '.join(missing)}; run `pip install 'overpaint[serve]'`")
    from overpaint.serving import check, run
    from overpaint.serving.access import ServeOptions

    options = ServeOptions(
        str(ctx.obj),
        base=base_name,
        device=device,
        dtype=dtype,
        tokens=not no_tokens,
        enforce_expiry=enforce_expiry,
        rate=rate,
        queue=queue,
        max_steps=max_steps,
    )
    with Terminal() as terminal:
        check(options, host, terminal.progress)
    run(
        options,
        host=host,
        port=port,
        workers=workers,
        on_base=choose_threads,
        on_listening=lambda url: terminal.note(f"serving at {url}; see {url}/docs; Ctrl-C stops it"),
    )


@click.group()
def token() -> None:
    """Tokens of `overpaint serve`: who may do what."""


@token.command("new")
@click.argument("owner", metavar="NAME")
@click.option(
    "--role", required=True, type=click.Choice(["read", "generate", "change"]), help="Each includes those before it."
)
@click.option(
    "--recipe", "recipes", multiple=True, type=RECIPE, help="Draw with and change this recipe alone; may be repeated."
)
@click.pass_context
def token_new(ctx: click.Context, owner: str, role: Any, recipes: tuple[str, ...]) -> None:
    """Make a token and print it, once.

    NAME is its owner, whom the history of a recipe names as the author of a change. The registry keeps a digest alone.

    \b
    Example:
      overpaint token new anna --role change
      overpaint token new kiosk --role generate --recipe safe
    """
    from overpaint.serving.access import TokenFile

    registry = open_workspace(ctx).registry
    names = [registry.recipe(each).name for each in recipes]
    click.echo(TokenFile(registry.folder).add(owner, role, names))
    Terminal().note(f"a token of {owner} with the role {role}; it is shown this once and kept nowhere")


@token.command("list")
@json_option
@click.pass_context
def token_list(ctx: click.Context, as_json: bool) -> None:
    """List tokens: their ids, owners and roles.

    \b
    Example:
      overpaint token list
    """
    from overpaint.serving.access import TokenFile

    tokens = TokenFile(open_workspace(ctx).registry.folder).tokens()
    rows = [[each.id, each.owner, each.role, ", ".join(each.recipes), each.created] for each in tokens]
    show_table("Tokens", ["id", "owner", "role", "recipes", "created"], rows, as_json)


@token.command("revoke")
@click.argument("key", metavar="ID|NAME")
@click.pass_context
def token_revoke(ctx: click.Context, key: str) -> None:
    """Revoke a token by its id, or all tokens of an owner.

    \b
    Example:
      overpaint token revoke anna
    """
    from overpaint.serving.access import TokenFile

    for each in TokenFile(open_workspace(ctx).registry.folder).revoke(key):
        click.echo(f"revoked {each.id} of {each.owner} ({each.role})")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; elsewhere it needs a password.")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option(
    "--password",
    envvar="OVERPAINT_UI_PASSWORD",
    show_envvar=True,
    help="Asked of every visitor. Safer in the variable.",
)
@click.option("--open", "browse", is_flag=True, help="Open it in the browser of this machine.")
@device_option
@click.pass_context
def ui(ctx: click.Context, host: str, port: int, password: str | None, browse: bool, device: str) -> None:
    """Compare, switch and restore patches on a page.

    Draws base and recipe side by side, shows who changed what and why, solves, builds and reports. Ctrl-C ends it.

    \b
    Example:
      overpaint ui
      overpaint ui --port 8080 --open
    """
    import threading

    with Terminal() as terminal:
        from overpaint.ui import served

        workspace = open_workspace(ctx, create=True, terminal=terminal)
        with served(workspace, host=host, port=port, password=password or "", device=device) as address:
            terminal.note(f"the page is at {address}")
            if browse:
                click.launch(address)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                terminal.note("the page is closed")
