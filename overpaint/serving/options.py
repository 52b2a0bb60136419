"""How a server runs. Apart from the server, so that a worker answers its supervisor before it loads PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Where prometheus_client has workers write, when this variable is set before it is imported."""


@dataclass(frozen=True)
class ServeOptions:
    """How a server runs. `rate` is pictures in a minute for each token, 0 for any number; `queue`, how many may wait in a worker.

    `max_body` is in bytes. Without `tokens`, whoever reaches the port may do everything, and only a local name of the host is
    answered to. `shared` is a folder in which several workers count together.
    """

    registry: str
    base: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    tokens: bool = True
    enforce_expiry: bool = False
    rate: int = 600
    queue: int = 64
    max_steps: int = 100
    max_body: int = 64 << 10
    shared: Path | None = None
