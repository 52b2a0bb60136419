"""What the commands share: the registry of a call, options, completion, tables, progress, and what Ctrl-C says.

Results go to standard output; notices and progress to standard error.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from overpaint.core.errors import OverpaintError
from overpaint.core.names import parsed_day, parsed_number, refuse_url

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as ProgressBar
    from rich.progress import TaskID

    from overpaint.bases.base import Base
    from overpaint.registry.records import HistoryRecord
    from overpaint.registry.registry import Registry
    from overpaint.workspace.workspace import Workspace

NOTE_EVERY = 60.0
"""Seconds between two lines of progress where standard error is no terminal."""


class Terminal:
    """What a command writes to standard error while it works, as a context manager that ends the display of progress.

    In a terminal, progress is one line as wide as the terminal, with the time left, which goes when the work ends.
    Elsewhere, in a log for example, it is a plain line now and then.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._bar: ProgressBar | None = None
        self._task: TaskID | None = None
        self._step = 0
        self._noted = time.monotonic()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()

    def note(self, text: str) -> None:
        """Write a line that stays."""
        self.clear()
        click.echo(text, err=True)

    def progress(self, step: int, of: int, text: str) -> None:
        """Show that `step` of `of` is done, which has the form of a progress callback."""
        if not (self._console or sys.stderr.isatty()):
            if time.monotonic() - self._noted > NOTE_EVERY:
                self.note(f"{step}/{of} {text}")
                self._noted = time.monotonic()
            return
        if self._bar is None:
            self._bar = _progress_bar(self._console)
            self._bar.start()
            self._task = self._bar.add_task(text, total=of)
        assert self._task is not None
        if step < self._step or of != self._bar.tasks[0].total:
            # Another piece of work: how fast the last one went says nothing about it.
            self._bar.reset(self._task, total=of)
        self._step = step
        self._bar.update(self._task, completed=step, description=text)

    def clear(self) -> None:
        """Take the progress off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _progress_bar(console: Console | None) -> ProgressBar:
    """One line: what is being done, cut to the room there is; a bar where the terminal is wide; the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    console = console or Console(stderr=True)
    text = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False, table_column=text)]
    if console.width >= 72:
        columns.append(BarColumn(20))
    columns.append(MofNCompleteColumn(table_column=Column(no_wrap=True)))
    columns.append(TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)))
    # Steps may take minutes each, and the time left follows from them: rich looks back half a minute by itself.
    return Progress(
        *columns, console=console, transient=True, expand=True, refresh_per_second=4, speed_estimate_period=3600
    )


WRAPPED = ("why", "tags", "synonyms", "settings", "name", "concept", "recipe", "value", "problem", "reason")
"""Columns of people's own words, which make room for ids, days and numbers where a table is narrow."""
_WHOLE_ID = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
_NUMBER = re.compile(r"(-?[\d,.]+(e[-+]\d+)?%?)?")
HEADINGS = {
    "revision": "rev",
    "until": "expires",
    "until before": "expires before",
    "until after": "expires after",
    "did": "action",
}
"""What people read over a column whose JSON key is another."""


def short(text: str | None) -> str:
    """A text in which every digest is cut to the digits that people read; "unknown" for none."""
    return "unknown" if text is None else _WHOLE_ID.sub(r"\1", text)


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    as_json: bool,
    *,
    digests: bool = False,
    asked: Collection[str] = (),
) -> None:
    """A table for people, or the same rows as JSON objects.

    People see the first digits of a digest unless they ask for `digests`, the columns `asked` only then, and no column in
    which nothing stands. In a terminal the table fits its width; elsewhere, or with `digests`, a row is a line, however long.
    """
    rows = list(rows)
    if as_json:
        show_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)
    if digests or not sys.stdout.isatty():
        console.width = 1 << 16
    if not rows:
        click.echo(f"{title}: none")
        return
    click.echo(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    shown = [j for j, column in enumerate(columns) if any(_cell(row[j], True) for row in rows)]
    shown = [j for j in shown if digests or columns[j] not in asked]
    for j in shown:
        values = [row[j] for row in rows if row[j] is not None]
        is_number = all(_NUMBER.fullmatch(_cell(value, digests)) for value in values)
        is_short = all(len(_cell(value, digests)) <= len("2026-01-31 12:00") for value in values)
        table.add_column(
            HEADINGS.get(columns[j], columns[j]),
            justify="right" if is_number else "left",
            overflow="fold",
            no_wrap=is_number or (is_short and columns[j] not in WRAPPED),
        )
    for row in rows:
        table.add_row(*(_cell(row[j], digests) for j in shown))
    console.print(table)


def show_json(value: Any) -> None:
    """A value as JSON on standard output; moments to the second."""
    import json

    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=_moment))


def _moment(value: Any) -> str:
    assert isinstance(value, datetime), f"{value!r} is no JSON"
    return value.isoformat(timespec="seconds")


def _cell(value: Any, digests: bool) -> str:
    """A value as people read it; moments to the minute."""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = "" if value is None else str(value)
    return text if digests else _WHOLE_ID.sub(r"\1", text)


def note_if_more(shown: int, offset: int, total: int, what: str) -> None:
    """After a page that is not everything: how much there is, and how to see the rest."""
    if shown < total:
        Terminal().note(
            f"{shown} of {total} {what}, from {offset + 1}; see the rest with --offset, or all with --limit 0"
        )


DONE = {
    "add": "added",
    "remove": "removed",
    "strength": "changed the strength of",
    "until": "changed the expiry of",
    "checkout": "checked out",
}


def show_change(line: HistoryRecord, digests: bool = False) -> None:
    """One line for one change of a recipe."""
    expiry = f", expires {line.until_after}" if line.until_after else ""
    what = f"{line.concept} ({line.patch}){expiry}" if line.patch else line.recipe
    text = (
        f"{DONE.get(line.action, line.action)} {what}: weights {line.digest_before} -> {line.digest_after or 'unknown'}"
    )
    click.echo(text if digests else short(text))


def default_registry() -> str:
    """The user's data directory."""
    from platformdirs import user_data_dir

    return user_data_dir("overpaint")


def open_workspace(ctx: click.Context, *, create: bool = False, terminal: Terminal | None = None) -> Workspace:
    """The registry of this call; what takes long in it shows its progress on `terminal`."""
    from overpaint.workspace.workspace import Workspace

    workspace = Workspace.open(ctx.obj, create=create)
    workspace.on_base = choose_threads
    if terminal is not None:
        workspace.progress = terminal.progress
    return workspace


SMALL_BASE = 100 << 20
"""Bytes of weights below which one thread is faster than several.

Its operations are so small that threads spend the time waiting for each other, worst where other programs want the cores: on
two busy cores, eight pictures of the embedded base (14 MB) took 7 s with one thread and 112 s with two, at twelve times the
processor time; solving took 10 and 16 s of it.
"""


def choose_threads(base: Base) -> None:
    """One thread for a small base, unless the user said how many: see SMALL_BASE."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and sum(place.entry.size for place in base.places.values()) < SMALL_BASE:
        torch.set_num_threads(1)


class Named(click.types.StringParamType):
    """The name of something in the registry, which a shell can complete. `names` reads them; nothing is checked here."""

    def __init__(self, name: str, names: Callable[[Registry, str], Iterable[str]]) -> None:
        self.name = name
        self._names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from overpaint.registry.registry import Registry

        try:
            # While a shell completes, no command runs that would have put the registry into the context.
            registry = Registry.open(ctx.find_root().params.get("registry") or default_registry(), create=False)
            return [CompletionItem(name) for name in self._names(registry, incomplete) if name.startswith(incomplete)]
        except OverpaintError:
            return []


def _recipe_names(registry: Registry, incomplete: str) -> Iterator[str]:
    for name in registry.recipe_names():
        yield name
        if incomplete.startswith(f"{name}@"):
            record = registry.recipe(name)
            yield from (f"{name}@{tag}" for tag, _ in record.tags)
            yield from (f"{name}@{number}" for number in range(record.revision + 1))


def _patch_names(registry: Registry, incomplete: str) -> Iterator[str]:
    records = registry.patches()
    yield from sorted({record.concept for record in records})
    yield from (short(record.id) for record in records if incomplete)


def _solver_names(registry: Registry, incomplete: str) -> Iterable[str]:
    from overpaint.solvers import solvers

    return solvers()[0]


RECIPE = Named("recipe", _recipe_names)
PATCH = Named("patch", _patch_names)
CONCEPT = Named("concept", lambda registry, incomplete: (each.name for each in registry.concepts()))
BASE = Named("base", lambda registry, incomplete: (each.name for each in registry.bases()))
SOLVER = Named("solver", _solver_names)


class LocalPath(click.Path):
    """A path on this machine. A URL is refused, and not printed: it may hold a password, and would be a folder called `s3:`."""

    def __init__(self, *, exists: bool = False, file_okay: bool = True, dir_okay: bool = True) -> None:
        super().__init__(exists=exists, file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        _refuse_url(self, value, param, ctx)
        return super().convert(value, param, ctx)


class LocalText(click.File):
    """A text file on this machine, or `-` for standard input. A URL is refused as `LocalPath` does."""

    def __init__(self) -> None:
        super().__init__(encoding="utf-8")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        _refuse_url(self, value, param, ctx)
        return super().convert(value, param, ctx)


def _refuse_url(
    kind: LocalPath | LocalText, value: Any, param: click.Parameter | None, ctx: click.Context | None
) -> None:
    try:
        refuse_url(value)
    except OverpaintError as error:
        kind.fail(str(error), param, ctx)


class ExpiryDay(click.types.StringParamType):
    """A day, written YYYY-MM-DD; with `never`, also that word, which is given back as it is."""

    name = "date"

    def __init__(self, *, never: bool = False) -> None:
        self._never = never

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or (self._never and value == "never"):
            return value
        try:
            return parsed_day(value, "a day", other="never" if self._never else "")
        except OverpaintError as error:
            self.fail(str(error), param, ctx)


class Strength(click.types.FloatParamType):
    """A strength: a decimal number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return parsed_number(value, "a strength") if isinstance(value, str) else value
        except OverpaintError as error:
            self.fail(str(error), param, ctx)


class Renamed(click.Option):
    """An option whose older names go on working and are not shown."""

    def __init__(self, declarations: Sequence[str], old: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__([*declarations, *old], **attributes)
        self._old = frozenset(old)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        shown = copy.copy(self)
        shown.opts = [name for name in self.opts if name not in self._old]
        return click.Option.get_help_record(shown, ctx)


def renamed(command: click.Command, old: str) -> click.Command:
    """A command under the name that it had before, which no list shows."""
    alias = copy.copy(command)
    alias.name, alias.hidden = old, True
    return alias


def settings_of(texts: Iterable[str]) -> dict[str, str]:
    """The values of `--set NAME=VALUE`, by name."""
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"--set takes NAME=VALUE; got {text!r}")
        settings[name.strip()] = value
    return settings


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
digests_option = click.option("--digests", is_flag=True, help="Print whole digests.")
why_option = click.option("--why", default="", help="Why; written into the recipe's history.")
limit_option = click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(0, 10**9), help="At most so many; 0: all."
)
offset_option = click.option(
    "--offset", default=0, show_default=True, type=click.IntRange(0, 10**9), help="Leave out so many first."
)
recipe_option = click.option("--recipe", default="default", show_default=True, type=RECIPE, help="Name of the recipe.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
on_option = click.option(
    "--on", default="", metavar="ray|ray://HOST:PORT", help="Share the work out on a Ray cluster; default: do it here."
)


exactly_option = click.option(
    "--exactly",
    is_flag=True,
    help="Also leave the bare names of the others exactly where they are, as SepME does; there is room for a few.",
)


universe_option = click.option(
    "--universe",
    multiple=True,
    metavar="RECIPE|CONCEPT",
    help="Preserve only these, or a recipe's, of all known concepts; may be repeated.",
)


def decouple_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--decouple, and --exactly beside it."""
    return click.option("--decouple", is_flag=True, help="Take out what a change does to other concepts.")(
        exactly_option(command)
    )


def decoupling(decouple: bool, exactly: bool) -> str:
    """The rule that the two options ask for; empty for none."""
    if exactly and not decouple:
        raise click.UsageError("--exactly says how to --decouple; give both")
    return ("exact" if exactly else "ridge") if decouple else ""


INTERRUPTED = 130
"""128 and the number of the signal, as every shell has it."""


@contextmanager
def interruptible(terminal: Terminal, kept: Callable[[], str]) -> Iterator[None]:
    """Within the block, Ctrl-C ends the command with one sentence, `kept()`, and the exit code that shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.note(f"interrupted: {kept()}")
        sys.exit(INTERRUPTED)
