"""Ctrl-C while a command works: one sentence that says what is kept, and the exit code that shells expect."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from overpaint.registry.records import HistoryRecord
    from overpaint.workspace.workspace import Workspace


# What the commands share: talk on standard error, tables on standard output, the registry of a call.


class Talk:
    """What a command says on the way: text and progress on standard error."""

    def __init__(self) -> None:
        self._length = 0

    def say(self, text: str) -> None:
        self.clear()
        click.echo(text, err=True)

    def progress(self, step: int, of: int, text: str) -> None:
        """One line that is rewritten in a terminal; nothing where standard error is a file."""
        if sys.stderr.isatty():
            line = f"  {step}/{of} {text}"
            click.echo(f"\r{line:<{self._length}}", nl=False, err=True)
            self._length = len(line)

    def clear(self) -> None:
        if self._length:
            click.echo("\r" + " " * self._length + "\r", nl=False, err=True)
            self._length = 0


def show_table(title: str, columns: list[str], rows: list[list[Any]], as_json: bool) -> None:
    """A table for people, or the same rows as JSON objects. People are spared columns in which nothing stands."""
    if as_json:
        import json

        found = [dict(zip(columns, row, strict=True)) for row in rows]
        click.echo(json.dumps(found, indent=1, ensure_ascii=False, default=_moment))
        return
    from rich.console import Console
    from rich.table import Table

    told = [[_told(cell) for cell in row] for row in rows]
    filled = [j for j in range(len(columns)) if not told or any(row[j] for row in told)]
    table = Table(title=title, title_justify="left")
    for j in filled:
        table.add_column(columns[j], overflow="fold")
    for row in told:
        table.add_row(*(row[j] for j in filled))
    Console(markup=False, highlight=False).print(table)


def _moment(value: Any) -> str:
    """A moment as JSON has it."""
    assert isinstance(value, datetime), f"{value!r} is no JSON"
    return value.isoformat(timespec="seconds")


def _told(cell: Any) -> str:
    """A cell as people read it; moments to the minute."""
    if isinstance(cell, datetime):
        return f"{cell:%Y-%m-%d %H:%M}"
    return "" if cell is None else str(cell)


def say_if_more(shown: int, offset: int, total: int, what: str) -> None:
    """After a page that is not everything: how much there is, and how to see the rest."""
    if shown < total:
        Talk().say(f"{shown} of {total} {what}, from {offset + 1}; see the rest with --offset, or all with --limit 0")


def show_change(line: HistoryRecord) -> None:
    """One line for one change of a recipe."""
    day = f" until {line.until_after}" if line.until_after else ""
    what = f"{line.concept} ({(line.patch or '')[:12]}){day}" if line.patch else line.recipe
    click.echo(f"{line.action} {what}: weights {line.digest_before} -> {line.digest_after}")


def open_workspace(ctx: click.Context, *, create: bool = False) -> Workspace:
    """The registry this call is about."""
    from overpaint.workspace.workspace import Workspace

    return Workspace.open(ctx.obj, create=create)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
why_option = click.option("--why", default="", help="Why; kept in the recipe's history.")
limit_option = click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(0, 10**9), help="At most so many; 0: all."
)
offset_option = click.option(
    "--offset", default=0, show_default=True, type=click.IntRange(0, 10**9), help="Leave out so many first."
)
recipe_option = click.option("--recipe", default="default", show_default=True, help="Name of the recipe.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")


INTERRUPTED = 130
"""128 and the number of the signal, as every shell has it."""


@contextmanager
def interruptible(talk: Talk, kept: Callable[[], str]) -> Iterator[None]:
    """Within the block, Ctrl-C ends the command with `kept()`."""
    try:
        yield
    except KeyboardInterrupt:
        talk.say(f"interrupted: {kept()}")
        sys.exit(INTERRUPTED)
