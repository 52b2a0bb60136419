"""The sentences of the command line, a file for each noun. `overpaint/cli.py` gathers them."""

from __future__ import annotations
