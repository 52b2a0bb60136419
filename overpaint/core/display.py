"""Small tables for notebooks: what `_repr_html_` of the public objects returns."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def html_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """An HTML table under a title; both are plain text, and no markup in them counts."""
    head = "".join(f"<th>{escape(each)}</th>" for each in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<p>{escape(title.strip('<>'))}</p><table><tr>{head}</tr>{body}</table>"
