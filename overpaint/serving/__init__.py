"""An HTTP server that draws with one base under any recipe of a registry: `overpaint serve`."""

from __future__ import annotations
