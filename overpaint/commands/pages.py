"""`overpaint ui`: a page over the registry, in a browser."""

from __future__ import annotations

import click

from overpaint.commands.common import Terminal, device_option, open_workspace


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
        from overpaint.ui.launch import served

        workspace = open_workspace(ctx, create=True, terminal=terminal)
        with served(workspace, host=host, port=port, password=password or "", device=device) as address:
            terminal.note(f"the page is at {address}")
            if browse:
                click.launch(address)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                terminal.note("the page is closed")
