"""A page in the browser over a registry, without a terminal: served on this machine alone, or elsewhere behind a password."""

from __future__ import annotations

import hmac
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from overpaint.core.asgi import OwnPages, is_local
from overpaint.core.errors import OverpaintError

if TYPE_CHECKING:
    from overpaint.workspace.workspace import Workspace


class PageUnavailable(OverpaintError):
    """A page that cannot be served as asked."""


@contextmanager
def served(
    workspace: Workspace, *, host: str = "127.0.0.1", port: int = 0, password: str = "", device: str = "auto"
) -> Iterator[str]:
    """Within the block, the page over a registry is served; the value is its address. Port 0 is any free one.

    With a password, visitors log in with it and a name of their own, which the history then has; without one, only this
    machine is answered. Pages of other sites are refused in either case. Pictures and files that visitors make are in a
    temporary folder that goes with the block. Raises PageUnavailable without Gradio, for a host other than this machine
    without a password, and where the port is taken.
    """
    if not password and not is_local(host):
        raise PageUnavailable(
            f"a page on {host} is for everybody who reaches this machine, so it needs a password; set OVERPAINT_UI_PASSWORD, "
            "or leave out --host"
        )
    try:
        from starlette.middleware import Middleware

        from overpaint.ui.page import Page, theme
    except ModuleNotFoundError as error:
        raise PageUnavailable(f"the page needs Gradio ({error}): pip install 'overpaint[ui]'") from error
    from overpaint.ui.views import style
    from overpaint.workspace.evaluating import Studio

    def admits(name: str, given: str) -> bool:
        return bool(name.strip()) and hmac.compare_digest(given.encode(), password.encode())

    with tempfile.TemporaryDirectory(prefix="overpaint-ui-", ignore_cleanup_errors=True) as folder:
        place = Path(folder).resolve()
        page = Page(workspace, Studio(workspace, place / "pictures", device=device), place)
        try:
            _, address, _ = page.blocks.launch(
                server_name=host,
                server_port=port or _free_port(host),
                auth=admits if password else None,
                auth_message="Your name, which the history of changes shows, and the password of this page",
                # All that this leaves out is a check that the page answers itself in three seconds, which a busy machine fails.
                _frontend=False,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                footer_links=[],
                allowed_paths=[str(place)],
                app_kwargs={"middleware": [Middleware(OwnPages, local=not password)]},
                theme=theme(),
                css=style(),
            )
        except OSError as error:
            raise PageUnavailable(f"{host}:{port} cannot be listened on ({error}); choose another --port") from error
        try:
            yield address
        finally:
            page.blocks.close(verbose=False)


def _free_port(host: str) -> int:
    import socket

    with socket.create_server((host, 0)) as free:
        return int(free.getsockname()[1])
