"""What is shown of work: the one progress callback of the package, and tables of results for notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with the step, of how many, and what is being done. A step smaller than the last begins another piece of work."""


def silent(step: int, of: int, text: str) -> None:
    """Reports no progress."""


def html_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """An HTML table under a title, as `_repr_html_` returns it; both are plain text, and no markup in them counts."""
    head = "".join(f"<th>{escape(each)}</th>" for each in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<p>{escape(title.strip('<>'))}</p><table><tr>{head}</tr>{body}</table>"
