"""What the benchmarks share: a table on standard output, and the same rows in a file with `--json FILE`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Sequence[Any]]


def arguments(about: str) -> argparse.ArgumentParser:
    """A parser that knows `--json FILE`; a benchmark adds its own options."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables to this file")
    return parser


def show(title: str, columns: Sequence[str], rows: Rows) -> dict[str, Any]:
    """Print a table; the same rows come back as `{title: [{column: cell, ...}, ...]}`, ready for `save`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_spelled(cell) for cell in row))
    Console(markup=False, highlight=False).print(table)
    return {title: [dict(zip(columns, row, strict=True)) for row in rows]}


def save(file: Path | None, *tables: Mapping[str, Any]) -> None:
    """Write what `show` gave to the file of `--json`; nothing when there is none."""
    if file is not None:
        together = {title: rows for table in tables for title, rows in table.items()}
        file.write_text(json.dumps(together, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _spelled(cell: Any) -> str:
    """Three significant digits are what a measurement carries."""
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return "" if cell is None else str(cell)
