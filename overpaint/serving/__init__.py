"""An HTTP server that draws with one base under any recipe of a registry: `check` what is to be served, then `run` it.

It runs in one process, or in several workers that are started again when they die.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from overpaint.core.asgi import is_local
from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import Progress, silent
from overpaint.serving.access import METRICS_FOLDER, ServeOptions, TokenFile
from overpaint.workspace.workspace import Workspace

if TYPE_CHECKING:
    from fastapi import FastAPI

    from overpaint.bases.base import Base

STOP_SECONDS = 60
"""How long pictures that are being drawn may take when the server is told to stop."""
HANGING_SECONDS = 30
"""A worker that does not answer for so long is started again. Loading PyTorch can hold one up for many seconds."""


def _application(options: ServeOptions, on_base: Callable[[Base], None] | None) -> FastAPI:
    """What a worker makes once it answers its supervisor: loading PyTorch takes long on a busy machine."""
    from overpaint.serving.app import create_app

    return create_app(options, on_base)


def check(options: ServeOptions, host: str, progress: Progress = silent) -> None:
    """Raise OverpaintError for what cannot or should not be served: here, once, and not in every worker."""
    workspace = Workspace.open(options.registry, create=False)
    workspace.progress = progress
    workspace.base(workspace.base_name(options.base))
    if options.tokens and not TokenFile(workspace.registry.folder).tokens():
        raise OverpaintError(
            "this registry has no tokens, so nobody could use the server; make one: "
            "`overpaint token new NAME --role generate`, or give --no-tokens to serve this machine alone"
        )
    if not options.tokens and not is_local(host):
        raise OverpaintError(
            f"without tokens, whoever reaches {host} could change every recipe; leave --no-tokens out, or listen on 127.0.0.1"
        )


def run(
    options: ServeOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    on_base: Callable[[Base], None] | None = None,
    on_listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve what `check` passed until the process is told to stop; `on_listening` is called with the server's URL."""
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    with tempfile.TemporaryDirectory(prefix="overpaint-serve-") as folder:
        if workers > 1:
            options = replace(options, shared=Path(folder))
            os.environ[METRICS_FOLDER] = folder
        config = uvicorn.Config(
            partial(_application, options, on_base),
            factory=True,
            host=host,
            port=port,
            workers=workers,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=STOP_SECONDS,
            timeout_worker_healthcheck=HANGING_SECONDS,
        )
        listening = config.bind_socket()
        name, number = listening.getsockname()[:2]
        on_listening(f"http://{f'[{name}]' if ':' in name else name}:{number}")
        try:
            if workers > 1:
                Multiprocess(config, sockets=[listening]).run()
            else:
                uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            pass  # what uvicorn raises again once it has stopped
        finally:
            listening.close()
