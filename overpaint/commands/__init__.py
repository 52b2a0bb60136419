"""The sentences of the command line, a file for each section of its help or noun in it. `overpaint/cli.py` gathers them."""

from __future__ import annotations
